"""A simulated update of a base, for users who have only one version of it: continued pretraining on given text."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from gatedadapters.backbone import discover
from gatedadapters.backbone.fingerprint import is_own
from gatedadapters.backbone.layout import undisturbed
from gatedadapters.errors import AttachError, DataError, TrainingError
from gatedadapters.supernet.attach import check_no_adapters

Piece = dict[str, list[int]]
_Collate = Callable[[list[Piece]], dict[str, Tensor]]
_HELD_OUT = 64  # pieces at most: enough to measure a loss, and quicker than the training


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """The size of a base update.

    Attributes:
        objective: of the training: `masked` or `causal` language modelling.
        steps: optimiser steps.
        tokens: how many tokens were trained on.
        weight_shift: ||new - old|| / ||old|| over all parameters.
        weight_shift_by_kind: the same over the linear maps of each kind of sub-layer, and over `rest` (embeddings,
            norms, heads).
        loss: before and after the update, on held-out pieces of the text that was trained on.
        other_loss: before and after the update, on other text; None where there is none.
    """

    objective: str
    steps: int
    tokens: int
    weight_shift: float
    weight_shift_by_kind: dict[str, float]
    loss: tuple[float, float]
    other_loss: tuple[float, float] | None = None

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {value:.2%}" for kind, value in self.weight_shift_by_kind.items())
        lines = [
            f"{self.objective} language modelling, {self.steps} steps, {self.tokens:,} tokens",
            f"weights moved by {self.weight_shift:.2%} ({kinds})",
            f"loss on its own text {self.loss[0]:.3f} -> {self.loss[1]:.3f}",
        ]
        if self.other_loss is not None:
            lines.append(f"loss on other text {self.other_loss[0]:.3f} -> {self.other_loss[1]:.3f}")
        return "\n".join(lines)

    def to_data(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def simulate_update(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    steps: int = 100,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    length: int = 128,
    mask_share: float = 0.15,
    other_texts: Sequence[str] = (),
    bf16: bool = False,
    seed: int = 0,
) -> UpdateReport:
    """Continue the pretraining of `model` in place, so that it becomes an updated version of itself.

    transformers' Trainer trains encoders by masked and decoders by causal language modelling. The texts are joined and
    cut into pieces of `length` tokens; a tenth of the pieces, at most 64, is held out. Keep the old version first: make
    a deep copy, or load it again with `from_pretrained`.

    Args:
        model: with a language-modelling head (AutoModelForMaskedLM, AutoModelForCausalLM) and nothing attached. Frozen
            parameters stay as they are.
        tokenizer: of the model.
        texts: what the model is trained on.
        steps: optimiser steps. More steps, or a higher rate, give a larger shift.
        learning_rate: peak rate. It rises in the first tenth of the steps, then falls linearly.
        batch_size: pieces per step.
        length: tokens of a piece.
        mask_share: share of the tokens that are masked, for encoders.
        other_texts: text to measure a second loss on, which shows what the update costs elsewhere.
        bf16: train in bfloat16 autocast.
        seed: of the order of pieces and of masks.

    Raises:
        TrainingError: the model has no language-modelling head, every parameter of it is frozen, or it is a masked
            language model whose tokenizer has no mask token.
        AttachError: adapters or a sparse delta are attached.
        DataError: there is too little text.

    The model is left untouched by all of them.
    """
    objective = _objective(model)
    _check_bare(model)
    pieces = _pieces(tokenizer, texts, length)
    held_out = min(max(1, len(pieces) // 10), _HELD_OUT)
    if len(pieces) - held_out < batch_size:
        raise DataError(
            "there is too little text to train on",
            expected=f"at least {batch_size + held_out} pieces of {length} tokens",
            got=f"{len(pieces)}",
            where="simulate_update(texts=)",
            fix="give more text, or a smaller length or batch_size",
        )
    other = _pieces(tokenizer, other_texts, length)[:held_out]
    if other_texts and not other:
        raise DataError(
            "there is too little other text to measure a loss on",
            expected=f"a piece of {length} tokens",
            got="none",
            where="simulate_update(other_texts=)",
            fix="give more, or a smaller length",
        )
    masked = objective == "masked"
    collate = _collator(tokenizer, masked, mask_share, seed)
    parts = [part for part in (pieces[:held_out], other) if part]
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before = [_loss(model, part, tokenizer, masked, mask_share, batch_size) for part in parts]
    with tempfile.TemporaryDirectory(prefix="gatedadapters-") as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=math.ceil(0.1 * steps),
            seed=seed,
            bf16=bf16,
            use_cpu=next(model.parameters()).device.type == "cpu",
            save_strategy="no",
            report_to="none",
            logging_steps=steps,
            dataloader_pin_memory=False,
            dataloader_drop_last=True,  # every step is as large as the report says
        )
        data: Any = pieces[held_out:]
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    after = [_loss(model, part, tokenizer, masked, mask_share, batch_size) for part in parts]
    total, by_kind = _weight_shift(model, old)
    return UpdateReport(
        objective,
        steps,
        steps * batch_size * length,
        total,
        by_kind,
        (before[0], after[0]),
        (before[1], after[1]) if other else None,
    )


def _objective(model: nn.Module) -> str:
    """`causal` or `masked`, by the class of the model.

    Raises:
        TrainingError: it is neither a causal nor a masked language model.
    """
    name = type(model).__name__
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal"
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "masked"
    raise TrainingError(
        "only a language model can be pretrained on",
        expected="a model with a masked or causal language-modelling head",
        got=name,
        where="simulate_update",
        fix="load it with AutoModelForMaskedLM or AutoModelForCausalLM",
    )


def _check_bare(model: nn.Module) -> None:
    """Check that nothing is attached to the model, which would be trained in its place, and that it can be trained.

    Raises:
        AttachError: adapters, a sparse delta or peft's adapters are attached.
        TrainingError: every parameter is frozen.
    """
    check_no_adapters(model)
    own = [name for name, _ in model.named_parameters() if is_own(name)]
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]  # by peft
    if own or wrapped:
        raise AttachError(
            "an update is of a base alone",
            expected="a model with nothing attached",
            got=f"a sparse delta: {own[0]}" if own else f"a peft adapter at {wrapped[0]}",
            where=f"simulate_update({type(model).__name__})",
            fix="take it out of the model, or load the base anew",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            "every parameter of this model is frozen",
            expected="parameters that can be trained",
            got="requires_grad=False for all",
            where=f"simulate_update({type(model).__name__})",
            fix="model.requires_grad_(True)",
        )


def _collator(tokenizer: PreTrainedTokenizerBase, masked: bool, share: float, seed: int) -> _Collate:
    """From pieces to a batch: with random masks for encoders, unchanged for decoders. All pieces have one length.

    Raises:
        TrainingError: masks are needed, and the tokenizer has no mask token.
    """
    if not masked:
        return _stacked
    if tokenizer.mask_token is None:
        raise TrainingError(
            "a masked language model is trained on masks",
            expected="a tokenizer with a mask token",
            got="none",
            where="simulate_update(tokenizer=)",
            fix="give the model's own tokenizer, or set tokenizer.mask_token",
        )
    collate: _Collate = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=share, seed=seed)
    return collate


def _stacked(pieces: list[Piece]) -> dict[str, Tensor]:
    """From pieces to a batch whose labels are its tokens."""
    batch = {key: torch.tensor([piece[key] for piece in pieces]) for key in pieces[0]}
    return {**batch, "labels": batch["input_ids"].clone()}


def _pieces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> list[Piece]:
    """All texts as tokens, joined and cut into pieces of one length; the rest is left out."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"]
    starts = range(0, len(ids) - length + 1, length)
    return [{"input_ids": ids[i : i + length], "attention_mask": [1] * length} for i in starts]


