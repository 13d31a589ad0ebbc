"""Two processes that share the batch train what one process with the whole batch does, gates included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import assert_same
from scales import MODELS, search
from two_processes import PLAIN, PROBED, SCENARIOS, plain_loop, scenario


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, on_processes: Callable[..., None]
) -> dict[str, list[dict[str, Any]]]:
    """What each rank ended with, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    on_processes(Path(__file__).with_name("two_processes.py"), folder)
    scales = [f"{name} in {pieces}" for name in MODELS for pieces in (1, 2)]
    return {
        name: [torch.load(folder / f"{name} of rank {rank}.pt", weights_only=False) for rank in (0, 1)]
        for name in (*SCENARIOS, PLAIN, PROBED, *scales)
    }


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_agree_bit_for_bit(name: str, outcomes: Any) -> None:
    first, second = outcomes[name]
    if first is None:
        pytest.skip("this release of transformers cannot resume on several CPU processes")
    assert_same(second["state"], first["state"])
    assert second["structure"] == first["structure"]
    for (noise, gradient), (other_noise, other_gradient) in zip(
        *(o["noise and gradient"] for o in (first, second)), strict=True
    ):
        assert torch.equal(noise, other_noise)
        assert gradient is other_gradient is None or torch.equal(gradient, other_gradient)


@pytest.mark.parametrize("name", ["classifier", "causal", "accumulated", "all closed", "all closed but heads"])
def test_two_processes_train_what_one_with_the_whole_batch_does(name: str, outcomes: Any, tmp_path: Path) -> None:
    single = scenario(name, tmp_path, processes=1)
    shared = outcomes[name][0]
    assert shared["structure"] == single["structure"]
    assert_same(shared["state"], single["state"], rtol=1e-3, atol=1e-5)
    assert shared["losses"] == pytest.approx(single["losses"], rel=1e-4)
    if not name.startswith("all closed"):
        assert single["structure"] is not None


@pytest.mark.parametrize("name", ["all closed", "all closed but heads"])
def test_steps_in_which_every_path_is_closed_neither_hang_nor_fail(name: str, outcomes: Any) -> None:
    steps = len(outcomes[name][0]["noise and gradient"])
    assert steps == 12
    assert 0 < outcomes[name][0]["steps with everything closed"] < steps


@pytest.mark.parametrize("name", ["resumed 4", "resumed 6"])
def test_a_run_resumed_on_two_processes_continues_bit_for_bit(name: str, outcomes: Any) -> None:
    if outcomes[name][0] is None:
        pytest.skip("this release of transformers cannot resume on several CPU processes")
    assert_same(outcomes[name][0]["state"], outcomes["resumed 0"][0]["state"])
    assert outcomes[name][0]["structure"] == outcomes["resumed 0"][0]["structure"]


@pytest.mark.parametrize("name", ["classifier", "causal", "accumulated"])
def test_two_processes_prune_at_the_end_of_the_same_step(name: str, outcomes: Any) -> None:
    first, second = (outcome["fixed"] for outcome in outcomes[name])
    assert first == second == [False] * 4 + [True] * 4  # 0.6 of 8 steps


def test_two_processes_prune_to_the_bits_of_one_process(outcomes: Any) -> None:
    single = plain_loop(processes=1)
    assert single["structure"] is not None
    for shared in outcomes[PLAIN]:
        assert shared["fixed"] == single["fixed"] == [False] * 5 + [True] * 5
        assert shared["structure"] == single["structure"]
        assert shared["losses"] == single["losses"]
        assert_same(shared["state"], single["state"])


def test_two_processes_start_from_the_gates_and_the_size_that_both_found(outcomes: Any) -> None:
    first, second = outcomes[PROBED]
    for name in ("fraction", "within"):
        assert not torch.equal(first[f"{name} here"], second[f"{name} here"])  # each probes its own batches
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[f"{name} learnt"], second[f"{name} learnt"])
        assert first[name].std() > 0
    assert first["size"] == second["size"]


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_have_the_gradients_of_one_whatever_the_loss_is_divided_by(
    name: str, pieces: int, outcomes: Any, tmp_path: Path
) -> None:
    single = search(name, tmp_path, batch=8, pieces=1)
    for shared in outcomes[f"{name} in {pieces}"]:
        assert shared["structure"] == single["structure"]
        for here, there in zip(shared["gradients"], single["gradients"], strict=True):
            assert_same(here, there, rtol=1e-5, atol=1e-5)
