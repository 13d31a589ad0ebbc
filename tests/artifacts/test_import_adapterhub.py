"""Adapters of AdapterHub become paths that compute what the adapters library computes.

The folders and the expected values were written by adapters 1.3.0 itself, which needs an older transformers:
`scripts/make-adapterhub-fixtures.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.artifacts.adapterhub_folder import read_adapterhub
from gatedadapters.errors import ArtifactError, GatedAdaptersError
from gatedadapters.testing.backbones import tiny

HERE = Path(__file__).parent / "adapterhub"
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make-adapterhub-fixtures.py"))
SIZES: dict[str, Any] = SCRIPT["SIZES"]
HEAD_WEIGHTS = "model_head.safetensors"
WEIGHTS, CONFIG, HEAD = "adapter.safetensors", "adapter_config.json", "head_config.json"
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "n_inner": 24}
DISTILBERT: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 24}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**SIZES, "type_vocab_size": 2}),
    "roberta": ("Roberta", {**SIZES, "type_vocab_size": 1, "pad_token_id": 1}),
    "llama": ("Llama", {**SIZES, "num_key_value_heads": 1}),
    "gpt2": ("GPT2", {"vocab_size": 40, **GPT2}),
    "distilbert": ("DistilBert", {"vocab_size": 40, **DISTILBERT}),
}


def model_for(case: str, *, head: bool = True) -> nn.Module:
    """The model of a case, its parameters filled by their names."""
    family, settings = CONFIGS[case.partition("-")[0]]
    config = getattr(transformers, f"{family}Config")(**settings)
    labels = json.loads((HERE / case / HEAD).read_text())["config"] if (HERE / case / HEAD).is_file() else None
    if labels is not None and head:
        config.num_labels = labels["num_labels"]
        model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    else:
        model = getattr(transformers, f"{family}Model")(config).eval()
    SCRIPT["fill"](model.base_model)
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def output(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids)[0]
    return found


KINDS = {
    "bert-both-after-norms": {"serial"},
    "bert-houlsby": {"serial"},
    "bert-ia3": {"scale"},
    "bert-lora": {"lora"},
    "bert-parallel": {"parallel"},
    "bert-pfeiffer": {"serial"},
    "distilbert-houlsby": {"serial"},
    "distilbert-pfeiffer": {"serial"},
    "gpt2-pfeiffer": {"serial"},
    "llama-houlsby": {"serial"},
    "llama-ia3": {"scale"},
    "llama-lora": {"lora"},
    "llama-parallel": {"parallel"},
    "llama-pfeiffer": {"serial"},
    "roberta-pfeiffer": {"serial"},
}


def test_every_folder_is_tested() -> None:
    assert {path.name for path in HERE.iterdir()} == KINDS.keys()


@pytest.mark.parametrize("case", KINDS)
def test_it_computes_what_the_adapters_library_does(tmp_path: Path, case: str) -> None:
    told = load_file(HERE / case / "expected.safetensors")
    ids, expected = told["ids"], told["expected"]
    model = model_for(case)
    plain = output(model, ids)
    adapters = ga.import_adapterhub(model, HERE / case)
    assert {path.kind for _, path in adapters.typed_paths()} == KINDS[case]
    torch.testing.assert_close(output(model, ids), expected, atol=2e-5, rtol=1e-4)
    adapters.compact()
    adapters.save(tmp_path / "own")
    again = model_for(case)
    ga.load_adapters(again, tmp_path / "own")
    torch.testing.assert_close(output(again, ids), expected, atol=2e-5, rtol=1e-4)
    ga.detach(model)
    if not adapters.head_names:
        assert torch.equal(output(model, ids), plain)


@pytest.mark.skipif("ADAPTERHUB_PYTHON" not in os.environ, reason="names no Python with the adapters library")
def test_the_folders_are_what_the_library_writes(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "make-adapterhub-fixtures.py"
    subprocess.run([os.environ["ADAPTERHUB_PYTHON"], str(script), str(tmp_path)], check=True, timeout=240)
    for case in KINDS:
        for file in ("expected.safetensors", WEIGHTS):
            written, held = load_file(tmp_path / case / file), load_file(HERE / case / file)
            assert written.keys() == held.keys()
            for name, value in held.items():
                torch.testing.assert_close(written[name], value, atol=1e-5, rtol=1e-4)
        assert json.loads((tmp_path / case / CONFIG).read_text()) == json.loads((HERE / case / CONFIG).read_text())


def test_an_imported_bottleneck_can_be_trained_and_cut() -> None:
    model = model_for("bert-pfeiffer")
    ids = load_file(HERE / "bert-pfeiffer" / "expected.safetensors")["ids"]
    adapters = ga.import_adapterhub(model, HERE / "bert-pfeiffer")
    adapters.set_penalty(ga.Budget(fraction=0.5), total_steps=4)
    groups = [{"params": adapters.weight_parameters(), "lr": 1e-2}, {"params": adapters.gate_parameters(), "lr": 0.5}]
    optimizer = torch.optim.Adam(groups)
    model.train()
    for _ in range(4):
        (model(input_ids=ids, labels=torch.tensor([0, 1])).loss + adapters.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    structure = adapters.compact()
    assert 0 < structure.params <= structure.dense_params / 2


def test_the_adapter_alone_goes_on_a_backbone_and_on_a_backbone_under_other_heads() -> None:
    case = "bert-houlsby"
    ids = load_file(HERE / case / "expected.safetensors")["ids"]
    backbone = model_for(case, head=False)
    ga.import_adapterhub(backbone, HERE / case, head=False)
    expected = output(backbone, ids)
    several = ga.MultiTaskClassifier(model_for(case, head=False), {"a": 2}).eval()  # type: ignore[arg-type]
    ga.import_adapterhub(several, HERE / case, head=False)
    torch.testing.assert_close(output(several.backbone, ids), expected)


# -- what is refused ---------------------------------------------------------------------------------------------------


def configured(file: str = CONFIG, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        data["config"] |= changes
        (folder / file).write_text(json.dumps(data))

    return change


def top(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))

    return change


def tensors(part: str, rule: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = {n: (rule(v) if part in n else v) for n, v in load_file(folder / WEIGHTS).items()}
        save_file({n: v.contiguous() for n, v in found.items() if v is not None}, folder / WEIGHTS)

    return change


def renamed(old: str, new: str, file: str = WEIGHTS) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = {name.replace(old, new): value for name, value in load_file(folder / file).items()}
        save_file(found, folder / file)

    return change


class Bomb:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.folder / "exploded",)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_adapter.bin").write_bytes(pickle.dumps(Bomb(folder)))


def linked_elsewhere(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def a_fusion(folder: Path) -> None:
    (folder / "adapter_fusion_config.json").write_text("{}")


UNKNOWN = "a configuration that is not known here"


@pytest.mark.parametrize(
    ("case", "damage", "says"),
    [
        ("bert-houlsby", pickled, ["pytorch_adapter.bin, a pickled file", "never opened", "weights_only=True"]),
        ("bert-houlsby", linked_elsewhere, ["a link out of its folder"]),
        ("bert-houlsby", a_fusion, ["a fusion of several adapters", "one of the adapters, without the fusion"]),
        ("bert-houlsby", lambda folder: (folder / WEIGHTS).unlink(), ["the weights are missing"]),
        ("bert-houlsby", lambda folder: (folder / CONFIG).write_text("[]"), [UNKNOWN, "the whole"]),
        ("bert-houlsby", lambda folder: (folder / CONFIG).write_text("{"), ["cannot be read"]),
        ("bert-houlsby", lambda folder: (folder / CONFIG).unlink(), ["not a folder of AdapterHub"]),
        ("bert-houlsby", top(peft_type="LORA"), ["this is a peft adapter", "import_peft"]),
        ("bert-houlsby", top(config="houlsby"), [UNKNOWN, "config: "]),
        ("bert-houlsby", top(model_type="bart"), ["not known here for this family", "'bart'"]),
        ("bert-houlsby", top(model_type=7), [UNKNOWN, "model_type"]),
        ("bert-houlsby", configured(architecture="prefix_tuning"), ["of this architecture", "prefix_tuning"]),
        ("bert-houlsby", configured(architecture="union", configs=[]), ["of this architecture", "union"]),
        ("bert-houlsby", configured(phm_layer=True), [UNKNOWN, "phm_layer: True"]),
        ("bert-houlsby", configured(inv_adapter="nice"), [UNKNOWN, "inv_adapter: 'nice'"]),
        ("bert-houlsby", configured(use_gating=True), [UNKNOWN, "use_gating: True"]),
        ("bert-houlsby", configured(ln_after=True), [UNKNOWN, "ln_after: True"]),
        ("bert-houlsby", configured(adapter_residual_before_ln=True), [UNKNOWN, "adapter_residual_before_ln"]),
        ("bert-houlsby", configured(residual_before_ln="post_add"), [UNKNOWN, "residual_before_ln"]),
        ("bert-houlsby", configured(original_ln_after=False), [UNKNOWN, "original_ln_after"]),
        ("bert-houlsby", configured(non_linearity="leakyrelu"), [UNKNOWN, "non_linearity", "leakyrelu"]),
        ("bert-houlsby", configured(scaling="4.0"), [UNKNOWN, "scaling"]),
        ("bert-houlsby", configured(scaling=float("inf")), [UNKNOWN, "scaling"]),
        ("bert-houlsby", configured(scaling="learned"), ["another model", "0 factors"]),
        ("bert-houlsby", configured(mh_adapter="yes"), [UNKNOWN, "mh_adapter"]),
        ("bert-houlsby", configured(leave_out=[-1]), [UNKNOWN, "leave_out.0"]),
        ("bert-houlsby", configured(leave_out=[0]), ["another model", "without them"]),
        ("bert-houlsby", configured(of_the_future={"a": 1}), [UNKNOWN, "of_the_future"]),
        ("bert-parallel", configured(leave_out=[]), ["another model", "encoder.layer.0.output, as the"]),
        ("bert-houlsby", tensors("adapter_up.weight", lambda v: v[:, 1:]), ["another model", "adapter_up.weight"]),
        ("bert-houlsby", tensors("adapter_up.bias", lambda v: None), ["another model", "adapter_up.bias"]),
        ("bert-houlsby", tensors("adapter_down", lambda v: v * float("nan")), ["finite"]),
        ("bert-houlsby", tensors("adapter_down", lambda v: v.int()), ["torch.int32"]),
        ("bert-houlsby", renamed(".task.", ".other."), ["a weight of another adapter", ".adapters.task."]),
        ("bert-houlsby", renamed("layer.1.", "layer.9."), ["another model", "layer.9"]),
        ("bert-houlsby", renamed("bert.encoder", "../../encoder"), ["another model"]),
        ("bert-houlsby", configured(HEAD, head_type="multilabel_classification"), ["no counterpart", "multilabel"]),
        ("bert-houlsby", configured(HEAD, activation_function="gelu"), ["no counterpart", "gelu", "head=False"]),
        ("bert-houlsby", configured(HEAD, layers=1), ["no counterpart", "1 layers"]),
        ("bert-houlsby", configured(HEAD, layers="2"), [UNKNOWN, "layers"]),
        ("bert-houlsby", renamed("heads.task.1.weight", "x", HEAD_WEIGHTS), ["heads.NAME.LAYER.weight", "got:      x"]),
        ("bert-houlsby", renamed("task.1.", "task.¹.", HEAD_WEIGHTS), ["heads.NAME.LAYER.weight", "heads.task.¹"]),
        ("bert-lora", configured(use_dora=True), [UNKNOWN, "use_dora: True"]),
        ("bert-lora", configured(vera_d=0.1), [UNKNOWN, "vera_d"]),
        ("bert-lora", configured(r=3), ["another model", "lora_A (3, 16)"]),
        ("bert-lora", configured(alpha=0), [UNKNOWN, "alpha"]),
        ("bert-lora", configured(alpha=1e308), ["not finite", "too large"]),
        ("bert-lora", tensors("lora_B", lambda v: v.float() * 1e38), ["not finite", "too large"]),
        ("bert-ia3", configured(alpha=1e308), ["not finite", "too large"]),
        ("bert-houlsby", configured(scaling=1e308), ["not finite", "too large"]),
        ("bert-lora", configured(composition_mode="scale"), ["another model", "lora_B (out, 1)"]),
        ("bert-lora", top(version="adapters.1.0.1"), ["an early release", "alpha has no effect", "converts it"]),
        ("bert-ia3", tensors("lora_B", lambda v: v[1:]), ["another model", "factors"]),
        ("llama-pfeiffer", configured(mh_adapter=True), ["another model", "attention_adapters"]),
    ],
)
def test_a_foreign_or_damaged_folder_is_one_error_and_the_model_is_left_alone(
    tmp_path: Path, case: str, damage: Callable[[Path], None], says: list[str]
) -> None:
    folder = tmp_path / "given"
    shutil.copytree(HERE / case, folder)
    damage(folder)
    model = model_for(case)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ArtifactError) as caught:
        ga.import_adapterhub(model, folder)
    for part in [*says, "expected:", "got:", "fix:"]:
        assert part in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "gated_adapters")
    assert not (folder / "exploded").exists()


ODD: list[Any] = [None, -1, 1e308, "x" * 70_000, [[]], {"a": [1]}, True]


@pytest.mark.parametrize(("case", "file"), [("bert-pfeiffer", CONFIG), ("bert-pfeiffer", HEAD), ("bert-lora", CONFIG)])
def test_every_field_may_hold_anything_and_is_read_or_refused(tmp_path: Path, case: str, file: str) -> None:
    folder = tmp_path / "given"
    shutil.copytree(HERE / case, folder)
    plain = json.loads((folder / file).read_text())
    for place in ((), ("config",)):
        for field in plain["config"] if place else plain:
            for value in ODD:
                data = json.loads(json.dumps(plain))
                (data["config"] if place else data)[field] = value
                (folder / file).write_text(json.dumps(data))
                with suppress(GatedAdaptersError):
                    read_adapterhub(folder)


def test_an_adapter_that_reads_the_sum_after_the_attention_of_a_llama_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    shutil.copytree(HERE / "llama-houlsby", folder)
    configured(original_ln_before=True)(folder)
    with pytest.raises(ArtifactError, match=r"sum after the attention[\s\S]*mh_adapter=False"):
        ga.import_adapterhub(model_for("llama-houlsby"), folder)


def test_another_model_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="another model"):
        ga.import_adapterhub(tiny("llama")[0], HERE / "bert-houlsby", head=False)
    with pytest.raises(GatedAdaptersError, match="no such folder"):
        ga.import_adapterhub(model_for("bert-houlsby"), tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"no counterpart[\s\S]*head=False"):
        ga.import_adapterhub(model_for("bert-houlsby", head=False), HERE / "bert-houlsby")
