"""Sparse deltas: gradients, freezing, removal, everything that a model may do meanwhile."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from masked_recipes import assert_same_bits, loss_of, masked, random_mask, snapshot, train
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gatedadapters as ga
from gatedadapters.errors import AttachError, MaskError, TrainingError
from gatedadapters.testing import FAMILIES, tiny


def dense_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What autograd says of every element."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss_of(model, batch).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_gradients(delta: ga.SparseDelta, wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, part in delta.items():
        expected = part.pattern.gather(wanted[name]).to(part.values)
        got = torch.zeros_like(expected) if part.values.grad is None else part.values.grad
        error = (got - expected).abs().max()
        assert error <= tolerance * max(1e-6, float(wanted[name].abs().max())), f"{name}: {float(error):.2e}"


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_selected_elements_get_the_gradient_that_autograd_gives_them(family: str) -> None:
    model, batch = tiny(family)
    wanted = dense_gradients(copy.deepcopy(model), batch)
    model.requires_grad_(False)  # a matrix that needs a gradient may be multiplied in another order
    with torch.no_grad():
        output = model(**batch)[0]
    delta = ga.apply_mask(model, random_mask(model), heads=())
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], output), "the forward pass has changed"
    loss_of(model, batch).backward()
    assert_gradients(delta, wanted, 1e-5)


@pytest.mark.parametrize("density", [0.03, 0.5])
def test_sampled_and_gathered_gradients_agree_in_float64(density: float) -> None:
    for family in ("llama", "gpt2", "mixtral"):
        model, batch = tiny(family)
        if family == "mixtral":
            model.set_experts_implementation("eager")
        model.double()
        wanted = dense_gradients(copy.deepcopy(model), batch)
        delta = ga.apply_mask(model, random_mask(model, density), heads=())
        assert all(p.dtype == torch.float64 for p in delta.parameters())
        loss_of(model, batch).backward()
        assert_gradients(delta, wanted, 1e-12)


def test_every_kind_of_use_is_seen() -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4, padding_idx=0)
            self.linear, self.conv1d, self.norm = nn.Linear(4, 4), Conv1D(4, 4), nn.LayerNorm(4)
            self.conv = nn.Conv1d(4, 4, 3, padding=1, groups=2)
            self.free = nn.Parameter(torch.randn(4, 4))
            self.experts = nn.Parameter(torch.randn(3, 4, 4))
            self.twice = nn.Linear(4, 4)
            self.twice.weight = self.linear.weight

        def forward(self, ids: Tensor) -> tuple[Tensor]:
            x = self.norm(self.table(ids))
            x = self.linear(x) + self.conv1d(x) + self.conv(x.mT).mT + x @ self.free
            x = torch.tanh(x) + nn.functional.linear(x, self.linear.weight * 2, self.linear.bias) + self.twice(x)
            x = x + torch.stack([nn.functional.linear(x, self.experts[i]) for i in (0, 2, -1)]).sum(0)
            x = x + x @ self.experts[torch.tensor(1)] + torch.matmul(x[0], self.experts[torch.tensor([0, 1])]).sum(0)
            return (nn.functional.linear(x, self.table.weight),)

    torch.manual_seed(0)
    model = Uses().double()
    batch = {"ids": torch.tensor([[1, 2, 2, 0, 7], [0, 0, 3, 1, 8]])}
    wanted = dense_gradients(copy.deepcopy(model), batch)
    for density in (0.05, 0.6):
        delta = ga.apply_mask(model, random_mask(model, density, seed=4))
        loss_of(model, batch).backward()
        assert_gradients(delta, wanted, 1e-12)
        delta.remove()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_give_the_same_gradients(use_reentrant: bool) -> None:
    from gatedadapters.testing.helpers import checkpoint_activations

    for family in ("llama", "gpt2"):
        model, batch = tiny(family)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        names = {
            n for n, _ in model.named_parameters() if "embed" not in n and "wte" not in n and "wpe" not in n
        }  # no gradient but the blocks' own
        delta = ga.apply_mask(model.train(), random_mask(model, names=names), heads=())
        loss_of(model, batch).backward()
        plain = {n: p.grad.clone() for n, p in delta.named_parameters() if p.grad is not None}
        delta.zero_grad()
        checkpoint_activations(model, use_reentrant=use_reentrant)
        loss_of(model, batch).backward()
        for name, parameter in delta.named_parameters():
            if name in plain:
                torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_to_the_batch() -> None:
    model, batch, delta = masked("llama")
    loss_of(model, batch).backward()
    whole = [p.grad.clone() for p in delta.parameters()]
    delta.zero_grad()
    output = torch.randn(model(**batch)[0].shape, generator=torch.Generator().manual_seed(2))
    for i in range(2):
        piece = model(**{k: v[i : i + 1] for k, v in batch.items()})[0]
        (piece * output[i : i + 1]).sum().div(output.numel() ** 0.5).backward()
    for got, want in zip(delta.parameters(), whole, strict=True):
        torch.testing.assert_close(got.grad, want, rtol=1e-4, atol=1e-6)


def test_bf16_weights_have_fp32_values_in_which_small_steps_add_up() -> None:
    model, batch, delta = masked("llama", dtype=torch.bfloat16)
    assert {p.dtype for p in delta.parameters()} == {torch.float32}
    before, values = snapshot(model), [p.detach().clone() for p in delta.parameters()]
    optimizer = torch.optim.SGD(delta.parameters(), lr=1.0)
    for _ in range(64):
        for parameter in delta.parameters():
            parameter.grad = torch.full_like(parameter, -(2.0**-14))  # far below what bf16 resolves near 1
        optimizer.step()
    for parameter, old in zip(delta.parameters(), values, strict=True):
        torch.testing.assert_close(parameter.detach(), old + 64 * 2.0**-14)
    for part in delta.parts():
        assert torch.equal(part.pattern.gather(part.weight), part.values.bfloat16())
    loss_of(model, batch).backward()
    delta.remove()
    assert_same_bits(model, before)


def test_autocast_computes_what_the_frozen_model_computes_and_gradients_are_close() -> None:
    model, batch = tiny("llama")
    wanted = dense_gradients(copy.deepcopy(model), batch)
    with torch.autocast("cpu", torch.bfloat16):
        plain = copy.deepcopy(model).requires_grad_(False)(**batch)[0]
    delta = ga.apply_mask(model, random_mask(model), heads=())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**batch)[0], plain)
        loss = loss_of(model, batch)
    loss.backward()
    assert_gradients(delta, wanted, 0.1)


# -- freezing and removal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "steps"), [("llama", 200), ("bert", 10), ("gpt2", 10), ("mixtral", 10)])
def test_core_elements_and_after_removal_all_have_the_same_bits_after_steps_with_decay(family: str, steps: int) -> None:
    model, batch = tiny(family)
    before = snapshot(model)
    mask = random_mask(model)
    delta = ga.apply_mask(model, mask, heads=())
    assert [p for p in model.parameters() if p.requires_grad] == list(delta.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)  # given everything
    train(model, delta, batch, optimizer, steps=steps)
    after = snapshot(model)
    moved = 0
    for name in mask.names:
        core = ~mask.dense(name)
        assert torch.equal(after[name][core], before[name][core]), name
        moved += int((after[name] != before[name]).sum())
    assert moved > 0.9 * mask.count()
    delta.remove()
    assert_same_bits(model, before)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.get_parameter(mask.names[0])) is nn.Parameter
    assert not any("LiveWeight" in str(type(v)) for m in model.modules() for v in vars(m).values())


def test_a_masked_step_equals_the_step_of_full_training_on_what_is_selected() -> None:
    model, batch, delta = masked("llama")
    full, _ = tiny("llama")
    oracle = torch.optim.SGD(full.parameters(), lr=0.1, momentum=0.9)
    ours = torch.optim.SGD(delta.parameters(), lr=0.1, momentum=0.9)
    start = snapshot(full)
    for _ in range(3):
        for optimizer, m in ((oracle, full), (ours, model)):
            optimizer.zero_grad()
            loss_of(m, batch).backward()
            optimizer.step()
        with torch.no_grad():  # what is not selected is put back by hand
            for name, p in full.named_parameters():
                free = delta.mask.dense(name) if name in delta.mask.names else torch.zeros(p.shape, dtype=torch.bool)
                p.copy_(torch.where(free, p, start[name]))
    for (name, p), (_, q) in zip(full.named_parameters(), model.named_parameters(), strict=False):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
        lambda p: torch.optim.LBFGS(list(p), lr=1e-3, max_iter=3),
    ],
)
def test_any_optimiser_moves_the_weights_that_are_used(make: Any) -> None:
    model, batch, delta = masked("llama")
    optimizer = make(delta.parameters())
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert losses[-1] < losses[0]
    for part in delta.parts():
        assert torch.equal(part.pattern.gather(part.weight), part.values)
    if isinstance(optimizer, torch.optim.LBFGS):
        assert len(set(losses)) >= len(losses) - 2  # each evaluation within a step saw other weights


def test_optimiser_state_and_clipping_are_those_of_the_values() -> None:
    model, batch, delta = masked("llama")
    optimizer = train(model, delta, batch)
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if v.dim())
    assert held == 2 * delta.params
    loss_of(model, batch).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert float(norm) > 1e-3
    total = torch.cat([p.grad for p in delta.parameters()]).norm()
    torch.testing.assert_close(total, torch.tensor(1e-3), rtol=1e-2, atol=0)


def test_remove_and_reapply_and_switch_are_exact() -> None:
    model, batch = tiny("llama")
    before = snapshot(model)
    outputs, deltas, states = [], [], []
    for seed in (0, 1):
        delta = ga.apply_mask(model, random_mask(model, seed=seed), heads=())
        train(model, delta, batch)
        outputs.append(model(**batch)[0].detach())
        states.append(snapshot(model))
        with delta.disabled():
            assert_same_bits(model, before)
        assert_same_bits(model, states[-1])
        delta.remove()
        assert_same_bits(model, before)
        deltas.append(delta)
    for index in (1, 0, 1):
        deltas[index].reapply(model)
        assert_same_bits(model, states[index])
        assert torch.equal(model(**batch)[0], outputs[index])
        loss_of(model, batch).backward()
        deltas[index].remove()
    deltas[0].reapply(model)
    assert deltas[0].merge() is model
    assert_same_bits(model, states[0])
    assert not deltas[0].applied
    with pytest.raises(MaskError, match="another backbone"):
        deltas[1].reapply(model)


def test_a_delta_goes_into_the_same_backbone_in_lower_precision() -> None:
    model, batch, delta = masked("llama")
    train(model, delta, batch)
    delta.remove()
    rounded = tiny("llama")[0].to(torch.bfloat16)
    before = snapshot(rounded)
    delta.reapply(rounded)
    assert {p.dtype for p in delta.parameters()} == {torch.float32}
    loss_of(rounded, batch).backward()
    delta.remove()
    assert_same_bits(rounded, before)


def test_saved_deltas_come_back_bit_for_bit_and_small(tmp_path: Any) -> None:
    model, batch = tiny("bert", head="classification")
    mask = ga.select(ga.score(model, kind="random"), density=0.02)
    delta = ga.apply_mask(model, mask)
    assert set(delta.head_names) == {"classifier.weight", "classifier.bias"}
    train(model, delta, batch, torch.optim.AdamW(model.parameters(), lr=1e-2))
    delta.save(tmp_path / "delta")
    output = model(**batch)[0]
    fresh, _ = tiny("bert", head="classification")
    nn.init.normal_(fresh.classifier.weight)  # a head of another seed
    loaded = ga.load_delta(fresh, tmp_path / "delta")
    assert torch.equal(fresh(**batch)[0], output)
    assert loaded.mask == mask
    assert ga.Mask.load(tmp_path / "delta") == mask
    assert (loaded.mask.roles, loaded.mask.origin) == ({n: mask.roles[n] for n in loaded.mask.names}, mask.origin)
    assert ga.get_delta(fresh) is loaded
    payload = mask.nbytes + 4 * delta.params
    assert payload <= 5.1 * delta.params
    train(fresh, loaded, batch)
    loaded.remove()
    other, _ = tiny("bert", head="classification", seed=1)
    with pytest.raises(MaskError, match="another backbone"):
        ga.load_delta(other, tmp_path / "delta")
    with pytest.raises(ga.errors.ArtifactError, match="already holds"):
        delta.save(tmp_path / "delta")
    (tmp_path / "delta" / "values.safetensors").write_bytes(b"\x80\x04")
    with pytest.raises(ga.errors.ArtifactError, match="cannot be read"):
        ga.load_delta(fresh, tmp_path / "delta")
    assert not hasattr(fresh, "sparse_delta")


# -- what a model may do meanwhile -------------------------------------------------------------------------------------


def test_a_deep_copy_and_a_pickle_have_a_delta_of_their_own() -> None:
    model, batch, delta = masked("gpt2")
    train(model, delta, batch)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        before, own = snapshot(model), ga.get_delta(twin)
        assert own is not delta
        train(twin, own, batch)
        assert_same_bits(model, before)
        assert any(not torch.equal(a, b) for a, b in zip(own.parameters(), delta.parameters(), strict=True))
        base = snapshot(own.remove())
        with delta.disabled():
            assert_same_bits(model, base)


def test_a_state_dict_round_trip_resumes_and_a_foreign_one_is_refused() -> None:
    model, batch, delta = masked("llama")
    base = snapshot(model)
    train(model, delta, batch)
    state = copy.deepcopy(model.state_dict())
    backbone_keys = {k for k in state if "sparse_delta" not in k}
    assert backbone_keys == base.keys()
    twin, _, own = masked("llama")
    twin.load_state_dict(state)
    assert torch.equal(twin(**batch)[0], model(**batch)[0])
    train(twin, own, batch, steps=1)
    train(model, delta, batch, steps=1)
    twin.load_state_dict(base, strict=False)  # the base's weights: the delta stays on top
    own.check()
    other, _ = tiny("llama", seed=1)
    with pytest.raises(TrainingError, match="changed from outside"):
        twin.load_state_dict(other.state_dict(), strict=False)


def test_casting_the_model_keeps_values_in_fp32() -> None:
    model, batch, delta = masked("llama")
    train(model, delta, batch)
    model.to(torch.bfloat16)
    assert {p.dtype for p in delta.parameters()} == {torch.float32}
    train(model, delta, batch)
    base, _ = tiny("llama")
    delta.remove()
    assert_same_bits(model, snapshot(base.to(torch.bfloat16)))


@pytest.mark.parametrize("how", ["add", "data", "set", "tie"])
def test_a_parameter_changed_from_outside_is_an_error_before_the_next_step(how: str) -> None:
    model, batch, delta = masked("llama")
    optimizer = train(model, delta, batch)
    values = [p.detach().clone() for p in delta.parameters()]
    layer = model.layers[0].mlp.up_proj
    loss_of(model, batch).backward()
    if how == "add":
        with torch.no_grad():
            layer.weight.add_(1.0)
    elif how == "data":
        layer.weight.data.mul_(2.0)
    else:
        layer.weight = (
            nn.Parameter(layer.weight.detach().clone())
            if how == "set"
            else model.layers[1].mlp.up_proj._parameters["weight"]
        )
    with pytest.raises(TrainingError, match=r"layers\.0\.mlp\.up_proj"):
        optimizer.step()
    assert all(torch.equal(p, v) for p, v in zip(delta.parameters(), values, strict=True)), "half a step was taken"
    with pytest.raises(TrainingError):
        delta.remove()
    assert delta.applied


def test_compiling_is_refused() -> None:
    model, batch, delta = masked("llama")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(TrainingError, match="not compiled"):
        compiled(**batch)
    delta.merge()


def test_generation_and_evaluation_use_the_tuned_weights() -> None:
    model, batch, delta = masked("llama", head="lm")
    train(model, delta, batch, steps=20)
    merged = copy.deepcopy(model)
    ga.get_delta(merged).merge()
    for run in (model, merged):
        run.generation_config.pad_token_id = 0
    ids = batch["input_ids"][:, :4]
    assert torch.equal(
        model.generate(ids, max_new_tokens=5, do_sample=False), merged.generate(ids, max_new_tokens=5, do_sample=False)
    )
    with torch.inference_mode():
        assert torch.equal(model(**batch)[0], merged(**batch)[0])


def test_beside_adapters_both_learn_and_both_come_out() -> None:
    model, batch = tiny("bert")
    before = snapshot(model)
    adapters = ga.attach(model, "lora-all-linear", batch, penalty=ga.L0(weight=1.0))
    delta = ga.apply_mask(model, random_mask(tiny("bert")[0]), heads=())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in (*adapters.parameters(), *delta.parameters())}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(model.train(), batch) + adapters.penalty()).backward()
        optimizer.step()
    assert torch.cat([p.grad for p in delta.parameters() if p.grad is not None]).count_nonzero() > 0.5 * delta.params
    delta.remove()
    ga.detach(model)
    assert_same_bits(model, before)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_bad_requests_leave_the_model_as_it_was() -> None:
    model, batch = tiny("bert")
    before = snapshot(model)
    mask = random_mask(model)
    with pytest.raises(MaskError, match="another backbone"):
        ga.apply_mask(tiny("bert", seed=1)[0], mask)
    with pytest.raises(MaskError, match="lacks parameters"):
        ga.apply_mask(tiny("gpt2")[0], mask)
    with pytest.raises(MaskError, match="selects nothing"):
        ga.apply_mask(model, mask - mask)
    with pytest.raises(AttachError):
        ga.apply_mask(model, mask, heads=["elephant"])
    with pytest.raises(MaskError, match="trained in full"):
        ga.apply_mask(
            model,
            ga.Mask.build(
                model,
                {"pooler.dense.bias": torch.tensor([0])},
                heads=frozenset(n for n, _ in model.named_parameters() if n.startswith("pooler")),
            ),
            heads=["pooler"],
        )
    assert_same_bits(model, before)
    assert all(p.requires_grad for p in model.parameters())
    delta = ga.apply_mask(model, mask)
    with pytest.raises(AttachError, match="already"):
        ga.apply_mask(model, mask)
    with pytest.raises(AttachError, match="already"):
        delta.reapply(model)
    with pytest.raises(MaskError, match="delta in it"):
        ga.score(model, [batch])
    delta.remove()
    with pytest.raises(AttachError, match="in no model"):
        delta.remove()
    with pytest.raises(AttachError, match="no sparse delta"):
        ga.get_delta(model)


def test_quantised_and_integer_weights_are_refused() -> None:
    class Quantised(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)

    for dtype in (torch.int8, torch.float8_e4m3fn):
        model = Quantised(dtype)
        mask = ga.Mask.build(model, {"weight": torch.tensor([1, 2])})
        with pytest.raises(MaskError, match="floating-point"):
            ga.apply_mask(model, mask)
