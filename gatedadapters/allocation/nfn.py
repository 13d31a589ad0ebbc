"""Normalised feature norms: how well a weight is aligned with its inputs."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from gatedadapters.allocation.maps import MapScore, as_matrix
from gatedadapters.allocation.probe import Probe
from gatedadapters.paths import Path


class NormalizedFeatureNorm(MapScore):
    """One over the mean of `‖Ŵ ẑ‖ / ‖Ŵ r‖` over the maps of one role; the lowest alignment is adapted first.

    Ŵ is the weight and ẑ an input, both scaled away; r is a random direction, for which `‖W r‖ = ‖W‖_F / √in` on
    average. A role's maps share one number, as in the source.

    References:
        Hayou et al. 2025 (PLoP), arXiv 2506.20629, and the released code: module types of the lowest norms get LoRA.
    """

    kind = "nfn"
    needs_data = True
    TOKENS = 512  # of each map; the mean over them has settled long before

    def read(self, probe: Probe) -> None:
        """Keep some inputs of each map, of unit length."""
        self._inputs: dict[str, list[Tensor]] = defaultdict(list)
        counts: dict[str, int] = defaultdict(int)

        def use(module: str, inputs: Tensor) -> None:
            room = self.TOKENS - counts[module]
            if room > 0:
                chosen = inputs[: min(room, 64)]
                counts[module] += len(chosen)
                self._inputs[module].append(torch.nn.functional.normalize(chosen, dim=-1))

        probe.inputs(use)
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._norms: dict[tuple[str, str], float] = {}
        for path in probe.paths.values():
            weight, inputs = probe.weight_of(path), self._inputs.get(path.site.write.module)
            if weight is None or inputs is None or path.site.reads_ids:
                continue
            found[_role(path)].append(_alignment(as_matrix(weight, path), torch.cat(inputs)))
        for role, values in found.items():
            self._norms[role] = sum(values) / len(values)

    def rate(self, probe: Probe, path: Path, weight: Tensor) -> float:
        """One over the norm of the role."""
        norm = self._norms.get(_role(path), 0.0)
        return 1.0 / norm if norm else 0.0


def _role(path: Path) -> tuple[str, str]:
    return path.site.sublayer, path.site.role


def _alignment(weight: Tensor, inputs: Tensor) -> float:
    """The mean over `inputs`, (tokens, in) of unit length, of the norm of the output against a random input's."""
    expected = weight.norm() / inputs.shape[-1] ** 0.5
    return float((inputs @ weight.t()).norm(dim=-1).mean() / expected) if float(expected) else 0.0
