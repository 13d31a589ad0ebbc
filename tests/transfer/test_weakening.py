"""Knowledge masking and dropping: exact semantics against blocks written out by hand, and what must not change."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from blocks import ORACLES, bart_encoder, moe
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import gatedadapters as ga
from gatedadapters.errors import AttachError, ConfigError, LayoutError
from gatedadapters.masking import Mask
from gatedadapters.testing.backbones import FAMILIES, tiny
from gatedadapters.transfer import feed_forwards, restore_knowledge, weakening
from gatedadapters.transfer.weakening import masked

P_DROP, P_MASK = 0.5, 0.3


def without_dropout(model: nn.Module) -> nn.Module:
    """In training mode, where only the weakening is random."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "attention_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


# -- the blocks, written out, against the library -------------------------------------------------------------------


def written_out(family: str, model: nn.Module, blocks: list[str], p_drop: float, p_mask: float) -> nn.Module:
    """A copy of the model whose blocks are the functions above, drawing as the library documents it."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())

    def mask(a: Tensor) -> Tensor:
        return a * masked(torch.ones_like(a), p_mask) if p_mask else a

    def forward(block: nn.Module, oracle: Callable[..., Any], x: Tensor, *args: Any, **kw: Any) -> Any:
        drop = p_drop > 0 and bool(torch.rand(()) < p_drop)
        return oracle(block, x, drop, mask, *args, **kw)

    for name in blocks:
        modules[name].forward = partial(forward, modules[name], ORACLES[family])  # type: ignore[method-assign]
    return model


def gradients(model: nn.Module, batch: dict[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    output = model(**batch)[0]
    model.zero_grad()
    output.square().sum().backward()
    return output, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", ORACLES)
def test_weakened_model_equals_its_blocks_written_out(family: str) -> None:
    model, batch = tiny(family)
    without_dropout(model)
    if ORACLES[family] is not moe:  # grouped products of experts know no double precision
        model.double()
    blocks = list(dict.fromkeys(place.block for place in feed_forwards(model, batch)))
    p_mask = 0.0 if ORACLES[family] is moe else P_MASK
    oracle = written_out(family, model, blocks, P_DROP, p_mask)
    seen: set[bool] = set()
    with ga.weaken_knowledge(model, batch, drop=P_DROP, mask=p_mask) as handle:
        for seed in range(4):
            output, grads = gradients(model, batch, seed)
            expected, expected_grads = gradients(oracle, batch, seed)
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(grads, expected_grads)
            seen |= set(handle.dropped.values())
    assert seen == {True, False}


def test_bart_skips_its_norm_after_the_addition_too() -> None:
    model, batch = tiny("bart")
    encoder = without_dropout(model.get_encoder()).double()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    oracle = copy.deepcopy(encoder)
    for block in oracle.layers:
        block.forward = lambda x, *a, block=block, **kw: bart_encoder(
            block, x, bool(torch.rand(()) < P_DROP), lambda a: a, *a, **kw
        )
    with ga.weaken_knowledge(encoder, inputs, drop=P_DROP):
        for seed in range(4):
            torch.testing.assert_close(gradients(encoder, inputs, seed), gradients(oracle, inputs, seed))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "jamba", "llama", "bert", "modernbert"])
def test_masked_neurons_are_those_the_down_projection_reads(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny(family)
    without_dropout(model)
    oracle = copy.deepcopy(model)
    for _, sublayer, linear in ga.discover(model, batch).maps():
        if sublayer.kind == "feed_forward" and linear.role == "down":
            weight = dict(oracle.named_modules())[linear.name].get_parameter(linear.parameter)
            with torch.no_grad():
                weight[..., :10] = 0  # (out, in), or experts (e, out, in): the first ten neurons

    def fixed(inner: Tensor, share: float, *, rescale: bool) -> Tensor:
        return inner * (torch.arange(inner.shape[-1]) >= 10)

    monkeypatch.setattr(weakening, "masked", fixed)
    with ga.weaken_knowledge(model, batch, mask=0.5, drop=0.0):
        torch.testing.assert_close(model(**batch)[0], oracle(**batch)[0])


# -- the draws -------------------------------------------------------------------------------------------------------


def test_masking_is_independent_for_each_example_token_and_neuron() -> None:
    share, shape = 0.3, (40, 30, 50)
    torch.manual_seed(3)
    kept = (masked(torch.ones(shape), share) != 0).double()
    assert stats.binomtest(int(kept.sum()), kept.numel(), 1 - share).pvalue > 1e-3
    for dim in range(3):  # the means along each dimension spread as those of independent draws do
        means = kept.mean([d for d in range(3) if d != dim])
        n = kept.numel() // len(means)
        z = (means - (1 - share)) / (share * (1 - share) / n) ** 0.5
        assert 1e-3 < stats.chi2.sf(float(z.square().sum()), len(z)) < 1 - 1e-3
        a, b = kept.select(dim, 0).flatten(), kept.select(dim, 1).flatten()
        assert stats.pearsonr(a.numpy(), b.numpy()).pvalue > 1e-3
    assert not torch.equal(masked(torch.ones(shape), share) != 0, kept.bool())  # redrawn


def test_masking_does_not_rescale_but_as_an_ablation() -> None:
    a = torch.rand(8, 16) + 1
    torch.manual_seed(0)
    plain = masked(a, 0.25)
    torch.manual_seed(0)
    scaled = masked(a, 0.25, rescale=True)
    assert set((plain / a).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(scaled, plain / 0.75)


@pytest.mark.parametrize("function", [F.gelu, F.silu, F.relu, torch.exp, lambda x: F.silu(x) * x, lambda x: x[:4]])
def test_masking_gives_the_values_and_gradients_of_a_product(function: Callable[[Tensor], Tensor]) -> None:
    """Also where it changes its input, and where it must not: a ReLU reads its output, a view is somebody else's."""
    x = torch.randn(8, 16, requires_grad=True)
    before = x.detach().clone()
    found = []
    for mask in (lambda a: a * masked(torch.ones_like(a), 0.25), lambda a: masked(a, 0.25)):
        torch.manual_seed(0)
        value = mask(function(x))
        found.append((value.detach(), *torch.autograd.grad((value * torch.arange(16)).sum(), x)))
    for expected, got in zip(*found, strict=True):
        assert torch.equal(expected, got)
    assert torch.equal(x.detach(), before)


