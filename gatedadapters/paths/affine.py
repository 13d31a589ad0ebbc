"""What scales, biases and norms share: h (1 + z s) + z b, with one value per feature, kept or dropped as a whole."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from gatedadapters.paths.base import Path, check_widths, per_token


class Affine(Path):
    """h (1 + z s) + z b; s and b (features,) are zero at start. A subclass has one of them or both."""

    stage = 1

    @abstractmethod
    def effective(self) -> tuple[Tensor | None, Tensor | None]:
        """What acts on h, s and b, (features,) each; None for one that this path does not have."""

    @property
    def units(self) -> int:
        """Always 1: the whole path."""
        return 1

    def forward(self, tapped: Tensor, target: Tensor, gate: Tensor | None) -> Tensor:
        """Multiply the target by 1 + gate * s and add gate * b."""
        return self.forward_together([self], tapped, target, [gate])

    @classmethod
    def forward_together(
        cls, paths: Sequence[Path], tapped: Tensor, target: Tensor, gates: Sequence[Tensor | None]
    ) -> Tensor:
        """Multiply once and add once, by what the paths make of each other's factors and shifts."""
        several = cast(Sequence[Affine], paths)
        check_widths(several[0], tapped, target)
        factor = shift = None
        for path, gate in zip(several, gates, strict=True):
            own_factor, own_shift = path.gated(gate)
            if own_factor is not None:
                factor = own_factor if factor is None else factor * own_factor
                shift = None if shift is None else shift * own_factor
            if own_shift is not None:
                shift = own_shift if shift is None else shift + own_shift
        rows = target.reshape(-1, target.shape[-1])
        # In the wider of both types: in bfloat16 a factor of 1.003 would be 1.
        if factor is not None:
            rows = rows * _by_row(factor, target, several[0])
        if shift is not None:
            rows = rows + _by_row(shift, target, several[0])
        return rows.to(target.dtype).view(target.shape)

    def gated(self, gate: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The factor 1 + gate * s and the shift gate * b, (features,) or (examples, features)."""
        scale, shift = self.effective()
        if gate is not None:
            scale, shift = (None if value is None else gate * value for value in (scale, shift))
        return None if scale is None else 1 + scale, shift

    def rate_factor(self, units: float) -> float:
        """5: a factor or a shift acts alone in its output, and becomes larger than the entries of a map."""
        return 5.0

    @torch.no_grad()
    def scale_units(self, scale: Tensor) -> None:
        """Multiply the parameters."""
        for parameter in self.parameters():
            parameter.mul_(scale.to(parameter))

    def merge_into(self, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The map before or after the affine function.

        At the output, rows of the weight and the bias are multiplied and b is added to the bias; the gains of a norm
        count as rows. At the input, columns of the weight are multiplied and W b is added to the bias.
        """
        factor, shift = (
            None if value is None else value.to(weight)
            for value in self.gated(None if gate is None else gate.to(weight))
        )
        if self.site.write.side == "input":
            if shift is not None:
                shift = weight @ shift
            if factor is not None:
                weight = weight * factor
        elif factor is not None:
            weight = factor.view(-1, *[1] * (weight.dim() - 1)) * weight
            bias = None if bias is None else factor * bias
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return weight, bias

    @classmethod
    def joined(cls, paths: Sequence[Path]) -> Sequence[Path]:
        """The sums of the factors' changes and of the shifts."""
        whole = max(paths, key=lambda path: sum(1 for _ in path.parameters()))  # some norms have no shift of their own
        with torch.no_grad():
            for path in paths:
                for name, value in path.named_parameters() if path is not whole else ():
                    whole.get_parameter(name).add_(value)
        return (whole,)

    def select_units(self, keep: Tensor) -> None:
        """Do nothing: there is one unit, and it is kept."""


def _by_row(values: Tensor, target: Tensor, path: Path) -> Tensor:
    return values if values.dim() == 1 else per_token(values, target, str(path.site.tap))
