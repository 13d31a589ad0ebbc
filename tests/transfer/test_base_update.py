"""Evaluation across a base update: scores, recovery, shift of activations, sensitivity, and the simulated update."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import optimize, stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersModel,
    WhisperConfig,
    WhisperModel,
)

import gatedadapters as ga
from gatedadapters.errors import AttachError, DataError, LayoutError, TrainingError
from gatedadapters.gates import Pressure
from gatedadapters.testing.backbones import VOCABULARY, tiny
from gatedadapters.transfer import (
    activation_shift,
    check_versions,
    evaluate_transfer,
    knowledge_sensitivity,
    prefer_transferable,
    recovery,
    simulate_update,
)
from gatedadapters.transfer.sensitivity import weigh_by
from gatedadapters.transfer.shift import module_outputs, padding_masks

# -- recovery ----------------------------------------------------------------------------------------------


def test_interval_of_the_recovery_holds_exactly_the_ratios_a_t_test_does_not_reject() -> None:
    won, gap = [0.02, 0.05, 0.01, 0.04, 0.03], [0.08, 0.10, 0.07, 0.12, 0.09]
    found = recovery(won, gap)
    assert found.value == pytest.approx(sum(won) / sum(gap))
    assert found.interval is not None

    def doubt(ratio: float) -> float:
        rest = [w - ratio * g for w, g in zip(won, gap, strict=True)]
        return float(stats.ttest_1samp(rest, 0.0).pvalue) - 0.05

    ends = optimize.brentq(doubt, -1, found.value), optimize.brentq(doubt, found.value, 2)
    assert found.interval == pytest.approx(ends, abs=1e-3)


def test_recovery_is_undefined_inside_seed_noise() -> None:
    gap = [0.02, -0.03, 0.01, 0.00, 0.02]
    assert stats.ttest_1samp(gap, 0.0).pvalue > 0.05
    assert recovery([0.01] * 5, gap).value is None
    assert "undefined" in str(recovery([0.01] * 5, gap))
    assert recovery([0.01], [0.5]).value is None  # one seed says nothing of noise


def test_recovery_is_undefined_where_re_tuning_loses() -> None:
    assert recovery([0.01, 0.012, 0.011], [-0.02, -0.021, -0.0205]) == recovery([0.0] * 2, [0.0] * 2)
    assert recovery([0.01, 0.012], [-0.02, -0.02]).value is None  # the gap has no spread either
    assert recovery([0.01, 0.012, 0.011], [0.02, 0.021, 0.0205]).value is not None


# -- versions and their shift ------------------------------------------------------------------------------


def test_shift_of_a_scaled_map_is_its_factor_and_nothing_before_it_moves() -> None:
    old, batch = tiny("llama")
    batch["attention_mask"][0, 5:] = 0
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.layers[1].mlp.down_proj.weight.mul_(1.25)
    found = {point.module: point.shift for point in activation_shift(old, new, [batch, batch]).points}
    assert found["layers.1.mlp.down_proj"] == pytest.approx(0.25)
    assert all(value == 0 for name, value in found.items() if name.startswith("layers.0."))
    assert found["layers.1.mlp.up_proj"] == 0
    assert all(value > 0 for name, value in found.items() if name.startswith("layers.2."))


def test_shift_leaves_padding_out() -> None:
    old, batch = tiny("bert")
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.embeddings.word_embeddings.weight[0] += 5.0  # of the padding token alone
    batch["input_ids"][1, 4:], batch["attention_mask"][1, 4:] = 0, 0
    assert max(p.shift for p in activation_shift(old, new, [batch]).points) < 1e-5


def test_mixtures_of_experts_have_a_point_for_what_they_return() -> None:
    old, batch = tiny("mixtral")
    new, _ = tiny("mixtral", seed=1)
    shift = activation_shift(old, new, [batch])
    assert {p.module for p in shift.points} >= {"layers.0.mlp", "layers.1.self_attn.o_proj"}
    assert "ffn" in shift.table()
    with pytest.raises(DataError, match="at least one batch"):
        activation_shift(old, new, [])


def test_padding_of_an_encoder_is_not_taken_for_the_decoder_s() -> None:
    model, batch = tiny("bart")
    batch["decoder_input_ids"] = batch["input_ids"].clone()
    batch["attention_mask"][0, 2:] = 0  # as long as the decoder's, but not its own
    names = ["encoder.layers.0.fc2", "decoder.layers.0.fc2", "decoder.layers.0.encoder_attn.k_proj"]
    kept, every = int(batch["attention_mask"].sum()), batch["attention_mask"].numel()
    masks = padding_masks(ga.discover(model, batch), batch)
    assert [len(rows[0]) for rows in module_outputs(model, names, batch, masks).values()] == [kept, every, kept]
    batch["decoder_attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["decoder_attention_mask"][1, 5:] = 0
    masks = padding_masks(ga.discover(model, batch), batch)
    found = module_outputs(model, names, batch, masks).values()
    assert [len(rows[0]) for rows in found] == [kept, int(batch["decoder_attention_mask"].sum()), kept]


def test_shift_is_measured_on_batches_that_no_default_could_replace() -> None:
    settings: Any = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "num_mel_bins": 8,
        "max_source_positions": 10,
        "max_target_positions": 10,
        "vocab_size": 20,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    old = WhisperModel(WhisperConfig(**settings)).eval()
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.encoder.layers[0].fc2.weight.mul_(1.5)
        new.encoder.layers[0].fc2.bias.mul_(1.5)
    batch = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.tensor([[1, 3, 4], [1, 5, 6]])}
    found = {point.module: point.shift for point in activation_shift(old, new, iter([batch])).points}
    assert found["encoder.layers.0.fc2"] == pytest.approx(0.5, rel=1e-3)
    assert found["decoder.layers.0.encoder_attn.k_proj"] > 0 == found["decoder.layers.0.self_attn.k_proj"]


def longer() -> nn.Module:
    settings: Any = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": VOCABULARY}
    return BertModel(BertConfig(**settings, num_hidden_layers=4, max_position_embeddings=64, type_vocab_size=2))


def with_more_words() -> nn.Module:
    model, _ = tiny("bert")
    model.resize_token_embeddings(VOCABULARY + 3)
    return model


def other(family: str, **changes: Any) -> Any:
    """The same parameters in a model that computes otherwise with them."""
    model, _ = tiny(family)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return type(model)(model.config)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"num_attention_heads": 8}),
        ("bert", {"hidden_act": "relu"}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_bases_that_compute_otherwise_with_equal_shapes_are_refused(family: str, changes: dict[str, Any]) -> None:
    with pytest.raises(LayoutError, match=f"{next(iter(changes))} of the configuration differs"):
        check_versions(tiny(family)[0], other(family, **changes))
    with pytest.raises(LayoutError, match=f"{next(iter(changes))} of the configuration differs"):
        check_versions(nn.Sequential(tiny(family)[0]), nn.Sequential(other(family, **changes)))


def test_versions_may_differ_in_what_layers_do_not_compute() -> None:
    changes: dict[str, Any] = {"hidden_dropout": 0.3, "eos_token_id": 5, "id2label": {0: "a"}, "dtype": "bfloat16"}
    check_versions(tiny("gpt_neox")[0], other("gpt_neox", **changes, _name_or_path="elsewhere", initializer_range=0.5))
    check_versions(tiny("llama")[0], other("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e6}))


@pytest.mark.parametrize(
    ("new", "says"),
    [
        (lambda: tiny("roberta")[0], ["the class", "BertModel", "RobertaModel"]),
        (with_more_words, ["the vocabulary", "99 tokens", "102 tokens"]),
        (longer, ["encoder.layer.3", "absent"]),
    ],
)
def test_other_bases_are_refused_and_the_difference_named(new: Any, says: list[str]) -> None:
    with pytest.raises(LayoutError) as refused:
        check_versions(tiny("bert")[0], new())
    assert all(part in str(refused.value) for part in [*says, "fix:"])


# -- scores ------------------------------------------------------------------------------------------------


def test_each_arm_is_trained_and_tested_where_it_should_be() -> None:
    old, batch = tiny("llama", head="classification")
    new, _ = tiny("llama", head="classification", seed=1)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (old, new)]
    log: list[tuple[str, ...]] = []
    begun: list[float] = []

    def train(model: nn.Module, seed: int) -> ga.Adapters:
        space = ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": 2}]}, where="test")
        adapters = ga.attach(model, space, batch, seed=seed)
        with torch.no_grad():
            for path in adapters.paths.values():
                path.up.fill_(0.01 * (len(log) + 1))
        begun.append(float(model.score.weight.detach().sum()))
        with torch.no_grad():
            model.score.weight.add_(1)
        adapters.compact()
        weak = any(type(h).__name__ == "Draw" for m in model.modules() for h in m._forward_pre_hooks.values())
        log.append(("train", "old" if model is old else "new", "weakened" if weak else "plain", str(seed)))
        return adapters

    def score(model: nn.Module) -> float:
        adapters = ga.get_adapters(model)
        return float(next(iter(adapters.paths.values())).up.detach().flatten()[0]) + (0 if model is old else 0.5)

    report = evaluate_transfer(old, new, train, score, seeds=(3, 4))
    places = [("old", "plain"), ("old", "weakened"), ("new", "plain")]
    assert log == [("train", *place, seed) for seed in "34" for place in places]
    first = report.scores[0]
    gates = first.old / 0.01  # gates folded into the weights
    assert first.direct == pytest.approx(first.old + 0.5)  # the same adapter, carried over
    assert first.trained_direct == pytest.approx(first.trained_old + 0.5)
    assert first.trained_old == pytest.approx(0.02 * gates)
    assert first.retuned == pytest.approx(0.03 * gates + 0.5)
    assert "recovery" in report.table()
    first_old, first_new = (float(state["score.weight"].sum()) for state in before)
    assert begun == pytest.approx(2 * [first_old, first_old, first_new])  # no training begins where another ended
    for model, state in zip((old, new), before, strict=True):
        assert all(torch.equal(value, state[k]) for k, value in model.state_dict().items())
        assert not hasattr(model, "gated_adapters")


# -- sensitivity and the weighed penalty -------------------------------------------------------------------


def test_sensitivity_is_zero_before_the_first_feed_forward_and_counts_it_after() -> None:
    model, batch = tiny("llama")
    adapters = ga.attach(model.train(), "lora-all-linear", batch)
    found = knowledge_sensitivity(adapters, [batch])
    assert found["layers/0/self_attn/q_proj:lora"] == 0
    assert found["layers/0/mlp/up_proj:lora"] == 0
    assert found["layers/0/mlp/down_proj:lora"] == pytest.approx((0.2) ** 0.5, abs=0.15)  # what masking takes away
    assert 0 < found["layers/1/self_attn/q_proj:lora"] < found["layers/0/mlp/down_proj:lora"]
    assert all(module.training for module in model.modules())
    assert not any(type(h).__name__.startswith("Mask") for m in model.modules() for h in m._forward_pre_hooks.values())


def test_experts_that_are_modules_of_their_own_are_compared_as_a_whole() -> None:
    """Which tokens an expert sees differs between bases, and under a mask."""
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_experts=4,
        expert_capacity=64,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    old, new = SwitchTransformersModel(config).eval(), SwitchTransformersModel(config).eval()
    ids = torch.randint(3, VOCABULARY, (4, 12))
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :6]}
    points = activation_shift(old, new, [batch]).points
    assert any(point.sublayer == "feed_forward" for point in points)
    assert not any("expert_" in point.module for point in points)
    adapters = ga.attach(old, "lora-all-linear", batch)
    found = knowledge_sensitivity(adapters, [batch])
    assert any("expert_" in key for key in found)
    assert all(value > 0 for key, value in found.items() if "expert_" in key)


@pytest.mark.parametrize("penalty", [ga.L0(weight=2.0), ga.Budget(fraction=0.2)], ids=["L0", "budget"])
def test_weighed_penalty_presses_where_it_is_told_and_costs_stay_true(penalty: Any) -> None:
    model, batch = tiny("llama")
    adapters = ga.attach(model, "lora-all-linear", batch, penalty=penalty, total_steps=100)
    bank, pressure = adapters.bank, adapters.pressure
    assert bank is not None
    assert isinstance(pressure, Pressure)
    bank.step.fill_(90)
    with torch.no_grad():
        bank.log_alpha.fill_(1.0)
        bank.saliency.fill_(0.5)  # what a budget's pressure is measured by
    plain, cost = torch.autograd.grad(pressure.term(bank), bank.log_alpha)[0], float(bank.expected_cost().detach())
    found = prefer_transferable(adapters, [batch], strength=0.5)
    weighed = torch.autograd.grad(pressure.term(bank), bank.log_alpha)[0]
    assert float(bank.expected_cost().detach()) == cost
    ratio = (weighed / plain)[0]
    quiet = torch.cat([ratio[bank.slices[key]] for key, value in found.items() if value == 0])
    loud = ratio[bank.slices[max(found, key=lambda key: found[key])]]
    assert quiet.max() < ratio.median() < loud.min()
    assert float((weighed * 1.0).sum()) == pytest.approx(float(plain.sum()), rel=1e-4)  # as hard in all as before
    structure = adapters.discretize(ga.Budget(fraction=0.2))
    assert structure.params <= 0.2 * bank.dense_cost()
    assert structure.params > 0.19 * bank.dense_cost()


def test_no_place_is_pressed_less_than_a_quarter_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny("llama")
    adapters = ga.attach(model, "lora-all-linear", batch)
    first, *others = adapters.paths
    weights: list[torch.Tensor] = []
    monkeypatch.setattr(type(adapters.bank), "weigh", lambda bank, found: weights.append(found))
    weigh_by(adapters, {first: 0.0, **dict.fromkeys(others, 2.0)})
    assert weights[0].min() == 0.25
    assert weights[0].max() == pytest.approx((len(others) + 1) / len(others))


# -- the simulated update ----------------------------------------------------------------------------------


def tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 3))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def counting(words: int) -> list[str]:
    return [" ".join(f"w{(i + shift) % 12}" for i in range(words)) for shift in range(12)]


@pytest.mark.parametrize(("family", "objective"), [("bert", "masked"), ("llama", "causal")])
def test_simulated_update_learns_its_text_and_reports_how_far_it_went(family: str, objective: str) -> None:
    model, _ = tiny(family, head="lm")
    old = copy.deepcopy(model)
    options: dict[str, Any] = {"steps": 12, "learning_rate": 3e-3, "length": 16, "batch_size": 4}
    found = simulate_update(model, tokenizer(), counting(64), other_texts=[" ".join(["w80 w7"] * 64)], **options)
    assert (found.objective, found.steps, found.tokens) == (objective, 12, 12 * 4 * 16)
    assert found.loss[1] < found.loss[0] - 0.1
    assert found.other_loss is not None
    pairs = [
        (a.detach().float(), b.detach().float()) for a, b in zip(model.parameters(), old.parameters(), strict=True)
    ]
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    assert found.weight_shift == pytest.approx(
        moved / math.sqrt(sum(float(b.square().sum()) for _, b in pairs)), rel=1e-4
    )
    assert set(found.weight_shift_by_kind) == {"attention", "feed_forward", "rest"}
    assert "weights moved by" in str(found)
    check_versions(old, model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_simulated_update_of_a_decoder_needs_no_padding_token(family: str) -> None:
    model, _ = tiny(family, head="lm")
    bare = tokenizer(pad_token=None)
    assert bare.pad_token is None
    found = simulate_update(model, bare, counting(64), steps=2, length=16, batch_size=4)
    padding = simulate_update(tiny(family, head="lm")[0], tokenizer(), counting(64), steps=2, length=16, batch_size=4)
    assert found.loss == padding.loss


def attached(model: nn.Module) -> nn.Module:
    ga.attach(model, "lora-all-linear")
    return model


def with_peft(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    return model


def with_delta(model: nn.Module) -> nn.Module:
    weight = "model.layers.0.mlp.up_proj.weight"
    ga.apply_mask(model, ga.Mask.build(model, {weight: torch.tensor([1, 2])}))
    return model


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (attached, AttachError, "already has adapters"),
        (with_peft, AttachError, "a peft adapter at model.layers.0.self_attn.q_proj"),
        (with_delta, AttachError, "a sparse delta"),
        (lambda model: model.requires_grad_(False), TrainingError, "every parameter of this model is frozen"),
    ],
)
def test_simulated_update_is_of_a_base_alone(change: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        simulate_update(change(tiny("llama", head="lm")[0]), tokenizer(), counting(64), length=16, batch_size=4)


def test_an_update_counts_the_tokens_it_saw_and_measures_other_text_or_says_why_not() -> None:
    """Ten pieces to train on, and batches of four: the last of an epoch would be short."""
    model, _ = tiny("llama", head="lm")
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].numel()) if m.training else None, with_kwargs=True
    )
    text = " ".join(f"w{i % 60}" for i in range(11 * 16))
    assert simulate_update(model, tokenizer(), [text], steps=6, length=16, batch_size=4).tokens == sum(seen)
    with pytest.raises(DataError, match="too little other text"):
        simulate_update(model, tokenizer(), [text], other_texts=["w1 w2"], steps=2, length=16, batch_size=4)


def test_frozen_parameters_stay_through_a_simulated_update() -> None:
    model, _ = tiny("llama", head="lm")
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    before = frozen.clone()
    assert simulate_update(model, tokenizer(), counting(64), steps=2, length=16, batch_size=4).weight_shift > 0
    assert torch.equal(frozen, before)


def test_simulated_update_refuses_what_it_cannot_train() -> None:
    bare = tokenizer(mask_token=None)
    with pytest.raises(TrainingError, match="a tokenizer with a mask token"):
        simulate_update(tiny("bert", head="lm")[0], bare, counting(64), length=16, batch_size=4)
    with pytest.raises(TrainingError, match=r"language-modelling head[\s\S]*BertModel"):
        simulate_update(tiny("bert")[0], tokenizer(), counting(64))
    with pytest.raises(DataError, match="too little text"):
        simulate_update(tiny("llama", head="lm")[0], tokenizer(), ["w1 w2"], length=16)


def test_configuration_finds_its_files_beside_itself(tmp_path: Path) -> None:
    for name in ("old", "new", "saved"):
        (tmp_path / name).mkdir()
    (tmp_path / "t.yaml").write_text("model: old\nupdate: new\nadapter: saved\ntasks: [{train: t.csv}]\n")
    from gatedadapters.config import TransferConfig

    config = TransferConfig.load(tmp_path / "t.yaml")
    assert [config.model, config.update, config.adapter] == [str(tmp_path / n) for n in ("old", "new", "saved")]
    assert config.weakening.drop == 0.1