def test_dropping_draws_once_for_each_block_and_forward() -> None:
    model, batch = tiny("llama")
    model.train()
    batch = {"input_ids": batch["input_ids"].repeat(3, 1)}
    hits = []
    with ga.weaken_knowledge(model, drop=0.3) as handle:
        for _ in range(300):
            with torch.no_grad():
                model(**batch)
            hits.append([handle.dropped[f"layers.{i}"] for i in range(3)])
    table = torch.tensor(hits, dtype=torch.float64)
    assert all(stats.binomtest(int(n), 300, 0.3).pvalue > 1e-3 for n in table.sum(0))
    assert stats.pearsonr(table[:, 0].numpy(), table[:, 1].numpy()).pvalue > 1e-3
    assert stats.pearsonr(table[1:, 0].numpy(), table[:-1, 0].numpy()).pvalue > 1e-3


def test_a_shared_block_draws_at_each_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny("albert")
    draws = []
    real = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: draws.append(1) or real(*a, **k))
    with ga.weaken_knowledge(model, batch, drop=0.3):
        model.train()(**batch)
    assert len(draws) == 4


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rescaling_divides_what_stays(family: str) -> None:
    model, batch = tiny(family)
    without_dropout(model).double()
    scaled = copy.deepcopy(model)
    modules = dict(scaled.named_modules())
    for place in feed_forwards(model, batch):
        modules[place.writer].register_forward_hook(lambda m, a, out: out / (1 - P_DROP))
    with ga.weaken_knowledge(model, batch, drop=P_DROP, rescale=True), ga.weaken_knowledge(scaled, batch, drop=P_DROP):
        for seed in range(3):
            torch.testing.assert_close(gradients(model, batch, seed), gradients(scaled, batch, seed))


# -- what must not change --------------------------------------------------------------------------------------------


