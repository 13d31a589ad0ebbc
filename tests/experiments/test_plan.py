"""A plan from Python counts what attaching makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoModel, LlamaConfig

import gatedadapters as ga
from gatedadapters import experiments
from gatedadapters.errors import ConfigError
from gatedadapters.experiments.run_plan import build_on_meta


@pytest.mark.parametrize("tasks", [1, 3])
def test_a_plan_counts_what_attaching_makes(encoder: Path, tasks: int) -> None:
    found = experiments.plan(encoder, "encoder-mixed", tasks=tasks)
    model = AutoModel.from_pretrained(encoder)
    adapters = ga.attach(model, "encoder-mixed", tasks=[f"task {i}" for i in range(tasks)])
    assert adapters.bank is not None
    assert found.paths == len(adapters.paths)
    assert found.units == adapters.bank.n_units
    assert found.gates == adapters.bank.log_alpha.numel()
    assert found.params == adapters.bank.dense_cost()
    assert sum(place.params for place in found.places.values()) == found.params
    if tasks == 1:
        assert found.params == sum(p.numel() for p in adapters.weight_parameters())


def test_planning_allocates_no_weights(encoder: Path) -> None:
    assert {parameter.device.type for parameter in build_on_meta(str(encoder)).parameters()} == {"meta"}


def test_a_plan_takes_a_model_at_hand_or_its_name(encoder: Path) -> None:
    by_name = experiments.plan(encoder, "encoder-mixed", budget=ga.Budget(fraction=0.5))
    model = AutoModel.from_pretrained(encoder)
    assert experiments.plan(model, ga.SearchSpace.load("encoder-mixed"), budget=ga.Budget(fraction=0.5)) == by_name
    assert by_name.budget is not None
    assert by_name.budget.limit == by_name.params / 2
    assert by_name.to_data()["budget"]["bytes"] == {"fp32": 2 * by_name.params, "bf16": by_name.params}
    assert str(by_name).count(by_name.table()) == 1


def test_a_budget_in_flops_has_no_size_on_disk(encoder: Path) -> None:
    found = experiments.plan(encoder, "encoder-mixed", budget=ga.Budget(flops=5000))
    assert found.budget is not None
    assert found.budget.bytes is None
    assert "flops per token" in str(found.budget)
    assert "saved:" not in str(found.budget)


def test_a_plan_for_no_task_is_refused(encoder: Path) -> None:
    with pytest.raises(ConfigError, match="one task or more"):
        experiments.plan(encoder, "encoder-mixed", tasks=0)


def test_a_plan_for_several_processes_shares_the_weights_and_repeats_the_adapters(encoder: Path) -> None:
    alone = experiments.plan(str(encoder), "encoder-mixed", tokens=100)
    shared = experiments.plan(str(encoder), "encoder-mixed", processes=4, tokens=100)
    one, each = alone.memory_of_a_process["fp32"], shared.memory_of_a_process["fp32"]
    assert each["weights"] == -(-one["weights"] // 4)
    assert one["weights gathered"] == 0 < each["weights gathered"] < 3 * one["weights"]
    assert each["adapters and gates"] == one["adapters and gates"]
    assert each["gradients"] == 2 * one["gradients"]
    assert one["total"] == alone.memory["fp32"]["total"] + one["activations"]
    assert each["activations, checkpointed"] < each["activations"] == one["activations"]
    assert "memory of each of 4 processes" in str(shared)
    assert "processes" not in str(alone)


def test_a_plan_of_wide_blocks_tells_what_each_of_64_processes_holds(tmp_path: Path) -> None:
    width, inner, blocks, words, keys = 16384, 53248, 8, 128256, 1024  # a few blocks of Llama-3.1-405B
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "vocab_size": words}
    heads = {"num_attention_heads": 128, "num_key_value_heads": 8}
    LlamaConfig(**shape, **heads, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    found = experiments.plan(tmp_path, "decoder-mixed", processes=64, tokens=4096)
    each = found.memory_of_a_process["bf16"]
    block = 2 * width * width + 2 * width * keys + 3 * width * inner + 2 * width
    outside = 2 * words * width + width
    assert found.weights == blocks * block + outside
    assert each["weights"] == found.weights * 2 // 64
    assert each["weights gathered"] == 2 * (3 * block + outside)
    assert each["AdamW"] == 8 * (found.params + found.gates)
    read_and_returned = 6 * width + 2 * keys + 3 * (width + inner)
    assert each["activations"] == 4096 * (2 * blocks * read_and_returned + 12 * words)
    assert each["total, checkpointed"] < each["total"]
    assert re.search(r"memory of each of 64 processes, 4,096 tokens each(.|\n)*total, checkpointed", str(found))


@pytest.mark.parametrize("name", ["processes", "tokens"])
def test_a_plan_for_no_process_or_no_token_is_refused(encoder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name}"):
        experiments.plan(str(encoder), "encoder-mixed", **{name: 0})
