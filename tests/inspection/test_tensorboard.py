"""What TensorBoard reads back is what the gates did."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainingArguments

import gatedadapters as ga
from gatedadapters.inspection import GateWriter, TensorBoardInspector
from gatedadapters.testing.backbones import tiny

STEPS = 12


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
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
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
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = ga.GatedTrainer(
        model=model,
        args=args,
        train_dataset=Batches(),
        budget=ga.Budget(fraction=0.25),
        callbacks=[TensorBoardInspector(folder / "runs", writes=STEPS)],
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
        assert [event.step for event in values][:3] == [1, 2, 3]
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
    cost = [event.value for event in events.Scalars("gates/expected_cost")]
    assert cost[0] > 0.9 * dense
    assert cost[-1] <= 0.25 * dense
    for tag in ("gates/penalty", "gates/multiplier", "gates/open_paths", "open task/five", "open task/six"):
        assert len(events.Scalars(tag)) > 5
    assert max(event.value for event in events.Scalars("gates/multiplier")) > 0


def test_the_structure_is_an_image_when_pruned_and_at_the_end(
    run: tuple[EventAccumulator, ga.Adapters],
) -> None:
    images = run[0].Images("structure/kept")
    assert [event.step for event in images][-1] == STEPS
    assert len(images) == 2
    assert 0 <= images[0].step - (ga.Schedule().prune or 0) * STEPS <= 3  # logged every third step
    picture = Image.open(io.BytesIO(images[0].encoded_image_string))
    assert picture.size[0] > 300
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


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
    assert [chart.title for chart in layout.category[1].chart] == [f"open block {i}" for i in range(3)]


def test_many_places_are_averaged_and_writes_are_bounded(tmp_path: Path) -> None:
    adapters = ga.attach(tiny("bert")[0], "encoder-mixed", penalty=ga.L0(weight=0.1))
    with SummaryWriter(tmp_path) as writer:
        gates = GateWriter(adapters, writer, max_tags=10)
        gates.layout()
        gates.scalars(0)
    tags = read(tmp_path).Tags()["scalars"]
    assert [tag for tag in tags if tag.startswith("open block/")] == [f"open block/{i}" for i in range(3)]
    assert len([tag for tag in tags if tag.startswith("open place/")]) == 12
    assert not [tag for tag in tags if tag.startswith("open block 0")]
    inspector = TensorBoardInspector(tmp_path / "b", writes=5)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    from transformers import TrainerControl, TrainerState

    state, control = TrainerState(max_steps=100, is_world_process_zero=True), TrainerControl()
    model = adapters.model
    inspector.on_train_begin(args, state, control, model=model)
    for state.global_step in range(1, 100):
        inspector.on_log(args, state, control, logs={"loss": 1.0}, model=model)
    assert inspector.tb_writer is not None
    inspector.tb_writer.close()
    assert len(read(tmp_path / "b").Scalars("gates/expected_cost")) <= 6


def test_a_place_is_open_where_any_task_has_it_open(tmp_path: Path) -> None:
    adapters = ga.attach(tiny("bert")[0], "attention-only", tasks=("one", "two"))
    bank = adapters.bank
    assert bank is not None
    with torch.no_grad():
        bank.log_alpha.normal_(0, 2)
        first, second = bank.open_probability()
    with SummaryWriter(tmp_path) as writer:
        GateWriter(adapters, writer).scalars(0)
    events = read(tmp_path)
    key = "encoder/layer/1/attention/self/query:lora"
    expected = (1 - (1 - first) * (1 - second))[bank.slices[key]].mean()
    assert events.Scalars("open block 1/attn.q lora")[0].value == pytest.approx(float(expected), abs=1e-6)
    shares = bank.expected_task_cost().detach() / bank.dense_cost()
    assert events.Scalars("open task/two")[0].value == pytest.approx(float(shares[1]), abs=1e-6)


def test_compact_adapters_have_a_picture_and_no_gates(tmp_path: Path) -> None:
    adapters = ga.attach(tiny("bert")[0], "lora-all-linear")
    structure = adapters.compact(adapters.discretize(ga.Budget(fraction=0.5)))
    with SummaryWriter(tmp_path) as writer:
        gates = GateWriter(adapters, writer)
        gates.layout()
        gates.scalars(3)
        gates.picture(structure, 3)
    events = read(tmp_path)
    assert events.Tags()["scalars"] == []
    assert len(events.Images("structure/kept")) == 1
