"""Cores by importance: how far a probe moved a tensor, and how steep the loss is there."""

from __future__ import annotations

from gatedadapters.continual.strategies.probed import Probed


class L2Fisher(Probed):
    """The core is what scores highest by `S = ½ d̂ + ½ F̂`: at tensor granularity the released selection of TRACE; see
    `select_core`.

    As released, probes start from the pretrained base. Tuning starts from the model that earlier tasks left, of which
    the source says nothing (our choice).

    References:
        arXiv 2605.31025, released code.
    """

    kind = "l2_fisher"
    quantity = "l2_fisher"
