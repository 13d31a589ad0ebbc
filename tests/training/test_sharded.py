"""Two and four processes that share a sharded backbone train, choose and save what one process does."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import processes
import pytest
import sharded_processes as own
import torch
import trial_processes
from recipes import assert_same, continued, gated_causal, gated_classifier
from transformers import LlamaForCausalLM

import gatedadapters as ga
from gatedadapters.errors import AttachError, TrainingError
from gatedadapters.studies import open_storage
from gatedadapters.testing import tiny
from gatedadapters.training.resumable import check_resumable

EXAMPLES = Path(__file__).parents[2] / "examples"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes write; the checkpoint of a run on one process lies there already."""
    folder = tmp_path_factory.mktemp("sharded")
    place = folder / "one process"
    own.through_accelerate(place, gated_causal(), continued(24), save_strategy="steps", save_steps=2, max_steps=2)
    own.save_joint(folder)
    own.save_wide(folder)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path, on_processes: Callable[..., None]) -> list[dict[str, Any]]:
    """What each of two processes ended with, by scenario."""
    on_processes(Path(own.__file__), folder)
    return [torch.load(folder / f"rank {rank} of 2.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def four(folder: Path, two: Any, on_processes: Callable[..., None]) -> list[dict[str, Any]]:
    """The same of four, after two have left their checkpoints."""
    on_processes(Path(own.__file__), folder, 4)
    return [torch.load(folder / f"rank {rank} of 4.pt", weights_only=False) for rank in range(4)]


def assert_searched_alike(shared: dict[str, Any], single: dict[str, Any]) -> None:
    for found, wanted in zip(shared["gradients"], single["gradients"], strict=True):
        assert_same(found, wanted, **CLOSE)
    torch.testing.assert_close(shared["gates"], single["gates"], **CLOSE)
    assert shared["kept"] == single["kept"]
    assert shared["fixed"] == single["fixed"]
    torch.testing.assert_close(shared["logits"], single["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", own.ORDERS)
def test_a_sharded_search_has_the_gradients_the_gates_and_the_structure_of_one_process(name: str, two: Any) -> None:
    options = {k: v for k, v in own.ORDERS[name].items() if k in {"family", "checkpointed", "heads"}}
    single = own.by_hand(**options)
    for shared in two:
        assert_searched_alike(shared[name], single)
        assert shared[name]["share of a block's weights here"] < 0.55


def test_four_processes_search_as_one_does(four: Any) -> None:
    single = own.by_hand()
    for shared in four:
        assert_searched_alike(shared["attached after"], single)
        assert shared["attached after"]["share of a block's weights here"] < 0.3


@pytest.mark.parametrize("name", own.ORDERS)
def test_a_merge_into_shards_computes_the_same_and_is_undone_bit_for_bit(name: str, two: Any) -> None:
    for shared in two:
        torch.testing.assert_close(shared[name]["merged"], shared[name]["logits"], rtol=0, atol=1e-5)
        assert not torch.equal(shared[name]["merged"], shared[name]["logits"])
        assert torch.equal(shared[name]["unmerged"], shared[name]["logits"])
        assert shared[name]["drift"] < 1e-4


@pytest.mark.parametrize("name", own.POLICIES)
def test_what_learns_stays_in_float32_under_every_policy(name: str, two: Any) -> None:
    for shared in two:
        assert shared[f"policy {name}"]["types"] == {torch.float32}
        assert torch.isfinite(shared[f"policy {name}"]["loss"])


def test_a_trainer_that_accelerate_shards_trains_what_one_process_does(two: Any, tmp_path: Path) -> None:
    model, data = gated_classifier({"a": 3, "b": 2}), own.labelled([12, 12], [3, 2])
    single = {
        "classifier": own.trainer_outcome(own.through_accelerate(tmp_path / "classifier", model, data)),
        "saving": own.trainer_outcome(own.through_accelerate(tmp_path / "causal", gated_causal(), continued(24))),
    }
    for shared in two:
        for name, wanted in single.items():
            assert shared[name]["kept"] == wanted["kept"]
            assert shared[name]["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
            assert_same(shared[name]["state"], wanted["state"], rtol=1e-3, atol=1e-4)


def test_both_processes_hold_the_same_bits(two: Any) -> None:
    for name in ("classifier", "saving"):
        assert_same(two[0][name]["state"], two[1][name]["state"])


def test_a_run_resumed_from_a_sharded_checkpoint_continues_bit_for_bit(two: Any) -> None:
    for shared in two:
        for step in (2, 6):  # before the prune and after it
            assert_same(shared[f"resumed {step}"]["state"], shared["saving"]["state"])
            assert shared[f"resumed {step}"]["losses"] == shared["saving"]["losses"]


def test_four_processes_resume_what_two_have_saved(two: Any, four: Any) -> None:
    for shared in four:
        assert shared["resumed 2"]["kept"] == two[0]["saving"]["kept"]
        assert_same(shared["resumed 2"]["state"], two[0]["saving"]["state"], rtol=1e-3, atol=1e-4)


def test_checkpoints_hold_what_is_trained_alone(two: Any, folder: Path) -> None:
    checkpoint = folder / "saving" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "optimizer_0", "structure.json"} <= names
    assert not any("pytorch_model" in name for name in names)


def test_what_a_sharded_run_saves_loads_on_one_process(two: Any, folder: Path) -> None:
    rows = own.labelled([12, 12], [3, 2])[:4]
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask", "task_ids")}
    logits = []
    for place in ("compact 2", "by the trainer 2", "classifier/checkpoint-8"):
        model = own.gated_classifier({"a": 3, "b": 2})
        ga.detach(model)
        ga.load_adapters(model, folder / place)
        with torch.no_grad():
            logits.append(model.eval()(**batch).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits[2], logits[0], rtol=0, atol=1e-6)
    assert (folder / "peft 2" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", own.SCORES)
def test_masks_of_a_sharded_model_are_those_of_one_process_bit_for_bit(kind: str, two: Any, four: Any) -> None:
    single = own.masks(kind)
    for shared in (*two, *four):
        assert_same(shared[f"mask {kind}"]["scores"], single["scores"])
        assert shared[f"mask {kind}"]["mask"] == single["mask"]


@pytest.mark.parametrize("count", [2, 4])
def test_a_sharded_delta_tunes_what_one_process_does(count: int, two: Any, four: Any) -> None:
    single = own.tuned()
    for shared in two if count == 2 else four:
        assert_same(shared["tuned"]["values"], single["values"], rtol=1e-3, atol=1e-4)
        assert_same(shared["tuned"]["written"], shared["tuned"]["values"])
        torch.testing.assert_close(shared["tuned"]["logits"], single["logits"], rtol=0, atol=1e-3)
        assert shared["tuned"]["restored"]
        assert shared["tuned"]["share of the values here"] < 1.1 / count


@pytest.mark.parametrize("count", [2, 4])
def test_a_selective_trainer_is_sharded_by_accelerate(
    count: int, two: Any, four: Any, folder: Path, tmp_path: Path
) -> None:
    single, every = own.tuned_by_trainer(tmp_path), two if count == 2 else four
    for shared in every:
        assert_same(shared["tuned by the trainer"], single, rtol=1e-3, atol=1e-4)
        assert_same(shared["tuned by the trainer"], every[0]["tuned by the trainer"])
    model, _ = tiny("llama", head="lm")
    loaded = ga.load_delta(model, folder / f"tuned on {count}" / "checkpoint-4")
    assert_same({name: part.values.detach() for name, part in loaded.items()}, every[0]["tuned by the trainer"])


def test_a_delta_resumes_bit_for_bit_and_on_another_number_of_processes(two: Any, four: Any) -> None:
    for shared in two:
        assert_same(shared["tuned, resumed"], two[0]["tuned by the trainer"])
    for shared in four:
        assert_same(shared["tuned, resumed"], two[0]["tuned by the trainer"], rtol=1e-3, atol=1e-4)


def test_a_sharded_probe_allocates_what_one_process_does(two: Any, four: Any) -> None:
    single = own.allocated()
    assert [shared["allocated"] for shared in (*two, *four)] == [single] * 6


def test_two_groups_at_once_are_two_trials_of_one_study(tmp_path: Path, on_processes: Callable[..., None]) -> None:
    study = optuna.create_study(study_name="rates", storage=open_storage(tmp_path / "study.journal"))
    for rate in trial_processes.RATES:
        study.enqueue_trial({"rate": rate})
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as launches:
        list(launches.map(partial(on_processes, Path(trial_processes.__file__)), folders))
    found = {trial.params["rate"]: trial.value for trial in study.trials}
    wanted = {rate: trial_processes.outcome(rate) for rate in trial_processes.RATES}
    assert found == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted[1e-2] - wanted[1e-3]) > 1e-4


def test_what_accelerate_launches_on_cpus_is_not_sharded_and_says_so(tmp_path: Path, free_port: int) -> None:
    words = ["launch", "--config_file", EXAMPLES / "fsdp2.yaml", "--num_processes", 2, "--main_process_port", free_port]
    command = map(str, [*words, Path(own.__file__).with_name("launched.py"), tmp_path / "out"])
    program = "accelerate.commands.accelerate_cli"
    printed = processes.run(processes.module, program, *command, log=tmp_path / "log")
    assert "here every process holds the whole model" in printed
    model, _ = tiny("llama", head="lm")
    ga.load_adapters(model, tmp_path / "out")


def test_the_example_of_shards_runs_on_two_processes(tmp_path: Path, on_processes: Callable[..., None]) -> None:
    on_processes(EXAMPLES / "sharded.py", tmp_path)
    ga.load_adapters(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_a_joint_artefact_loads_onto_shards(two: Any, folder: Path) -> None:
    single = own.joint(folder)
    for shared in two:
        torch.testing.assert_close(shared["joint"], single, rtol=0, atol=1e-5)


def test_a_classifier_with_a_frozen_head_is_trained_alike(two: Any, tmp_path: Path) -> None:
    single = own.frozen_head(tmp_path)
    assert [shared["frozen head"] for shared in two] == [pytest.approx(single, rel=1e-4)] * 2


@pytest.mark.skipif(not own.HAS_4_BITS, reason="bitsandbytes is not installed; see the extra 'quantised'")
def test_a_backbone_in_4_bits_is_trained_alike(two: Any, folder: Path, tmp_path: Path) -> None:
    single = own.in_4_bits(folder, tmp_path)
    assert single["losses"][-1] < single["losses"][0]
    for shared in two:
        assert shared["4 bits"]["losses"] == pytest.approx(single["losses"], rel=1e-4)
        assert_same(shared["4 bits"]["state"], single["state"], rtol=1e-3, atol=1e-4)


MESSAGES = {
    "other data": "differ in the number of training examples",
    "other seeds": "differ in the seed",
    "other rates": "differ in learning_rate",
    "other weights": "differ in the values of the adapters",
    "other libraries": "differ in the release of torch",
    "no disk on the first": "a part of it is a file|Not a directory",
    "no disk on the second": "a part of it is a file|Not a directory",
    "disk full on the second": "cannot write the checkpoint",
    "saved without a disk": "cannot write the folder",
    "a checkpoint of one process": "resume without FSDP",
    "tensor parallel": "tensor-parallel",
    "wrapped": "attach before accelerator.prepare",
    "changed on one": "changed from outside between steps",
    "masked before sharding": "apply the mask when the model is sharded",
    "8 bits": "cannot shard these quantised weights",
    "attached after 4 bits were sharded": "attach first, then shard",
}
if not own.HAS_4_BITS:
    del MESSAGES["8 bits"], MESSAGES["attached after 4 bits were sharded"]


@pytest.mark.parametrize("name", MESSAGES)
def test_what_cannot_work_ends_with_the_same_error_on_every_process(name: str, two: Any) -> None:
    for shared in two:
        assert re.search(MESSAGES[name], shared[name]), shared[name]


def test_a_checkpoint_that_one_process_could_not_write_is_not_taken_for_whole(two: Any, folder: Path) -> None:
    checkpoint = folder / "full disk" / "checkpoint-2"
    assert (checkpoint / "rng_state_0.pth").is_file()  # the first process was done
    with pytest.raises(TrainingError, match="cannot be read"):
        check_resumable(str(checkpoint), sharded=True)


def test_deepspeed_is_refused_by_name_with_what_to_do() -> None:
    model, _ = tiny("llama", head="lm")
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(AttachError, match=r"DeepSpeed ZeRO-3(.|\n)*FSDP2"):
        ga.attach(model, own.SPACE)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"DeepSpeed(.|\n)*FSDP2"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"FSDP of the first version(.|\n)*fsdp_version: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "cpu_ram_efficient_loading: false",
        ),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, r"2 processes of one launch(.|\n)*use_cpu=True"),
    ],
)
def test_launchers_that_gated_models_cannot_follow_are_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, args = gated_causal(), own.arguments(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=message):
        ga.GatedTrainer(model, args, train_dataset=continued(4))