NO_FEED_FORWARD = ("mamba", "mamba2", "falcon_mamba", "zamba2")
NO_MASK = ("gpt_oss", "jetmoe", "lfm2_moe")  # the inner activation passes through no module


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*NO_FEED_FORWARD, *NO_MASK)])
def test_evaluation_is_untouched_and_removal_complete(family: str) -> None:
    model, batch = tiny(family)
    before = model(**batch)[0]
    keys, hooks = list(model.state_dict()), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = torch.get_rng_state()
    with ga.weaken_knowledge(model, batch, mask=0.5, drop=0.9) as handle:
        assert torch.equal(model(**batch)[0], before)
        assert list(model.state_dict()) == keys
    assert handle.removed
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize(
    ("family", "name"),
    [(f, "layers.0.mlp") for f in ("llama", "gemma2", "mixtral")] + [("bert", "encoder.layer.0.output.dense")],
)
def test_a_sub_layer_called_by_itself_in_evaluation_is_untouched_by_the_last_draw(family: str, name: str) -> None:
    model, batch = tiny(family)
    norms = feed_forwards(model, batch)[0].norms
    called = [model.get_submodule(part) for part in (name, *norms)]
    given = [torch.randn(2, 5, 64 if family == "bert" else 32), *(torch.randn(2, 5, 32) for _ in norms)]
    before = [module(value) for module, value in zip(called, given, strict=True)]
    with ga.weaken_knowledge(model, batch, drop=0.999) as handle:
        model.train()(**batch)
        assert all(handle.dropped.values())
        model.eval()
        for module, value, expected in zip(called, given, before, strict=True):
            torch.testing.assert_close(module(value), expected, rtol=0, atol=0)


def test_rescaling_a_normed_contribution_divides_what_the_norm_returns() -> None:
    """Before the norm it would change nothing."""
    model, batch = tiny("gemma2")
    without_dropout(model).double()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for layer in plain.layers:  # y (1 + w) / (1 - p)
            layer.post_feedforward_layernorm.weight.add_(1).div_(1 - P_DROP).sub_(1)
    with ga.weaken_knowledge(model, batch, drop=P_DROP, rescale=True), ga.weaken_knowledge(plain, batch, drop=P_DROP):
        for seed in range(3):
            torch.testing.assert_close(gradients(model, batch, seed)[0], gradients(plain, batch, seed)[0])


