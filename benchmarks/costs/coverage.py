"""Claim: adapters reach every weight matrix of every family, and what is left is named.

A matrix is any parameter of two or more dimensions (each expert's counts) but embeddings, biases, the kernels of
convolutions along the tokens and the state matrices of recurrences, which multiply element by element. That rule is
written here, not taken from what discovery finds. "Reached" means that a LoRA stands there: ours from the preset
`lora-all-linear` with the maps outside the blocks added, peft's from `target_modules="all-linear"`. The models are the
tiny ones of the zoo, built from a fixed seed, so the table is the same on every machine.

    python -m benchmarks coverage           # prints the table
    python -m benchmarks coverage --write   # and stores it as docs/coverage.md
"""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import nn

from benchmarks.common.store import BENCHMARKS, write_whole
from gatedadapters.backbone import Layout, discover
from gatedadapters.config import SearchSpace
from gatedadapters.config.space import Where
from gatedadapters.paths.lora import LoRAOptions
from gatedadapters.paths.weight_lora import WeightLoRAOptions
from gatedadapters.supernet.attach import candidates
from gatedadapters.testing.backbones import FAMILIES, tiny

DOCUMENT = BENCHMARKS.parent / "docs" / "coverage.md"
STATE = re.compile(r"(^|\.)A_log$")


@dataclass(frozen=True)
class Coverage:
    """What is reached of one family's matrices, by number of matrices and of their elements."""

    family: str
    matrices: int
    elements: int
    ours: tuple[int, int]
    peft: tuple[int, int] | str  # or why peft refused
    left: tuple[str, ...]


def matrices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(matrices, elements) of every weight that counts, by its full name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d):
            continue
        for parameter, value in module.named_parameters(recurse=False):
            full = f"{name}.{parameter}".lstrip(".")
            if value.dim() >= 2 and not parameter.endswith("bias") and not STATE.search(full):
                found[full] = (value.shape[0] if value.dim() == 3 else 1, value.numel())
    return found


def everything() -> SearchSpace:
    """`lora-all-linear`, outside the blocks too."""
    space = SearchSpace.load("lora-all-linear")
    outside = Where(sublayers=("outside",))
    return space.model_copy(update={"paths": (*space.paths, LoRAOptions(at=outside), WeightLoRAOptions(at=outside))})


def ours(layout: Layout) -> dict[str, str]:
    """Weights that a candidate stands at, by full name; the rest of the layout with the reason."""
    found, skipped_sites = candidates(everything(), layout)
    points = (site.tap for _, site in found.values())
    reached = {f"{point.module}.{point.parameter or 'weight'}": "" for point in points}
    left = {skipped.module: skipped.reason for skipped in skipped_sites} | {u.name: u.reason for u in layout.unknown}
    return {**left, **reached}


def theirs(family: str) -> set[str] | str:
    """Weights under a peft LoRA, or why it refused."""
    import peft

    model, _ = tiny(family)
    try:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    except Exception as error:
        reason = str(error).splitlines()[0]
        ordered = re.sub(r"\{(.*?)\}", lambda found: f"{{{', '.join(sorted(found[1].split(', ')))}}}", reason)  # sets
        return f"{type(error).__name__}: {ordered}"
    reached = set()
    for name, module in wrapped.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            place = name.removeprefix("base_model.model.").replace(".base_layer", "")
            reached.add(f"{place}.{getattr(module, 'parameter_name', 'weight')}")
    return reached


def cover(family: str) -> Coverage:
    """Both sides of one family."""
    model, batch = tiny(family)
    all_of_them, layout = matrices(model), discover(model, batch)
    status, peft = ours(layout), theirs(family)

    def share(reached: Mapping[str, object] | set[str]) -> tuple[int, int]:
        counts = [count for name, count in all_of_them.items() if name in reached]
        return sum(n for n, _ in counts), sum(elements for _, elements in counts)

    left = tuple(f"{n}: {status.get(n, 'not discovered')}" for n in all_of_them if status.get(n, "not discovered"))
    return Coverage(
        family,
        *share(all_of_them),
        share({name for name, reason in status.items() if not reason}),
        peft if isinstance(peft, str) else share(peft),
        left,
    )


def percent(part: int, whole: int) -> str:
    """Rounded down, so that 100 means all."""
    return f"{1000 * part // whole / 10:g}"


