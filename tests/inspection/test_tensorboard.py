"""What TensorBoard reads back is what the gates did."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerControl, TrainerState, TrainingArguments

import gatedadapters as ga
from gatedadapters.inspection import TensorBoardInspector, TensorBoardWriter
from gatedadapters.testing.backbones import tiny

STEPS = 12
SCHEDULE = ga.Schedule(warmup=0.1, ramp=0.5, prune=0.7)  # the ninth step ends with the prune


class Batches(Dataset[dict[str, torch.Tensor]]):
    """Two tasks by turns: does token 5 occur, does token 6."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(7, 30, (8,), generator=torch.Generator().manual_seed(index))
        label = index // 2 % 2
        if label:
            ids[index % 8] = 5 + index % 2
        return {"input_ids": ids, "task_ids": torch.tensor(index % 2), "labels": torch.tensor(label)}


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "images", "tensors", "histograms"), 0)
    )
    return events.Reload()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventAccumulator, ga.Adapters]:
    """A short search over two tasks, inspected."""
    folder = tmp_path_factory.mktemp("run")
    model = ga.MultiTaskClassifier(tiny("bert")[0], {"five": 2, "six": 2})
    adapters = ga.attach(model, "encoder-mixed", tasks=("five", "six"))
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_steps=5,
        disable_tqdm=True,
    )
    trainer = ga.GatedTrainer(
        model=model,
        args=args,
        train_dataset=Batches(),
        budget=ga.Budget(fraction=0.25, per_task=0.2),
        schedule=SCHEDULE,
        callbacks=[TensorBoardInspector(folder / "runs", maps=4, share=1e9)],
    )
    trainer.train()
    return read(folder / "runs"), adapters


def test_every_place_has_its_open_probability_over_time_grouped_by_block(
    run: tuple[EventAccumulator, ga.Adapters],
) -> None:
    events, adapters = run
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("open block")]
    assert adapters.structure is not None
    cells = adapters.structure.grid()[2]
    assert sorted(tags) == sorted(f"open block {block}/{column}" for block, column in cells)
    first = {tag: events.Scalars(tag)[0].value for tag in tags}
    assert all(0.9 < value < 1 for value in first.values())
    for tag in tags:
        values = events.Scalars(tag)
        assert [event.step for event in values] == [*range(10), STEPS]  # not while nothing can move
        assert all(0 <= event.value <= 1 for event in values)
    for (block, column), (kept, of) in cells.items():
        assert math.isclose(events.Scalars(f"open block {block}/{column}")[-1].value, kept / of, abs_tol=1e-6)


def test_expected_cost_is_written_beside_the_target_it_is_held_to(
    run: tuple[EventAccumulator, ga.Adapters],
) -> None:
    events, adapters = run
    assert adapters.bank is not None
    dense = adapters.bank.dense_cost()
    target = [event.value for event in events.Scalars("gates/target")]
    assert target[0] == pytest.approx(dense)
    assert target[-1] == pytest.approx(0.25 * dense)
    cost, real = ([event.value for event in events.Scalars(f"gates/{kind}_cost")] for kind in ("expected", "real"))
    assert cost[0] > 0.9 * dense
    assert real[0] == pytest.approx(dense)
    assert adapters.structure is not None
    assert cost[-1] == real[-1] == adapters.structure.params <= 0.25 * dense
    for tag in ("gates/closed_paths", "open task/five", "open task/six"):
        assert len(events.Scalars(tag)) > 5
    terms = [tag for tag in events.Tags()["scalars"] if tag.startswith("penalty/")]
    assert sorted(terms) == [
        *("penalty/budget", "penalty/cap", "penalty/multiplier", "penalty/multiplier five", "penalty/multiplier six")
    ]
    for tag in terms:
        assert max(event.value for event in events.Scalars(tag)) > 0
    mix = [tag for tag in events.Tags()["scalars"] if tag.startswith("path mix/")]
    assert len(mix) > 2
    shares = [[event.value for event in events.Scalars(tag)] for tag in mix]
    assert np.sum(shares, 0) == pytest.approx(1.0)
    assert all(event.value > 0 for event in events.Scalars("time/step"))


def test_gates_are_drawn_while_they_learn_and_their_log_alpha_is_counted(
    run: tuple[EventAccumulator, ga.Adapters],
) -> None:
    events, adapters = run
    assert adapters.bank is not None
    steps = [0, 2, 4, 6, 8, 9, STEPS]
    for tag in ("open/five", "open/six", "path mix/by block"):
        assert [event.step for event in events.Images(tag)] == steps
    for task in ("five", "six"):
        found = events.Histograms(f"log alpha/{task} rank")
        assert [event.step for event in found] == steps
        levels = [name[0] for name in adapters.bank.gate_names]
        assert found[0].histogram_value.num == levels.count("rank")
        low, high = adapters.bank.config.bounds
        assert low <= found[-1].histogram_value.min <= found[-1].histogram_value.max <= high


