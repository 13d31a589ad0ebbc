"""Scores against gradients taken by autograd, one example or batch at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import gatedadapters as ga
from gatedadapters.errors import ArtifactError, MaskError
from gatedadapters.masking.scores import Score, register, score_class
from gatedadapters.masking.scores.losses import output_norms, task_losses
from gatedadapters.masking.scores.refreshed import Refreshed
from gatedadapters.masking.scores.synaptic import Synaptic
from gatedadapters.testing import tiny
from gatedadapters.testing.score_contract import scored

Batches = list[dict[str, Tensor]]


def in_double(model: Any) -> Any:
    """In float64, where experts run as a loop: their fused product knows no float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


def one_at_a_time(model: nn.Module, batches: Batches, loss: Any, reduce: Any) -> dict[str, Tensor]:
    """The mean over examples of `reduce(gradient)`, every example in a pass of its own."""
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    examples = 0
    for batch in batches:
        for index in range(len(batch["labels"])):
            losses = loss(model, {key: value[index : index + 1] for key, value in batch.items()})
            grads = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
            examples += 1
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    sums[name] += reduce(grad)
    return {name: value / examples for name, value in sums.items()}


def assert_close(found: ga.Scores, wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        error = (found[name] - value).abs().max()
        assert error <= tolerance * value.max() + 1e-20, f"{name}: {float(error):.2e}"


FAMILIES = (
    "bert",
    "electra",
    "deberta_v2",
    "modernbert",
    "albert",
    "gpt2",
    "opt",
    "bloom",
    "llama",
    "gemma2",
    "mixtral",
    "gpt_oss",
    "mamba",
    "t5",
    "bart",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_is_the_mean_square_of_each_examples_gradient(family: str) -> None:
    model, batches = scored(family, batches=1)
    in_double(model)
    found = ga.score(model, batches, kind="fisher", heads=())
    assert_close(found, one_at_a_time(model, batches, task_losses, torch.square), 1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "albert", "mixtral"])
def test_fisher_needs_no_loop_over_examples_for_dense_models(family: str) -> None:
    model, batches = scored(family, batches=1)
    singly = ga.score(in_double(model), batches, kind="fisher", heads=()).record.details["one_by_one"]
    assert bool(singly) == (family == "mixtral"), singly
    assert all("experts" in name or "gate" in name for name in singly)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_mas_is_the_mean_size_of_each_examples_output_gradient(family: str) -> None:
    model, batches = scored(family)
    model.double()
    found = ga.score(model, batches, kind="mas", heads=())
    assert_close(found, one_at_a_time(model, batches, output_norms, torch.abs), 1e-7)
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    assert_close(ga.score(model, unlabelled, kind="mas", heads=()), {n: found[n] for n in found.names})


def test_fisher_of_a_classifier_does_not_depend_on_how_examples_are_batched() -> None:
    model, _ = tiny("bert", head="classification")
    model.double()
    ids = torch.randint(3, 99, (6, 8))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(6) % 3}
    whole = ga.score(model, [data], kind="fisher")
    pieces = ga.score(model, [{k: v[i : i + 2] for k, v in data.items()} for i in (0, 2, 4)], kind="fisher")
    assert not any(name.startswith("classifier") for name in whole.names)
    assert_close(pieces, {name: whole[name] for name in whole.names}, 1e-7)
    assert_close(
        whole,
        {n: v for n, v in one_at_a_time(model, [data], task_losses, torch.square).items() if n in whole.names},
        1e-7,
    )


def test_taylor_is_the_mean_effect_over_batches() -> None:
    model, batches = scored("llama")
    model.double()
    found = ga.score(model, batches, kind="taylor", heads=())
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        task_losses(model, batch).mean().backward()
        for name, p in model.named_parameters():
            wanted[name] += (p * p.grad).abs().detach() / len(batches)
    model.zero_grad()
    assert_close(found, wanted)


def test_synaptic_is_what_each_element_contributed_over_the_way_it_went() -> None:
    model, batches = scored("bert")
    model.double()
    found = ga.score(model, batches, kind=Synaptic(learning_rate=0.5), heads=())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    fall = {name: torch.zeros_like(p) for name, p in start.items()}
    for batch in batches:
        model.zero_grad()
        task_losses(model, batch).mean().backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.grad is not None:
                    fall[name] += 0.5 * p.grad**2
                    p -= 0.5 * p.grad
    now = dict(model.named_parameters())
    wanted = {n: (fall[n] / ((now[n] - start[n]) ** 2 + 0.1)).detach() for n in start}
    assert_close(found, wanted, 1e-7)


