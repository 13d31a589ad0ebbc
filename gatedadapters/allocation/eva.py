"""Explained variance of the inputs, as EVA shares out ranks."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from gatedadapters.allocation.base import PlacementScore
from gatedadapters.allocation.probe import Probe


class ExplainedVariance(PlacementScore):
    """The share of the variance of a map's inputs that their k-th principal direction explains; for a rank each.

    Paths without ranks get the share of the first direction. As in the source, a rank's cost is not looked at.

    References:
        Paischer et al. 2024 (EVA), arXiv 2410.07170: ranks go to the directions that explain most.
    """

    kind = "eva"
    TOKENS = 1024

    def worth(self, probe: Probe) -> dict[str, Tensor]:
        """See `PlacementScore.worth`."""
        rows: dict[str, list[Tensor]] = defaultdict(list)
        counts: dict[str, int] = defaultdict(int)

        def use(module: str, inputs: Tensor) -> None:
            room = self.TOKENS - counts[module]
            if room > 0:
                rows[module].append(inputs[: min(room, 128)].clone())
                counts[module] += len(rows[module][-1])

        probe.inputs(use)
        shares = {}
        for module, parts in rows.items():
            inputs = torch.cat(parts)
            values = torch.linalg.svdvals(inputs - inputs.mean(0)).square()
            shares[module] = values / values.sum().clamp(min=torch.finfo(torch.float32).tiny)
        found = {}
        for key, path in probe.paths.items():
            ratio = shares.get(path.site.write.module)
            count = min(probe.ranks[key], 1 if ratio is None else len(ratio))
            while probe.ranks[key] % count:
                count -= 1
            ratio = torch.zeros(1) if ratio is None else ratio[:count]
            found[key] = (ratio * probe.unit_params[key]).cpu().repeat(max(1, path.site.experts))
        return found