def test_the_structure_is_shown_at_checkpoints_that_change_it_and_when_pruned(
    run: tuple[EventAccumulator, ga.Adapters],
) -> None:
    events, adapters = run
    images = events.Images("structure/kept")
    assert [event.step for event in images] == [5, 9]  # the checkpoint of the tenth step and the end add nothing
    picture = Image.open(io.BytesIO(images[0].encoded_image_string))
    assert picture.size[0] > 300
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert [event.step for event in events.Images("structure/changed")] == [9]
    (text,) = events.Tensors("structure/diff/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert all(re.fullmatch(r" {4}([-+~] \S+ \(.*\d+\)|\.\.\. and .*)", line) for line in lines)
    assert adapters.structure is not None
    assert events.Scalars("structure/params")[-1].value == adapters.structure.params


def test_the_trainers_own_values_stand_in_the_same_run_once(
    run: tuple[EventAccumulator, ga.Adapters],
) -> None:
    scalars = run[0].Tags()["scalars"]
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= set(scalars)
    assert not [tag for tag in scalars if tag.startswith("train/gates")]


def test_custom_charts_name_tags_that_exist(run: tuple[EventAccumulator, ga.Adapters]) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    events = run[0]
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(content)
    patterns = [tag for group in layout.category for chart in group.chart for tag in chart.multiline.tag]
    tags = events.Tags()["scalars"]
    assert patterns
    assert all(any(re.fullmatch(pattern, tag) for tag in tags) for pattern in patterns)
    assert [chart.title for chart in layout.category[1].chart] == [f"open block {i}" for i in range(4)]


def test_many_places_are_averaged(tmp_path: Path) -> None:
    adapters = ga.attach(tiny("bert")[0], "encoder-mixed", penalty=ga.L0(weight=0.1))
    with TensorBoardWriter(tmp_path, max_tags=10) as writer:
        writer.gates(adapters, 0)
    tags = read(tmp_path).Tags()["scalars"]
    assert [tag for tag in tags if tag.startswith("open block/")] == [f"open block/{i}" for i in range(4)]
    assert len([tag for tag in tags if tag.startswith("open place/")]) == 27
    assert not [tag for tag in tags if tag.startswith("open block 0")]
    assert "penalty/L0" in tags


@pytest.mark.parametrize(("share", "most"), [(1e9, 5), (1e-9, 2)])
def test_writes_are_bounded_in_number_and_in_time(share: float, most: int, tmp_path: Path) -> None:
    adapters = ga.attach(tiny("bert")[0], "encoder-mixed")
    adapters.set_penalty(ga.L0(weight=0.1), schedule=ga.Schedule(prune=None), total_steps=100)
    inspector = TensorBoardInspector(tmp_path, writes=5, maps=2, share=share)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    state, control = TrainerState(max_steps=100, is_world_process_zero=True), TrainerControl()
    inspector.on_train_begin(args, state, control, model=adapters.model)
    for state.global_step in range(1, 100):
        inspector.on_step_begin(args, state, control)
        inspector.on_step_end(args, state, control)
    assert inspector.tb_writer is not None
    inspector.tb_writer.close()
    events = read(tmp_path)
    assert len(events.Scalars("gates/expected_cost")) == most
    assert len(events.Images("open/default")) <= 3


def test_a_place_is_open_where_any_task_has_it_open(tmp_path: Path) -> None:
    adapters = ga.attach(tiny("bert")[0], "attention-only", tasks=("one", "two"))
    bank = adapters.bank
    assert bank is not None
    with torch.no_grad():
        bank.log_alpha.normal_(0, 2)
        first, second = bank.open_probability()
    with TensorBoardWriter(tmp_path) as writer:
        writer.gates(adapters, 0)
    events = read(tmp_path)
    key = "encoder/layer/1/attention/self/query:lora"
    expected = (1 - (1 - first) * (1 - second))[bank.slices[key]].mean()
    assert events.Scalars("open block 1/attn.q lora")[0].value == pytest.approx(float(expected), abs=1e-6)
    shares = bank.expected_task_cost().detach() / bank.dense_cost()
    assert events.Scalars("open task/two")[0].value == pytest.approx(float(shares[1]), abs=1e-6)


def test_compact_adapters_have_a_picture_and_no_gates(tmp_path: Path) -> None:
    adapters = ga.attach(tiny("bert")[0], "lora-all-linear")
    structure = adapters.compact(adapters.discretize(ga.Budget(fraction=0.5)))
    with TensorBoardWriter(tmp_path) as writer:
        writer.gates(adapters, 3)
        writer.structure(structure, 3)
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {"structure/params", "structure/paths"}
    assert len(events.Images("structure/kept")) == 1


def test_a_writer_given_stays_open_for_its_owner(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as run:
        with TensorBoardWriter(run) as writer:
            writer.scalars({"a": 1.0}, 0)
        run.add_scalar("b", 2.0, 0)
    assert read(tmp_path).Tags()["scalars"] == ["a", "b"]


def test_a_mask_is_shown_by_role_whether_given_or_trained(tmp_path: Path) -> None:
    model = tiny("bert")[0]
    mask = ga.select(ga.score(model, kind="random"), protect=0.9, contrast=0.0, include=["up", "q"])
    with TensorBoardWriter(tmp_path / "a") as writer:
        writer.mask(mask)
    ga.apply_mask(model, mask)
    inspector = TensorBoardInspector(tmp_path / "b")
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    state, control = TrainerState(max_steps=10, is_world_process_zero=True), TrainerControl()
    inspector.on_train_begin(args, state, control, model=model)
    inspector.on_step_begin(args, state, control)
    inspector.on_step_end(args, state, control)
    inspector.on_log(args, state, control, logs={"loss": 1.0})
    inspector.on_train_end(args, state, control)
    for folder in ("a", "b"):
        events = read(tmp_path / folder)
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("mask/")]
        assert sorted(tags) == ["mask/q", "mask/up"]
        sizes = {"q": 3 * 32 * 32, "up": 3 * 32 * model.config.intermediate_size}
        found = sum(events.Scalars(f"mask/{role}")[0].value * size for role, size in sizes.items())
        assert found == pytest.approx(mask.count())
        assert len(events.Images("mask/free")) == 1
    assert {"train/loss", "time/step"} <= set(read(tmp_path / "b").Tags()["scalars"])


def test_a_matrix_that_is_not_square_is_refused(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer, pytest.raises(ga.errors.DataError, match="one row and one column"):
        writer.matrix(["a", "b"], np.zeros((2, 3)))
