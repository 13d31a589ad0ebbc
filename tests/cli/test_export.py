"""The command export: a saved adapter for another library, from the folder alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gatedadapters as ga
from gatedadapters.cli import main

gguf = pytest.importorskip("gguf")


@pytest.fixture
def saved(decoder: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(decoder)
    adapters = ga.attach(model, "lora-all-linear")
    with torch.no_grad():
        for _, path in adapters.typed_paths():
            path.get_parameter("up").normal_(0, 0.1)
    adapters.compact()
    adapters.save(tmp_path / "answers")
    return tmp_path / "answers"


def test_a_peft_folder_comes_back_to_the_same_logits(
    saved: Path, decoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(saved)]) == 0
    assert f"written to {saved}-peft" in capsys.readouterr().out
    ids = torch.tensor([[5, 6, 7]])
    ours, theirs = (AutoModelForCausalLM.from_pretrained(decoder).eval() for _ in range(2))
    ga.load_adapters(ours, saved)
    ga.import_peft(theirs, f"{saved}-peft")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_file_for_llama_cpp_lies_beside_the_folder_and_is_not_replaced_unasked(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(saved), "--to", "gguf"]) == 0
    file = saved.with_name("answers.gguf")
    assert gguf.GGUFReader(file).tensors
    assert main(["export", str(saved), "--to", "gguf"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(saved), "--to", "gguf", "--overwrite"]) == 0


def test_what_cannot_be_exported_is_said_and_nothing_is_written(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert main(["export", str(saved), "--task", "mood"]) == 2
    assert "no such task" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if path != saved) == []
