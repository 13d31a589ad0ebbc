"""Two processes that weaken a model each for itself, and average what they learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


def test_ranks_drop_for_themselves_and_average_their_gradients(
    on_processes: Callable[..., None], tmp_path: Path
) -> None:
    on_processes(Path(__file__).with_name("ranks.py"), tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in "01")
    assert any(a["dropped"] != b["dropped"] for a, b in zip(first, second, strict=True))
    for a, b in zip(first, second, strict=True):
        mean = [(x + y) / 2 for x, y in zip(a["alone"], b["alone"], strict=True)]
        torch.testing.assert_close(a["shared"], mean)
        torch.testing.assert_close(a["shared"], b["shared"], rtol=0, atol=0)
