"""What discovery promises for any model: to disturb nothing, to say what it cannot do, to need no weights."""

import copy
import gc
import random
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Llama4TextConfig, Llama4TextModel, LlamaConfig, LlamaModel, PreTrainedModel

from gatedadapters.backbone import Layout, discover
from gatedadapters.errors import LayoutError
from gatedadapters.testing.backbones import tiny


def _roles(layout: Layout, block: int = 0) -> dict[str, str]:
    """Role by short name, of one block."""
    return {m.name.rsplit(".", 1)[-1]: m.role for b, _, m in layout.maps() if b.index == block}


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything about the model that discovery could have changed."""
    return {
        "training": [m.training for m in model.modules()],
        "hooks": [
            [len(v) for k, v in sorted(vars(m).items()) if k.endswith(("_hooks", "_hooks_with_kwargs"))]
            for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "random": (torch.get_rng_state(), random.getstate()),
    }


def _assert_same(before: Any, after: Any) -> None:
    assert type(before) is type(after)
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            _assert_same(before[key], after[key])
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after)
        for a, b in zip(before, after, strict=True):
            _assert_same(a, b)
    elif isinstance(before, Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "mixtral", "mamba", "albert"])
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_exactly_as_it_was(family: str, fails: bool) -> None:
    model, batch = tiny(family)
    model.train()
    next(iter(model.children())).eval()
    model.get_input_embeddings().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    last = list(model.modules())[-1]
    if fails:
        last.register_forward_pre_hook(_refuse)
    before = _state(model)
    if fails:
        with pytest.raises(LayoutError):
            discover(model, batch)
    else:
        discover(model, batch)
    _assert_same(before, _state(model))


def _refuse(*_: object) -> None:
    raise RuntimeError("no")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_layout_found_under_autocast_is_the_layout(family: str) -> None:
    model, sample = tiny(family)
    alone = discover(model, sample)
    with torch.autocast("cpu", torch.bfloat16):
        model(**sample)  # autocast keeps its copies of the weights from here on
        first, second = discover(model, sample), discover(model, sample)
    assert _roles(first) == _roles(second) == _roles(alone)
    assert first == second == alone


def test_random_numbers_drawn_by_the_model_are_given_back() -> None:
    model, batch = tiny("bert")
    model.encoder.layer[0].register_forward_hook(lambda _, args, out: (torch.rand(3), None)[1])
    before = torch.get_rng_state()
    discover(model, batch)
    assert torch.equal(before, torch.get_rng_state())


def test_activations_are_let_go() -> None:
    model, _ = tiny("llama")
    alive: list[weakref.ref[Tensor]] = []
    left: list[int] = []
    for module in model.modules():
        module.register_forward_hook(
            lambda _, args, out: alive.append(weakref.ref(out.untyped_storage())) if type(out) is Tensor else None
        )
    model.norm.register_forward_hook(lambda *_: left.append(sum(ref() is not None for ref in alive)))
    discover(model, {"input_ids": torch.ones(2, 8, dtype=torch.long), "use_cache": False})
    assert len(alive) > 30
    assert left[0] < 5


def test_nothing_keeps_the_model_alive() -> None:
    model, batch = tiny("llama")
    layout = discover(model, batch)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert layout.blocks


def test_users_hooks_still_run_and_stay() -> None:
    model, batch = tiny("bert")
    calls: list[str] = []
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: calls.append("hook"))
    discover(model, batch)
    assert calls == ["hook"]
    model(**batch)
    assert len(calls) == 2
    handle.remove()


def test_batch_is_not_changed() -> None:
    model, batch = tiny("t5")
    before = copy.deepcopy(batch)
    discover(model, batch)
    _assert_same(before, batch)


def test_batch_that_does_not_fit_says_what_to_do() -> None:
    model, _ = tiny("bert")
    with pytest.raises(LayoutError, match="pass sample=") as caught:
        discover(model, {"input_ids": torch.full((1, 4), 1000)})
    assert "IndexError" in str(caught.value)
    assert "input_ids [1, 4]" in str(caught.value)
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 4),
        nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)),
        nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU())]),
    ],
)
def test_model_without_blocks_is_refused(model: nn.Module) -> None:
    with pytest.raises(LayoutError):
        discover(model)


def test_container_without_a_residual_stream_is_no_stack() -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
    with pytest.raises(LayoutError, match="no repeated blocks"):
        discover(_Embedded(layers, 4))


def test_model_without_embeddings_asks_for_a_sample() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    with pytest.raises(LayoutError, match="pass sample="):
        discover(Residual())
    # The addition happens outside the members here, so they are no blocks.
    with pytest.raises(LayoutError, match="no repeated blocks"):
        discover(Residual(), {"x": torch.randn(2, 3, 6)})


class _Embedded(nn.Module):
    """Token embeddings, then the layers one after the other."""

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = layers

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class MultiTask(nn.Module):
    """A wrapper as users write them: a backbone and several heads, not a transformers class."""

    def __init__(self, backbone: PreTrainedModel, tasks: int = 3) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)) for _ in range(tasks))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, task: int = 0) -> Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]
        result: Tensor = self.heads[task](hidden[:, 0])
        return result


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_wrapper_around_a_backbone(family: str) -> None:
    backbone, batch = tiny(family)
    layout = discover(MultiTask(backbone), batch)
    assert [b.name for b in layout.blocks] == [f"backbone.{b.name}" for b in discover(backbone).blocks]
    assert {m.name for m in layout.outside} >= {"heads.0.0", "heads.0.2"}
    assert {entry.name for entry in layout.unknown} == {f"heads.{i}.{j}.weight" for i in (1, 2) for j in (0, 2)}
    assert all("never called" in entry.reason for entry in layout.unknown)


def test_seventy_billion_parameters_without_weights_in_seconds() -> None:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaModel(config)
    start = time.process_time()
    layout = discover(model)
    assert time.process_time() - start < 30
    assert len(layout.blocks) == 80
    assert sum(m.in_features * m.out_features for _, _, m in layout.maps()) > 68e9
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("family", ["llama", "bert", "gptj", "t5", "bart"])
@pytest.mark.parametrize("allocates", [False, True])
def test_attention_kernel_that_hides_its_operations(
    family: str, allocates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny(family)
    expected = discover(model, batch)
    hidden = [(nn.functional, "scaled_dot_product_attention")]
    if family in ("gptj", "t5"):  # attention of their own
        hidden = [(torch, "matmul"), (nn.functional, "softmax")]
    for owner, name in hidden:
        monkeypatch.setattr(owner, name, _hidden(getattr(owner, name), allocates))
    layout = discover(model, batch)
    assert [(s.kind, m.name, m.role) for _, s, m in layout.maps()] == [
        (s.kind, m.name, m.role) for _, s, m in expected.maps()
    ]


def _hidden(original: Callable[..., Tensor], allocates: bool) -> Callable[..., Tensor]:
    """The function as a compiled extension would run it: at most the allocation of its output is seen."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            result = original(*args, **kwargs)
        if not allocates:
            return result
        out = torch.empty_like(result)
        with torch.utils._python_dispatch._disable_current_modes():
            return out.copy_(result)

    return run


