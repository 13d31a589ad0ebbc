"""The page on one training step names the moments in the order in which they happen."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "one-training-step.md").read_text(encoding="utf-8")


def test_the_page_names_the_moments_of_a_step_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    text, block = re.fullmatch(r"(.*)```python\n(.*)```\n", PAGE, re.DOTALL).groups()
    numbered = re.findall(r"^(\d+)\. \*\*.*?`(\S+\.py)`\s+`(\S+)`$", text, re.DOTALL | re.MULTILINE)
    assert [int(number) for number, _, _ in numbered] == list(range(1, len(numbered) + 1))
    try:
        exec(compile(block, "one-training-step.md", "exec"), {})
    finally:
        sys.setprofile(None)
    _, *steps = re.split(r"^step \d\n", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(steps) == 2
    moments = "".join(f"{file} {name}\n" for _, file, name in numbered)
    assert steps[0] == moments + "pruned: False\n"
    assert steps[1] == moments + "pruned: True\n"