def _loss(
    model: nn.Module, pieces: Any, tokenizer: PreTrainedTokenizerBase, masked: bool, share: float, batch: int
) -> float:
    """The loss, averaged over batches. Masks are the same in every call."""
    collate = _collator(tokenizer, masked, share, 0)
    device = next(model.parameters()).device
    batches = DataLoader(pieces, batch_size=batch, collate_fn=collate)
    with undisturbed(model):
        losses = [model(**{key: value.to(device) for key, value in inputs.items()}).loss for inputs in batches]
    return float(torch.stack(losses).mean())


def _weight_shift(model: nn.Module, old: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """`weight_shift` and `weight_shift_by_kind` of an `UpdateReport`."""
    kinds = {f"{m.name}.{m.parameter}": sublayer.kind for _, sublayer, m in discover(model).maps()}
    sums: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - old[name]).float().square().sum()
        entry = sums.setdefault(kinds.get(name, "rest"), [0.0, 0.0])
        entry[0] += float(moved)
        entry[1] += float(old[name].float().square().sum())
    moved_all, size_all = (sum(entry[i] for entry in sums.values()) for i in (0, 1))
    return (moved_all / size_all) ** 0.5, {kind: (a / max(b, 1e-30)) ** 0.5 for kind, (a, b) in sorted(sums.items())}