def test_magnitude_and_random_need_no_data() -> None:
    model, _ = tiny("bert")
    sizes = ga.score(model, kind="magnitude")
    assert all(torch.equal(sizes[name], p.abs()) for name, p in model.named_parameters())
    chance = ga.score(model, kind="random", seed=3)
    some = ga.score(model, kind="random", seed=3, include=["q"])
    assert all(torch.equal(some[name], chance[name]) for name in some.names)
    other = ga.score(model, kind="random", seed=4)
    assert not torch.equal(other[some.names[0]], chance[some.names[0]])
    values = torch.cat([chance[name].flatten() for name in chance.names])
    assert float(values.min()) > 0
    assert abs(float(values.mean()) - 0.5) < 0.01


def test_answer_only_labels_score_the_answer_alone() -> None:
    model, batches = scored("llama", batches=1)
    batch = batches[0]
    torch.testing.assert_close(
        task_losses(model, {k: v[:1] for k, v in batch.items()})[0], model(**{k: v[:1] for k, v in batch.items()}).loss
    )
    changed = {**batch, "labels": batch["labels"].clone()}
    changed["labels"][:, :2] = 7  # the first of them is never predicted, the second is
    assert not torch.equal(task_losses(model, batch), task_losses(model, changed))


def test_a_model_that_reads_pictures_predicts_the_next_token_too() -> None:
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 50,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    model = Gemma3ForConditionalGeneration(config).eval()
    ids = torch.randint(5, 45, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids, token_type_ids=torch.zeros_like(ids)).loss
        found = task_losses(model, {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
    torch.testing.assert_close(found, own[None])


def test_a_parameter_used_by_its_parent_or_several_times_is_found_out() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.b(torch.tanh(self.a(x))))
            return nn.functional.linear(hidden, self.a.weight * 0.5)

    model = Odd().double()
    batch = {"x": torch.randn(5, 4, dtype=torch.float64)}
    loss = lambda m, b: m(b["x"]).square().sum(1)  # noqa: E731
    found = ga.score(model, [batch], kind="fisher", loss=loss)
    wanted = one_at_a_time(model, [{**batch, "labels": batch["x"]}], loss, torch.square)
    assert_close(found, wanted)
    assert found.record.details["one_by_one"] == ["a.weight"]


class Experts(nn.Module):
    """Each token goes to one of two experts, which sees all of its tokens in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        out = x.clone()
        for number, expert in enumerate(self.experts):
            chosen = kind == number
            if chosen.any():
                out[chosen] = expert(x[chosen])
        return out.flatten(1)


@pytest.mark.parametrize("seed", range(3))
def test_experts_that_get_no_token_at_first_are_scored_all_the_same(seed: int) -> None:
    torch.manual_seed(seed)
    model = Experts().double()
    kinds = torch.zeros(3, 4, 6, dtype=torch.int64)
    kinds[1, 2:] = torch.randint(0, 2, (2, 6))  # not the two examples that are compared
    kinds[2] = torch.randint(0, 2, (4, 6))
    batches = [{"x": torch.randn(4, 6, 4, dtype=torch.float64), "kind": kind} for kind in kinds]
    loss = lambda m, b: m(b["x"], b["kind"]).square().sum(1)  # noqa: E731
    found = ga.score(model, batches, kind="fisher", loss=loss)
    wanted = one_at_a_time(model, [{**batch, "labels": batch["x"]} for batch in batches], loss, torch.square)
    assert_close(found, wanted)
    assert len(found.record.details["one_by_one"]) == 4


def test_gradients_need_memory_for_one_tensor_at_a_time() -> None:
    model, batches = scored("llama", batches=1)
    held = []

    class Watching(score_class("taylor")):  # type: ignore[misc]
        kind = "watching"

        def _add(self, run: Any, name: str, grad: Tensor) -> None:
            held.append([n for n, p in run.parameters.items() if p.grad is not None])

        def finish(self, run: Any) -> None:
            next(iter(run.totals.values())).fill_(1.0)

    ga.score(model, batches, kind=Watching(), heads=())
    assert len(held) == len(list(model.parameters()))
    assert held == [[]] * len(held)


def test_bad_requests_are_refused_by_name(tmp_path: Any) -> None:
    model, batches = scored("bert", batches=1)
    with pytest.raises(MaskError, match="no such score"):
        ga.score(model, batches, kind="tailor")
    with pytest.raises(MaskError, match="matches no parameter"):
        ga.score(model, batches, include=["elephants"])
    with pytest.raises(MaskError, match="labels"):
        ga.score(model, [{"input_ids": batches[0]["input_ids"]}])
    ignored = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    with pytest.raises(MaskError, match="all scores are 0"):
        ga.score(model, [ignored], spill=tmp_path / "scores")
    assert not (tmp_path / "scores").exists()
    model.bert.encoder.layer[0].output.dense.weight = nn.Parameter(
        torch.zeros(32, 64, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(MaskError, match="floating-point"):
        ga.score(model, batches, kind="magnitude")


def test_damaged_scores_are_refused(tmp_path: Any) -> None:
    model, _ = tiny("bert")
    ga.score(model, kind="magnitude").save(tmp_path / "scores")
    with pytest.raises(ArtifactError, match="already holds"):
        ga.score(model, kind="random", spill=tmp_path / "scores")
    shard = next((tmp_path / "scores").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="safetensors"):
        ga.Scores.load(tmp_path / "scores")
    with pytest.raises(ArtifactError, match="not a set of saved scores"):
        ga.Scores.load(tmp_path)


def test_a_score_of_ones_own_is_registered_by_its_kind() -> None:
    from gatedadapters.masking import scores as package

    class Depth(Score):
        """Later tensors matter more."""

        kind = "depth"
        needs_data = False

        def batch(self, run: Any, batch: Any) -> None:
            for index, total in enumerate(run.totals.values()):
                total.fill_(float(index))

    register(Depth)
    try:
        model, _ = tiny("bert")
        found = ga.score(model, kind="depth")
        assert float(found[found.names[-1]].max()) == len(found) - 1
    finally:
        package._KINDS.pop("depth")


def test_consistency_is_the_product_of_the_mean_gradients_of_two_halves() -> None:
    model = in_double(tiny("llama", head="lm")[0])
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 20, (2, 6), generator=generator)} for _ in range(5)]
    found = ga.score(model, batches, kind="consistency")
    parameters = dict(model.named_parameters())
    halves = []
    for half in (batches[::2], batches[1::2]):
        loss = torch.stack([task_losses(model, b).mean() for b in half]).mean()
        halves.append(torch.autograd.grad(loss, list(parameters.values())))
    products = {name: a * b for name, a, b in zip(parameters, *halves, strict=True)}
    assert any(bool((product < 0).any()) for product in products.values())
    assert_close(found, {name: product.clamp(min=0) for name, product in products.items()}, tolerance=1e-6)
    with pytest.raises(MaskError, match="at least two batches"):
        ga.score(model, batches[:1], kind="consistency")


def test_a_refreshed_score_is_that_of_the_tuned_model_and_belongs_to_the_backbone() -> None:
    model, batch = tiny("llama", head="lm")
    batches = [{"input_ids": batch["input_ids"]}]
    mask = ga.select(ga.score(model, batches, kind="fisher"), protect=0.8)
    delta = ga.apply_mask(model, mask)
    with pytest.raises(MaskError, match="is in a model"):
        Refreshed(delta)
    optimizer = torch.optim.SGD(delta.parameters(), lr=1.0)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    delta.remove()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = ga.score(model, batches, kind=Refreshed(delta, "fisher"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    again = ga.select(found, protect=0.8)
    delta.reapply(model)
    delta.merge()
    assert_close(found, {name: ga.score(model, batches, kind="fisher")[name] for name in found.names}, tolerance=1e-6)
    assert again != mask
    fresh, _ = tiny("llama", head="lm")
    ga.apply_mask(fresh, again)
    with pytest.raises(MaskError, match="does not fit"):
        ga.score(tiny("bert", head="base")[0], batches, kind=Refreshed(delta))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_the_loss_of_a_language_model_is_that_of_the_next_token_whatever_wraps_it() -> None:
    peft = pytest.importorskip("peft")
    model, sample = tiny("llama", head="lm")
    batch = {"input_ids": sample["input_ids"][:1], "labels": sample["input_ids"][:1]}
    with torch.no_grad():
        wanted = model(**batch).loss
        mine = type("MyModel", (type(model),), {})(model.config)
        mine.load_state_dict(model.state_dict())
        compiled = torch.compile(model, backend="eager")
        for wrapped in (model, mine.eval(), compiled, peft.get_peft_model(model, peft.LoraConfig(r=1))):
            torch.testing.assert_close(task_losses(wrapped, batch)[0], wanted)