HEAD = """\
# What adapters reach

Share of the weight matrices (each expert's counts) and of their elements at which a LoRA can stand: here from
the preset `lora-all-linear` with the maps outside the blocks added (`sublayers: [outside]`), in peft {peft}
from `target_modules="all-linear"`. Tiny random models, transformers {transformers}; written by
`python -m benchmarks coverage --write`, whose head says what counts as a matrix.

| family | matrices | ours, % | of elements, % | peft, % | of elements, % |
|---|--:|--:|--:|--:|--:|
"""
NOTES = """
Beside the matrices, kernels of convolutions along the tokens and state matrices of recurrences (`A_log`) stay
as they are: they multiply element by element, so that a low-rank factor has no meaning there.

Where a module takes a map's input and returns its output, `lora` stands around it. Fused experts, routers that
choose, and Mamba's time-step projection, whose weight is used without calling it, have no such module;
`weight_lora` stands at the weight itself, where each expert has ranks of its own: `rank` units of in + out
parameters at every expert, chosen one by one. At stacks of experts, with the `eager`, `batched_mm` and
`grouped_mm` implementations of transformers, it costs low-rank products on the tokens and no copy of the
weights; with other implementations, under `torch.compile`, and at single matrices, one copy of the weight a
call. A batch of several tasks runs through such modules one task after the other, each token once.

## What is not reached, and what helps

`gatedadapters plan` and `adapters.reach` say which share of the blocks and matrices a search space reaches. They list
the rest by role, with the reason and a way that works:

- Roles that the space leaves out: the path to add to it.
- Maps that the sample does not call. LED and Longformer have maps of their own for global attention: attach with a
  batch that holds a `global_attention_mask`.
- Weights that are no matrix in a product. XLNet keeps its attention maps, and Funnel its maps of relative positions,
  as raw parameters of other shapes. SqueezeBERT computes all maps by grouped 1 x 1 convolutions, on features that
  come before the positions, so that `attach` finds no blocks in it. Elements of such weights are tuned by a mask,
  which needs no layout:

```python
import torch
from transformers import SqueezeBertConfig, SqueezeBertForSequenceClassification

import gatedadapters as ga

tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
model = SqueezeBertForSequenceClassification(SqueezeBertConfig(vocab_size=99, embedding_size=32, **tiny))
batch = {"input_ids": torch.randint(99, (2, 8)), "labels": torch.tensor([0, 1])}
scores = ga.score(model, [batch], kind="taylor")
delta = ga.apply_mask(model, ga.select(scores, density=0.05, include=["*.attention.*.weight"]))
model(**batch).loss.backward()
assert all(parameter.grad is not None for parameter in delta.parameters())
```

## Vision and audio

A model of images gets a blank one as its sample. For sound, and for images with text, give the batch that the processor
makes. Convolutions before the blocks stay as they are.

```python
from transformers import ViTConfig, ViTForImageClassification

images = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **tiny))
adapters = ga.attach(images, "encoder-mixed")
assert adapters.reach.blocks == (2, 2)
print(adapters.reach)
```

```python
from transformers import CLIPConfig, CLIPModel

text = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **tiny}
towers = {"text_config": text, "vision_config": {"image_size": 32, "patch_size": 8, **tiny}}
pairs = CLIPModel(CLIPConfig(**towers, projection_dim=24))
batch = {"input_ids": torch.randint(3, 99, (2, 8)), "pixel_values": torch.rand(2, 3, 32, 32)}
adapters = ga.attach(pairs, "lora-all-linear", batch)
assert adapters.reach.blocks == (4, 4)  # of the text tower and of the image tower
```

```python
from transformers import WhisperConfig, WhisperForConditionalGeneration

sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
sizes = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in sizes.items()}
special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
frames = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
config = WhisperConfig(vocab_size=99, d_model=32, **sizes, **special, **frames)
speech = WhisperForConditionalGeneration(config)
batch = {"input_features": torch.rand(2, 8, 32), "labels": torch.randint(3, 99, (2, 6))}
adapters = ga.attach(speech, "lora-all-linear", batch)
assert adapters.reach.blocks == (4, 4)
speech(**batch).loss.backward()
```

```python
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

layers = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2}
positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
sound = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**layers, **positions, **tiny))
batch = {"input_values": torch.rand(2, 800), "labels": torch.tensor([0, 1])}
adapters = ga.attach(sound, "encoder-mixed", batch)
assert adapters.reach.blocks == (2, 2)
sound(**batch).loss.backward()
```

## How it was measured

Measured with the PyTorch code of transformers. Fused training kernels for Mamba (`mamba-ssm`) take the weights of
`x_proj` and `out_proj` without calling these modules, so that what stands around them does nothing there.
"""


def table(rows: list[Coverage]) -> str:
    """The document."""
    lines = []
    for row in rows:
        here = f"{percent(row.ours[0], row.matrices)} | {percent(row.ours[1], row.elements)}"
        there = "refused |"
        if not isinstance(row.peft, str):
            there = f"{percent(row.peft[0], row.matrices)} | {percent(row.peft[1], row.elements)}"
        lines.append(f"| {row.family} | {row.matrices} | {here} | {there} |\n")
    left = [f"- {row.family}: {line}\n" for row in rows for line in row.left] or ["- nothing\n"]
    refused = [f"- {row.family}: {row.peft}\n" for row in rows if isinstance(row.peft, str)]
    refused = ["\nRefused by peft:\n\n", *refused] if refused else []
    head = HEAD.format(peft=version("peft"), transformers=version("transformers"))
    return "".join([head, *lines, "\nNot reached by ours:\n\n", *left, *refused, NOTES])


def measure() -> list[Coverage]:
    """Every family, in the order of the zoo."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [cover(family) for family in FAMILIES]
    finally:
        logging.disable(logging.NOTSET)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = argparse.ArgumentParser(prog="python -m benchmarks coverage", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--write", action="store_true", help=f"store the table as {DOCUMENT.name} in docs/")
    options = made.parse_args(arguments)
    text = table(measure())
    print(text)
    if options.write:
        write_whole(DOCUMENT, text)
