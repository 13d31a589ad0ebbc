"""Cores by importance: how far the warm start moved a tensor, and how steep the loss is there."""

from __future__ import annotations

from gatedadapters.continual.strategies.probed import Probed


class L2Fisher(Probed):
    """`S = ½ d̂ + ½ F̂`, the released selection of TRACE at tensor granularity; see `select_core`.

    Tuning starts from the model that earlier tasks left, which the source does not say (ours), and the probe from the
    pretrained base, as released.

    References:
        arXiv 2605.31025, released code.
    """

    kind = "l2_fisher"
    quantity = "l2_fisher"
