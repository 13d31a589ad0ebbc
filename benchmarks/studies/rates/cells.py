"""What there is to run: one cell for each short training of one kind, at one rate, on one backbone."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common.store import Store

STORE = Store("rates")
WIDTHS = (128, 256, 512, 1024)
RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1, 3.2e-1, 6.4e-1)
KINDS: dict[str, dict[str, object]] = {
    "norm": {"kind": "norm"},
    "bias": {"kind": "bias"},
    "scale": {"kind": "scale"},
    "lora, rank 1": {"kind": "lora", "rank": 1},
    "lora, rank 8": {"kind": "lora", "rank": 8},
    "lora, rank 64": {"kind": "lora", "rank": 64},
    "elements, 64 a map": {"kind": "elements", "k": 64},
    "parallel, width 8": {"kind": "parallel", "width": 8, "activation": "silu"},
    "serial, width 8": {"kind": "serial", "width": 8, "activation": "silu"},
}
"""By name, the options of the candidates: one kind at every place that it fits."""


@dataclass(frozen=True)
class Cell:
    """One training: everything that its result depends on."""

    width: int
    kind: str
    rate: float
    seed: int = 0
    steps: int = 40

    @property
    def name(self) -> str:
        """Its name among the results."""
        return f"{self.width}_{self.kind.replace(', ', '-').replace(' ', '')}_{self.rate:g}_{self.steps}_{self.seed}"