def test_packed_weights_are_believed_to_be_linear() -> None:
    class Packed(nn.Module):
        """Like a quantized linear layer: a weight whose shape says nothing, dequantised on the fly."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("packed", linear.weight.detach().to(torch.float16).view(torch.uint8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.packed.view(torch.float16).to(x.dtype).T

    model, batch = tiny("llama")
    expected = discover(model, batch)
    for layer in model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    assert discover(model, batch) == expected


def test_tied_head_is_outside_under_its_own_name() -> None:
    model, batch = tiny("gpt2", head="lm")
    assert model.lm_head.weight is model.transformer.wte.weight
    layout = discover(model, batch)
    assert [(m.name, m.in_features, m.out_features) for m in layout.outside] == [("lm_head", 32, 99)]


def test_maps_that_share_a_weight_keep_their_own_roles() -> None:
    model, batch = tiny("llama")
    expected = discover(model, batch)
    for layer in model.layers:
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
        layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight
    assert discover(model, batch) == expected


def test_autocast_copies_of_weights_are_recognised() -> None:
    model, batch = tiny("llama")
    expected = discover(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert discover(model, batch) == expected


def test_flattened_hidden_state_is_followed() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, hidden_states: Tensor) -> Tensor:
            flat = hidden_states.reshape(-1, 6)
            return hidden_states + self.down(torch.relu(self.up(flat))).view_as(hidden_states)

    layout = discover(_Embedded(nn.ModuleList([Block(), Block()]), 6))
    assert _roles(layout) == {"up": "up", "down": "down"}
    (sub,) = layout.blocks[1].sublayers
    assert (sub.reader, sub.writer) == ("layers.1.up", "layers.1.down")


def test_map_that_leads_nowhere_is_unknown() -> None:
    model, batch = tiny("llama")
    extra = nn.Linear(32, 5)
    model.layers[1].mlp.probe = extra
    model.layers[1].mlp.gate_proj.register_forward_pre_hook(lambda _, args: extra(args[0]) and None)
    with pytest.raises(LayoutError):  # the hook asks for a truth value
        discover(model, batch)
    model.layers[1].mlp.gate_proj._forward_pre_hooks.clear()
    model.layers[1].mlp.gate_proj.register_forward_pre_hook(lambda _, args: (extra(args[0]), None)[1])
    (entry,) = discover(model, batch).unknown
    assert entry.name == "layers.1.mlp.probe.weight"
    assert "does not reach" in entry.reason or "do not reach" in entry.reason


def test_router_that_scales_what_the_experts_read() -> None:
    config = Llama4TextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        intermediate_size_mlp=48,
        num_local_experts=4,
        moe_layers=[0],
        vocab_size=99,
    )
    layout = discover(Llama4TextModel(config))
    _, moe = layout.blocks[0].sublayers
    assert {m.name.rsplit(".", 1)[-1]: m.role for m in moe.maps if m.role == "router"} == {"router": "router"}
    assert moe.reader == moe.writer == moe.name == "layers.0.feed_forward"
    assert _roles(layout)["q_proj"] == "q"  # rotary embeddings are complex numbers here
    assert not layout.unknown


def test_recurrence_written_as_a_loop_mixes_tokens() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value, self.out = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, hidden: Tensor) -> Tensor:
            gate, value = torch.sigmoid(self.gate(hidden)), self.value(hidden)
            state, states = torch.zeros_like(value[:, 0]), []
            for t in range(hidden.shape[1]):
                state = gate[:, t] * state + value[:, t]
                states.append(state)
            result: Tensor = hidden + self.out(torch.stack(states, 1))
            return result

    layout = discover(_Embedded(nn.ModuleList([Block(), Block()]), 6))
    assert [sub.kind for sub in layout.blocks[0].sublayers] == ["mixer"]
    assert _roles(layout) == {"gate": "in", "value": "in", "out": "out"}


def test_experts_without_a_token_get_the_role_of_their_twins() -> None:
    class Moe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(6, 4)
            self.experts = nn.ModuleList(
                nn.ModuleDict({"w1": nn.Linear(6, 10), "w2": nn.Linear(10, 6)}) for _ in range(4)
            )

        def forward(self, hidden: Tensor) -> Tensor:
            weight, index = self.gate(hidden).softmax(-1).topk(1)
            chosen = self.experts[int(index.flatten()[0])]
            result: Tensor = chosen["w2"](torch.relu(chosen["w1"](hidden))) * weight
            return result

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = Moe()

        def forward(self, hidden: Tensor) -> Tensor:
            result: Tensor = hidden + self.moe(hidden)
            return result

    layout = discover(_Embedded(nn.ModuleList([Block(), Block()]), 6))
    maps = [m for b, _, m in layout.maps() if b.index == 0]
    assert sorted(m.role for m in maps) == ["down"] * 4 + ["router"] + ["up"] * 4
    assert sorted(m.traffic for m in maps) == [0.0] * 6 + [1.0] * 3
    assert not layout.unknown
    (sub,) = layout.blocks[0].sublayers
    assert sub.reader == sub.writer == sub.name == "layers.0.moe"