def test_a_ramp_that_has_not_begun_draws_nothing() -> None:
    model, batch = tiny("llama")
    model.train()
    expected = gradients(model, batch, 0)
    after = torch.rand(1)
    ramp = ga.Ramp(end=0.4, begin=0.5)
    with ga.weaken_knowledge(model, batch, mask=ramp, drop=ramp, total_steps=10):
        found = gradients(model, batch, 0)
        assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_masked_backbone_is_weakened_like_a_plain_one() -> None:
    model, batch = tiny("llama")
    without_dropout(model)
    plain = copy.deepcopy(model)
    names = ("layers.1.mlp.up_proj.weight", "layers.2.self_attn.q_proj.weight")
    chosen = {name: torch.arange(0, 40, 3) for name in names}
    delta = ga.apply_mask(model, Mask.build(model, chosen))
    options = {"mask": P_MASK, "drop": P_DROP}
    with ga.weaken_knowledge(model, batch, **options), ga.weaken_knowledge(plain, batch, **options):
        for seed in range(4):
            output = gradients(model, batch, seed)[0]
            expected, every = gradients(plain, batch, seed)
            torch.testing.assert_close(output, expected)
            for name, part in delta.items():
                torch.testing.assert_close(part.values.grad, every[name].flatten()[chosen[name]])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_probability_zero_changes_neither_values_nor_random_numbers(family: str) -> None:
    model, batch = tiny(family)
    model.train()
    expected = gradients(model, batch, 0)
    after = torch.rand(1)
    with ga.weaken_knowledge(model, batch, mask=0.0, drop=0.0):
        found = gradients(model, batch, 0)
        assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_checkpointing_replays_the_draws(family: str, reentrant: bool) -> None:
    model, batch = tiny(family)
    without_dropout(model).double()
    checkpointed = copy.deepcopy(model)
    enable: Any = (
        getattr(checkpointed, "activation_checkpointing_enable", None) or checkpointed.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})
    checkpointed.get_input_embeddings().register_forward_hook(
        lambda m, a, out: out.requires_grad_() if out.is_leaf else out
    )
    with (
        ga.weaken_knowledge(model, batch, mask=P_MASK, drop=P_DROP),
        ga.weaken_knowledge(checkpointed, batch, mask=P_MASK, drop=P_DROP),
    ):
        for seed in range(4):
            found, expected = gradients(checkpointed, batch, seed), gradients(model, batch, seed)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["llama", "bert", "gemma2", "qwen2_moe"])
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_no_dtype_changes(family: str, precision: str) -> None:
    model, batch = tiny(family)
    without_dropout(model)
    if precision == "bfloat16":
        model.bfloat16()
    dtypes: list[list[torch.dtype]] = [[], []]

    def record(into: list[torch.dtype]) -> None:
        handles = [
            module.register_forward_hook(
                lambda m, a, out: into.append((out if isinstance(out, Tensor) else out[0]).dtype)
            )
            for name, module in model.named_modules()
            if name.count(".") in (1, 2) and not name.startswith("embeddings")
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            model(**batch)[0].float().sum().backward()
        for handle in handles:
            handle.remove()

    record(dtypes[0])
    with ga.weaken_knowledge(model, batch, mask=0.3, drop=0.999) as handle:
        record(dtypes[1])
        assert all(handle.dropped.values())
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("family", ["llama", "bert", "qwen2_moe"])
def test_every_parameter_takes_part_in_a_step_that_drops_everything(family: str) -> None:
    """Otherwise DistributedDataParallel waits for gradients that do not come."""
    model, batch = tiny(family)
    without_dropout(model)
    with ga.weaken_knowledge(model, batch, drop=0.999) as handle:
        model(**batch)[0].sum().backward()
        places = handle.places
    for name, parameter in model.named_parameters():
        if "pooler" not in name:
            assert parameter.grad is not None, name
            if any(name.startswith(f"{end}.") for place in places for end in (*place.readers, place.writer)):
                assert not parameter.grad.any(), name


def test_a_dropped_sub_layer_is_given_no_tokens() -> None:
    model, batch = tiny("llama")
    seen: list[int] = []
    model.layers[0].mlp.act_fn.register_forward_hook(lambda m, a, out: seen.append(out.numel()))
    with ga.weaken_knowledge(model.train(), batch, drop=0.999):
        model(**batch)
    assert seen[-1] == 0


# -- with adapters ---------------------------------------------------------------------------------------------------

EVERYWHERE: list[dict[str, Any]] = [
    {"kind": "lora", "rank": 2},
    {"kind": "scale", "at": {"roles": ["down"]}, "side": "input"},
    {"kind": "serial", "width": 3},
    {"kind": "parallel", "width": 3},
]


def gated(family: str, paths: list[dict[str, Any]] = EVERYWHERE) -> tuple[nn.Module, dict[str, Tensor], ga.Adapters]:
    """Adapters of every kind that do something, gates open."""
    model, batch = tiny(family)
    space = ga.SearchSpace.parse({"paths": paths, "gates": {"stochastic": False, "init": 4.0}}, where="test")
    adapters = ga.attach(without_dropout(model), space, batch)
    model.double()
    with torch.no_grad():
        for parameter in adapters.weight_parameters():
            parameter.normal_(0, 0.2)
    return model, batch, adapters


@pytest.mark.parametrize("family", ["llama", "bert", "opt"])
@pytest.mark.parametrize("late", [False, True], ids=["attached before", "compacted within"])
def test_adapters_inside_are_dropped_with_it_and_bottlenecks_after_it_still_run(family: str, late: bool) -> None:
    model, batch, adapters = gated(family)
    if not late:
        adapters.compact()
    places = {place.writer: place for place in feed_forwards(model, batch)}
    with ga.weaken_knowledge(model, batch, drop=0.999) as handle:
        if late:
            adapters.compact()  # puts its hooks in anew, behind those of the weakening
        model(**batch)  # puts them in order
        serial = {p.site.write.module: p for p in adapters.paths.values() if p.kind == "serial"}
        parallel = {p.site.write.module: p for p in adapters.paths.values() if p.kind == "parallel"}
        writes: dict[str, Tensor] = {}
        reads: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        for writer, place in places.items():
            before = partial(_keep_input, reads, writer)
            modules[place.readers[0]].register_forward_pre_hook(before, with_kwargs=True, prepend=True)
            modules[writer].register_forward_hook(partial(_keep_output, writes, writer))
        model(**batch)
        assert all(handle.dropped.values())
    for writer in places:
        hidden, zero = reads[writer], torch.zeros_like(writes[writer])
        expected = parallel[writer](hidden, serial[writer](zero, zero, None), None)
        torch.testing.assert_close(writes[writer], expected)
        assert expected.any()


def _keep_input(into: dict[str, Tensor], name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    into[name] = (args[0] if args else kwargs["hidden_states"]).detach()


def _keep_output(into: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    into[name] = output.detach()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_adapters_inside_see_the_masked_activation(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = gated(family, EVERYWHERE[:2])
    oracle = copy.deepcopy(model)
    inside = ga.get_adapters(oracle).paths
    with torch.no_grad():
        for _, sublayer, linear in ga.discover(tiny(family)[0], batch).maps():
            if sublayer.kind == "feed_forward" and linear.role == "down":
                dict(oracle.named_modules())[linear.name].weight[:, :10] = 0
                inside[f"{linear.name.replace('.', '/')}:lora"].down[:, :10] = 0
    monkeypatch.setattr(weakening, "masked", lambda inner, p, rescale: inner * (torch.arange(inner.shape[-1]) >= 10))
    with ga.weaken_knowledge(model, batch, mask=0.5, drop=0.0):
        torch.testing.assert_close(model(**batch)[0], oracle(**batch)[0])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_plain_peft_model_is_weakened_with_its_adapters(family: str) -> None:
    peft = pytest.importorskip("peft")
    model, batch = tiny(family)
    without_dropout(model).double()
    names = {linear.name.rpartition(".")[2] for _, _, linear in ga.discover(model, batch).maps()}
    config = peft.LoraConfig(r=2, target_modules=sorted(names), init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).double().train()
    inner = adapted.base_model.model
    blocks = list(dict.fromkeys(place.block for place in feed_forwards(inner, batch)))
    oracle = written_out(family, inner, blocks, P_DROP, P_MASK)
    with ga.weaken_knowledge(adapted, batch, drop=P_DROP, mask=P_MASK):
        for seed in range(3):
            (found, grads), (expected, wanted) = gradients(adapted, batch, seed), gradients(oracle, batch, seed)
            torch.testing.assert_close(found, expected)
            prefix = "base_model.model."
            trained = {n.removeprefix(prefix): g for n, g in grads.items() if "lora_" in n}
            torch.testing.assert_close(trained, {n: wanted[n] for n in trained})


# -- copies, refusals ------------------------------------------------------------------------------------------------


def test_a_copy_draws_for_itself_and_is_restored_by_itself() -> None:
    model, batch = tiny("llama")
    without_dropout(model)
    handle = ga.weaken_knowledge(model, drop=0.999)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        handle.dropped.clear()
        dropped = twin(**batch)[0]
        assert not handle.dropped
        restore_knowledge(twin)
        assert not torch.equal(twin(**batch)[0], dropped)
    model(**batch)
    assert all(handle.dropped.values())
    handle.remove()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"drop": 1.0}, ConfigError, "[0, 1)"),
        ({"mask": -0.1}, ConfigError, "[0, 1)"),
        ({"drop": ga.Ramp(end=0.1)}, ConfigError, "total_steps"),
    ],
)
def test_wrong_probabilities_are_refused(options: Any, error: type[Exception], says: str) -> None:
    model, _ = tiny("llama")
    with pytest.raises(error) as refused:
        ga.weaken_knowledge(model, **options)
    assert says in str(refused.value)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_done_is_refused_by_name() -> None:
    model, batch = tiny("gpt_oss")
    with pytest.raises(LayoutError, match=r"layers\.0\.mlp\.experts passes through no module"):
        ga.weaken_knowledge(model, batch, mask=0.1)
    ga.weaken_knowledge(model, batch, drop=0.1).remove()
    with pytest.raises(LayoutError, match="no feed-forward sub-layer"):
        ga.weaken_knowledge(tiny("mamba")[0])


def test_one_weakening_at_a_time() -> None:
    model, _ = tiny("llama")
    with ga.weaken_knowledge(model), pytest.raises(AttachError, match="already weakened"):
        ga.weaken_knowledge(model)
    ga.weaken_knowledge(model).remove()
