"""The checks of every Trainer here: finite losses, labels inside the head, and checkpoints of what is trained."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from gatedadapters.backbone.fingerprint import is_own
from gatedadapters.errors import TaskError, TrainingError
from gatedadapters.gates.bank import current_key, is_new
from gatedadapters.masking.delta import find_delta
from gatedadapters.reporting.versions import versions
from gatedadapters.runtime.sharding import (
    all_must,
    check_alike,
    check_shardable,
    is_sharded,
    on_first,
    plain_name,
    whole,
)
from gatedadapters.runtime.steps import CLOCK, unwrapped
from gatedadapters.safe_files import file_errors
from gatedadapters.training.callback import FollowOptimizer
from gatedadapters.training.loss_scale import divides_by_count
from gatedadapters.training.resumable import check_resumable

_ALIKE = (
    "max_steps",
    "num_train_epochs",
    "gradient_accumulation_steps",
    "learning_rate",
    "optim",
    "seed",
    "data_seed",
    "save_strategy",
    "save_steps",
    "eval_strategy",
    "eval_steps",
    "max_grad_norm",
)
"""Arguments with which processes would wait for each other for ever, or train apart, if they differed."""
logger = logging.getLogger(__name__)

MASK, BACKBONE = "mask", "backbone"  # keys of a checkpoint's metadata; their values are digests


@contextmanager
def _accepted_if_quantized(model: Any) -> Iterator[None]:
    """While a Trainer is initialised with a quantised model, keep it from insisting on adapters of peft."""
    if not vars(model or object).get("is_quantized"):
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


class CheckedTrainer(Trainer):
    """transformers' Trainer, with checks of each training loss, and of a checkpoint before anything of it is loaded.

    A checkpoint holds what is trained, not the backbone, and an artefact of it.
    """

    _divides_by_count: bool | None = None
    """Whether the model divides its loss by `num_items_in_batch`; None until a batch has told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        begin = super().__init__
        files = file_errors("prepare the training", "the folder of the outputs")
        with files, _accepted_if_quantized(kwargs.get("model")):
            all_must(lambda: begin(*args, **kwargs))
        self.add_callback(FollowOptimizer())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task loss.

        Raises:
            TrainingError: the loss of a training step is not finite, a token id lies outside the vocabulary, or labels
                are text.
            TaskError: a label is not below the head's number of classes.
        """
        try:
            if num_items_in_batch is not None:
                num_items_in_batch = self._count_for(model, inputs, num_items_in_batch)
            # Some Trainers of TRL cannot return outputs, or pay for them with another forward pass.
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        except ValueError as error:  # the default collator leaves text out, so a label that is text is none
            check_labels(self.train_dataset, error)
            raise
        except IndexError as error:
            if "Target" not in str(error):
                check_vocabulary(model, inputs, self.state.global_step)
                raise
            width = getattr(getattr(self.model, "config", None), "num_labels", None)
            raise TaskError(
                "a label lies outside the head",
                expected="a label below the number of classes" if width is None else f"0..{width - 1}",
                got=error,
                where=f"optimiser step {self.state.global_step}",
                fix="check the label column and the model's num_labels",
            ) from error
        if model.training:
            loss = found[0] if isinstance(found, tuple) else found
            check_finite_loss(loss, self.state.global_step)
        return found

    def _count_for(self, model: nn.Module, inputs: dict[str, Any], count: Tensor | int) -> Tensor | int | None:
        """`count`, the number of items in all micro-batches of a step; None if the model does not divide by it.

        The Trainer leaves it to the model to divide its loss by that number, if its `forward` takes `**kwargs`. If the
        model was never seen doing so, the first batch with a loss shows whether it does. A model that does not gets the
        Trainer's own scaling from then on. Trainers that compute the loss themselves say how they scale it
        (`Trainer.loss_is_scaled_for_ga`), and are believed.
        """
        own = type(self).__mro__[type(self).__mro__.index(CheckedTrainer) + 1 :]
        by_model = next(kind for kind in own if "compute_loss" in vars(kind)) is Trainer
        by_model = by_model and self.compute_loss_func is None and self.label_smoother is None
        if self._divides_by_count is None and by_model and self.model_accepts_loss_kwargs:
            alone = cast(nn.Module, self.accelerator.unwrap_model(model))
            told = self._of_all_processes(divides_by_count(alone, inputs, count))
            self._divides_by_count = told
            if told is False:
                self.model_accepts_loss_kwargs = False
        return None if self._divides_by_count is False else count

    def _of_all_processes(self, told: bool | None) -> bool | None:
        """What the processes found out together; they have to scale alike."""
        votes = torch.tensor([told is True, told is False], device=self.args.device)
        divides, ignores = self.accelerator.gather(votes).view(-1, 2).any(0).tolist()
        return True if divides else False if ignores else None

    def get_train_dataloader(self) -> Any:
        """The Trainer's loader.

        Raises:
            TrainingError: there are no examples.
        """
        check_examples(self.train_dataset, "train_dataset")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's loader.

        Raises:
            TrainingError: there are no examples.
        """
        named = isinstance(eval_dataset, str) and isinstance(self.eval_dataset, Mapping)
        chosen = cast(Any, self.eval_dataset)[eval_dataset] if named else eval_dataset
        check_examples(self.eval_dataset if chosen is None else chosen, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next step.

        Raises:
            TrainingError: labels are text, which no tensor can hold.
        """
        try:
            return super().get_batch_samples(*args, **kwargs)
        except (ValueError, TypeError, RuntimeError) as error:
            check_labels(self.train_dataset, error)
            raise

    def _check_processes(self) -> None:
        """Check that all processes of this training have the same settings, data and libraries; called before anything
        that they do together.

        Raises:
            TrainingError: they differ.
        """
        check_alike(self._described(), where="the start of training")
        if (self.args.fsdp or _is_set("ACCELERATE_USE_FSDP")) and not self.is_fsdp_enabled:
            logger.warning("accelerate shards on accelerators alone: here every process holds the whole model")

    def _described(self) -> dict[str, object]:
        """What has to be the same on all processes, by what it is."""
        data: Any = self.train_dataset
        rows = len(data) if hasattr(data, "__len__") else "unknown"
        named = {name: getattr(self.args, name) for name in _ALIKE}
        named |= {"the number of training examples": rows, "the class of the trainer": type(self).__name__}
        return {f"the release of {name}": version for name, version in versions().items()} | named

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = str(self.args.output_dir)
        with file_errors("write the checkpoint", folder):
            all_must(lambda: _check_writable(folder))
            super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained; see the Trainer.

        Raises:
            FileAccessError: the file system refuses.
        """
        folder = output_dir or str(self.args.output_dir)
        with file_errors("write the model", folder):
            if not self.sharded:
                super().save_model(output_dir, _internal_call)
                return
            self._save(folder)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @property
    def sharded(self) -> bool:
        """Whether the model's weights are spread over the processes."""
        return isinstance(self.model, nn.Module) and is_sharded(self.model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        delta = find_delta(cast(nn.Module, self.model))
        if self.is_fsdp_enabled:
            check_shardable(cast(nn.Module, self.model))
        if delta is not None and self.is_fsdp_enabled:
            delta.stand_down()  # FSDP looks for the parameters; the first forward pass brings the stand-ins back
        self._prepare_anew()
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._follow_sharding()
        return prepared

    def _prepare_anew(self) -> None:
        """Let accelerate prepare the model for this training, although something else came before it.

        accelerate prepares a model once, and takes it as it is from then on. After an evaluation, several processes
        would each train by itself, because that needs no DistributedDataParallel; after a training in fp32, or one
        whose model was unwrapped, a training in bf16 would run in fp32.
        """
        model: Any = self.model
        if not self.sharded and getattr(model, "_is_accelerate_prepared", False):
            del model._is_accelerate_prepared
            if (forward := model.__dict__.pop("_original_forward", None)) is not None:
                model.forward = forward  # without autocast, which the training brings anew
            self.accelerator._models = [other for other in self.accelerator._models if other is not model]

    def _follow_sharding(self) -> None:
        """Once the model is sharded, let a sparse delta follow, and the optimiser learn what stands for its values."""
        delta = find_delta(cast(nn.Module, self.model))
        replaced = {} if delta is None else delta.follow_sharding()
        for group in cast(torch.optim.Optimizer, self.optimizer).param_groups if replaced else ():
            group["params"] = [replaced.get(id(parameter), parameter) for parameter in group["params"]]

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Leave it to `EndOfBackward`, which exchanges all gradients at once, where the Trainer exchanges each."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Without the model, which the Trainer writes here in full: what is trained is written already.
        plugin, accelerator = self.accelerator.state.fsdp_plugin, self.accelerator
        with _without_empty_groups(self.optimizer):
            save_fsdp_optimizer(plugin, accelerator, self.optimizer, self.model, output_dir)
        state, file = cast(LRScheduler, self.lr_scheduler).state_dict(), os.path.join(output_dir, SCHEDULER_NAME)
        on_first(True, lambda: torch.save(state, file))

    def _save_rng_state(self, output_dir: str) -> None:
        # All processes wait for each other: the first one then writes the state that makes the checkpoint a whole one.
        save = super()._save_rng_state
        all_must(lambda: save(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with CLOCK.silent(), _without_empty_groups(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        all_must(lambda: check_resumable(resume_from_checkpoint, sharded=self.is_fsdp_enabled))
        all_must(lambda: self._check_checkpoint(resume_from_checkpoint))
        self._follow_sharding()
        if self.sharded:
            self._load_trained(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._check_checkpoint(str(self.state.best_model_checkpoint))
        if self.sharded:
            self._load_trained(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _load_trained(self, folder: str) -> None:
        """Load what is trained from a checkpoint into a sharded model; every process takes its part."""
        state: dict[str, Any] = dict(load_file(os.path.join(folder, SAFE_WEIGHTS_NAME)))
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(cast(nn.Module, self.model), state, options=options)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save what is trained, without the backbone, and beside it what loads onto the backbone."""
        folder = str(output_dir if output_dir is not None else self.args.output_dir)
        if not (self.args.should_save or self.sharded):
            return
        state = state_dict if state_dict is not None else self.accelerator.unwrap_model(self.model).state_dict()
        trained = {plain_name(key): value for key, value in state.items() if self._is_trained(plain_name(key))}
        values = {key: whole(value.detach()).contiguous().cpu() for key, value in trained.items()}
        on_first(self.sharded, lambda: self._write(folder, values))
        self._write_artifact(folder)

    def _write(self, folder: str, trained: dict[str, Tensor]) -> None:
        """Write the values of what is trained, the arguments, and what prepares the model's inputs."""
        os.makedirs(folder, exist_ok=True)
        part = os.path.join(folder, f"{SAFE_WEIGHTS_NAME}.part")
        save_file(trained, part, metadata={"format": "pt", **self._origin()})
        os.replace(part, os.path.join(folder, SAFE_WEIGHTS_NAME))
        torch.save(_without_tokens(self.args), os.path.join(folder, "training_args.bin"))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint; the Trainer copies only files that it knows into the folder that it uploads."""
        if self.is_world_process_zero() or self.sharded:
            self._write_artifact(str(self.args.output_dir))
        args = self.args
        self.args = cast(TrainingArguments, _StoredWithoutTokens(args))  # the Trainer stores them in what it uploads
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self.args = args

    def _check_checkpoint(self, folder: str) -> None:
        """Compare a checkpoint's keys, shapes and digests with what is trained, before anything is changed.

        Raises:
            TrainingError: they differ, or the file cannot be read.
        """
        file = os.path.join(folder, SAFE_WEIGHTS_NAME)
        if not os.path.isfile(file):
            return  # the Trainer raises an error of its own
        stored, metadata = _read_header(file)
        found = {current_key(key) if is_own(key) else key: shape for key, shape in stored.items()}
        state = self.accelerator.unwrap_model(self.model).state_dict()
        wanted = {plain_name(key): tuple(value.shape) for key, value in state.items()}
        wanted = {key: shape for key, shape in wanted.items() if self._is_trained(key)}
        wrong = [
            f"{key} {found.get(key, 'missing')} for {wanted.get(key, 'none')}"
            for key in sorted(wanted.keys() | found.keys())
            if found.get(key) != wanted.get(key) and not (key not in found and is_new(key))
        ]
        # Different masks may choose equally many elements of every tensor; only their digests tell them apart.
        wrong = wrong or [f"values of another {k}" for k, own in self._origin().items() if metadata.get(k) != own]
        if wrong:
            raise TrainingError(
                "this checkpoint is of something else than what is trained",
                expected="what is attached to this model, and its heads",
                got="; ".join(wrong[:3]) + (f"; {len(wrong) - 3} more" if len(wrong) > 3 else ""),
                where=file,
                fix="attach and select with the space, tasks, heads, penalty, data and seed it was made with",
            )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Issue none: the backbone's keys are absent by design, and the others were checked before loading."""

    @abstractmethod
    def _is_trained(self, key: str) -> bool:
        """Whether a key of the model's state dict is trained, and therefore part of a checkpoint."""

    @abstractmethod
    def _write_artifact(self, folder: str) -> None:
        """Write what the library's readers load, beside the other files of a folder."""

    @abstractmethod
    def _origin(self) -> dict[str, str]:
        """Backbone and mask digests stored in checkpoint metadata, by name."""


def named_arguments(trainer: type[CheckedTrainer], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the Trainer that `trainer` builds on, by name.

    Each class's `__init__` takes what its parameters are, and passes on what came for `*args` to the next class.

    Raises:
        TypeError: there are too many, or one was given twice.
    """
    named, left = dict(kwargs), list(args)
    for kind in trainer.__mro__[trainer.__mro__.index(CheckedTrainer) + 1 :]:
        if "__init__" not in vars(kind) or not left:
            continue
        parameters = list(inspect.signature(vars(kind)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and left:
                if parameter.name in named:
                    raise TypeError(f"{trainer.__name__} got multiple values for argument {parameter.name!r}")
                named[parameter.name] = left.pop(0)
        if not any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
            break
    if left:
        raise TypeError(f"{trainer.__name__} got {len(left)} positional arguments too many")
    return named


@contextmanager
def _without_empty_groups(optimizer: Any) -> Iterator[None]:
    """Within this context the optimiser has no parameter groups that are empty: torch loses the settings of these."""
    inner = unwrapped(optimizer)
    groups = inner.param_groups
    inner.param_groups = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        filled = iter(inner.param_groups)
        inner.param_groups = [next(filled) if group["params"] else group for group in groups]


def _without_tokens(args: TrainingArguments) -> TrainingArguments:
    """A copy of the arguments that holds no token of the hub: a checkpoint is given to others."""
    shown = copy.copy(args)
    for name in vars(shown):
        if name.endswith("_token") and isinstance(getattr(shown, name), str):
            setattr(shown, name, None)
    return shown


class _StoredWithoutTokens:
    """Arguments that are what they are, but leave out the tokens of the hub where they are pickled."""

    def __init__(self, args: TrainingArguments) -> None:
        self._args = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (_without_tokens(self._args),)


def check_examples(data: Any, where: str) -> None:
    """Check that a data set of known length has examples.

    Raises:
        TrainingError: it has none.
    """
    if data is not None and hasattr(data, "__len__") and not isinstance(data, Mapping) and len(data) == 0:
        raise TrainingError(
            "there is nothing to train or evaluate on",
            expected="at least one example",
            got="an empty data set",
            where=where,
            fix="check what was filtered out of it, or leave it out",
        )


def check_labels(data: Any, error: Exception) -> None:
    """Check that the labels of a data set, which did not collate, are numbers.

    Raises:
        TrainingError: the first label is text; it comes from `error`.
    """
    first = data[0] if hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data) else None
    for name in ("labels", "label", "label_ids"):
        if isinstance(first, Mapping) and isinstance(first.get(name), str):
            raise TrainingError(
                "a label is text, and a loss needs numbers",
                expected="the number of its class: 0, 1, ...",
                got=repr(first[name])[:80],
                where=f"train_dataset, column {name!r}",
                fix="number the classes: dataset.class_encode_column, or gatedadapters.data.read_task",
            ) from error


def check_vocabulary(model: nn.Module, inputs: Mapping[str, Any], step: int) -> None:
    """Check that the token ids of a batch, which the model could not look up, are those of its vocabulary.

    Raises:
        TrainingError: one is not.
    """
    ids = inputs.get("input_ids")
    sizes = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
    if not isinstance(ids, Tensor) or not ids.numel() or not sizes:
        return
    largest, vocabulary = int(ids.max()), max(sizes)
    if largest >= vocabulary or int(ids.min()) < 0:
        raise TrainingError(
            "a token id lies outside the model's vocabulary",
            expected=f"0..{vocabulary - 1}",
            got=largest if largest >= vocabulary else int(ids.min()),
            where=f"input_ids, optimiser step {step}",
            fix="take the model's own tokenizer; after adding tokens, model.resize_token_embeddings(len(tokenizer))",
        )


def check_finite_loss(loss: Tensor, step: int) -> None:
    """Check that a training loss is finite.

    Args:
        loss: of any shape.
        step: the optimiser step, for the error.

    Raises:
        TrainingError: it is not finite.
    """
    if not bool(torch.isfinite(loss).all()):
        raise TrainingError(
            "the loss is not finite",
            expected="a finite loss",
            got=str(float(loss.detach().mean())),
            where=f"optimiser step {step}",
            fix="lower the learning rate or the penalty, clip gradients, or look for broken examples near this step",
        )


def check_launch(args: TrainingArguments) -> None:
    """Check how the arguments or the launcher will wrap the model.

    Raises:
        TrainingError: the wrapper copies modules or flattens their weights, which breaks hooks and gates; or it cannot
            follow re-entrant checkpointing; or nothing joins the processes of this launch.
    """
    plugin = getattr(args, "fsdp_plugin_args", None) or {}
    fsdp = bool(args.fsdp) or _is_set("ACCELERATE_USE_FSDP")
    version = plugin.get("fsdp_version", os.environ.get("FSDP_VERSION", 1))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    everywhere = not fsdp or not _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING")
    sharding = "fsdp_version: 2 in the file of accelerate launch --config_file, or TrainingArguments(fsdp=True)"
    wrapped = {
        "torch.nn.DataParallel over several devices in one process": (
            args.n_gpu > 1,
            "start one process for each device (torchrun), or make one device visible (CUDA_VISIBLE_DEVICES)",
        ),
        "FSDP of the first version": (fsdp and int(version) != 2, sharding),
        "DeepSpeed": (bool(args.deepspeed) or _is_set("ACCELERATE_USE_DEEPSPEED"), f"shard with FSDP2: {sharding}"),
        "FSDP's cpu_ram_efficient_loading": (not everywhere, "cpu_ram_efficient_loading: false"),
        f"{launched} processes of one launch, each of which would train by itself": (
            args.world_size == 1 and launched > 1 and "LOCAL_RANK" in os.environ,
            "TrainingArguments(use_cpu=True) on CPUs, without which accelerate joins processes on accelerators alone",
        ),
    }
    for name, (is_on, fix) in wrapped.items():
        if is_on:
            raise TrainingError(
                "gated models are not trained this way",
                expected="one device, one process for each device (DistributedDataParallel), or FSDP2",
                got=name,
                where="TrainingArguments",
                fix=fix,
            )
    if args.world_size > 1 and _checkpoints_reentrantly(args):
        raise TrainingError(
            "several processes cannot train gates under re-entrant checkpointing: each block's backward counts alone",
            expected="checkpointing that is not re-entrant",
            got="use_reentrant=True",
            where="TrainingArguments",
            fix='gradient_checkpointing_kwargs={"use_reentrant": False}',
        )


def _checkpoints_reentrantly(args: TrainingArguments) -> bool:
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # the new name and the old one
        options = getattr(args, f"{name}_kwargs", None)
        if getattr(args, name, False) and isinstance(options, dict) and options.get("use_reentrant"):
            return True
    return False


def _check_writable(folder: str) -> None:
    """Check that this process can write into a folder, which is made."""
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in {"1", "true", "yes", "y", "t", "on"}


def _read_header(file: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by name, and the metadata, of a checkpoint's weights, without reading the values.

    Raises:
        TrainingError: the file cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
            return shapes, stored.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            "this checkpoint cannot be read",
            expected="a safetensors file",
            got=str(error),
            where=file,
            fix="resume from an earlier checkpoint",
        ) from error
