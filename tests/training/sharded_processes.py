"""What each of several processes runs for `test_sharded.py`; its outcomes are written to a file for each rank.

RANK=... WORLD_SIZE=... python sharded_processes.py FOLDER
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from recipes import SOON, SPACE, arguments, continued, gated_causal, gated_classifier, labelled, trained, with_dropout
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gatedadapters as ga
from gatedadapters.errors import GatedAdaptersError
from gatedadapters.runtime.sharding import local, reshard, whole
from gatedadapters.testing import tiny

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEPS, ROWS = 6, 4  # optimiser steps, and examples of each, however many processes share them
LINEAR = ga.SearchSpace.parse(
    {
        "gates": {"levels": ["path", "rank"]},
        "paths": [
            {"kind": "lora", "rank": 4, "at": {"roles": ["q", "v", "down"]}},
            {"kind": "weight_lora", "rank": 2},
            {"kind": "elements", "k": 8, "chunk": 4},
            {"kind": "norm"},
            {"kind": "scale", "side": "output", "at": {"sublayers": ["attention"], "roles": ["k", "v"]}},
        ],
    },
    where="sharded_processes",
)
"""Every kind that merges, hooked in every way: at modules, at weights and at norms."""

ORDERS: dict[str, dict[str, Any]] = {
    "attached before": {},
    "attached after": {"after": True},
    "kept whole between the passes": {"reshard_after_forward": False},
    "checkpointed": {"after": True, "checkpointed": True},
    "with a head": {"heads": ["lm_head"]},
    "experts": {"family": "mixtral"},
}
POLICIES: dict[str, dict[str, Any]] = {
    "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}
HAS_4_BITS = find_spec("bitsandbytes") is not None
SCORES = ("taylor", "magnitude", "random", "synaptic", "fisher")


def shard(model: Any, **options: Any) -> None:
    """`fully_shard` on every block and on the model."""
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)


def own_batch(rows: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
    """This process's share of a step's examples, with the number of labels in all of them."""
    every, each = rows[ROWS * step : ROWS * (step + 1)], ROWS // WORLD
    own = every[each * RANK : each * (RANK + 1)]
    batch = {name: torch.tensor([row[name] for row in own]) for name in own[0]}
    return batch | {"num_items_in_batch": torch.tensor(sum(x != -100 for row in every for x in row["labels"][1:]))}


def by_hand(
    *,
    family: str = "llama",
    after: bool = False,
    checkpointed: bool = False,
    heads: Any = None,
    rate: float = 1e-2,
    **options: Any,
) -> dict[str, Any]:
    """A search in a plain loop, pruned after four of its six steps; then compacted, merged and unmerged."""
    model: Any
    model, _ = tiny(family, head="lm")
    with_dropout(model, 0.0)
    if WORLD > 1 and after:
        shard(model, **options)
    adapters = ga.attach(model, LINEAR, heads=heads)
    if WORLD > 1 and not after:
        shard(model, **options)
    if checkpointed:
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # its older name
        getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    adapters.set_penalty(ga.Budget(fraction=0.3), schedule=SOON, total_steps=STEPS)
    optimizer = torch.optim.AdamW(adapters.parameter_groups(rate, gate_learning_rate=0.5))
    rows, gradients, fixed = continued(ROWS * STEPS), [], []
    model.train()
    for step in range(STEPS):
        loss = model(**own_batch(rows, step)).loss  # divided by the labels of all processes
        (loss * WORLD + adapters.penalty()).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append({name: whole(gradient).clone() for name, gradient in found.items()})
        optimizer.step()
        optimizer.zero_grad()
        fixed.append(adapters.structure is not None)
    assert adapters.structure is not None
    gates = adapters._gates().log_alpha.detach().clone()
    kept = {record.key: record.kept for record in adapters.structure.paths}
    shares = max(whole_share(block) for block in model.model.layers)
    model.eval()
    adapters.compact()
    compact = logits_of(model, rows)
    drift = adapters.merge().worst
    merged = logits_of(model, rows)
    adapters.unmerge()
    return {
        "gradients": gradients,
        "gates": gates,
        "kept": kept,
        "fixed": fixed,
        "logits": compact,
        "merged": merged,
        "drift": drift,
        "unmerged": logits_of(model, rows),
        "share of a block's weights here": shares,
    }


def halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A batch in two micro-batches; one of a single example as it is."""
    count = len(batch["input_ids"])
    split = [slice(count // 2), slice(count // 2, None)] if count > 1 else [slice(None)]
    return [{name: value if value.dim() == 0 else value[part] for name, value in batch.items()} for part in split]


def logits_of(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    """What the model says of the first rows."""
    ids = torch.tensor([row["input_ids"] for row in rows[:ROWS]])
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits.clone()
    return found


def whole_share(module: nn.Module) -> float:
    """Share of a module's elements that this process holds."""
    own = [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]
    return sum(p.numel() for p in own) / sum(p.numel() for p in module.parameters())


def policy(name: str) -> dict[str, Any]:
    """One step under an FSDP policy; what learns keeps its precision."""
    model, _ = tiny("llama", head="lm")
    adapters = ga.attach(with_dropout(model, 0.0), SPACE)
    shard(model, **POLICIES[name])
    rows = continued(ROWS)
    loss = model.train()(**own_batch(rows, 0)).loss
    loss.backward()
    torch.optim.AdamW(adapters.parameter_groups(1e-2)).step()
    state = trained(model)
    return {"types": {value.dtype for value in state.values() if value.is_floating_point()}, "loss": loss.detach()}


def through_accelerate(
    folder: Path, model: Any, data: Any, *, resume: Path | None = None, config: Any = None, **changes: Any
) -> ga.GatedTrainer:
    """A trained `GatedTrainer`; on several processes, sharded by accelerate."""
    settings: dict[str, Any] = {"max_steps": 8, **changes}
    if WORLD > 1:
        settings["fsdp"] = True
        settings["fsdp_config"] = {"transformer_layer_cls_to_wrap": block_classes(model), **(config or {})}
    args = arguments(folder, per_device_train_batch_size=ROWS // WORLD, **settings)
    if WORLD > 1:
        as_on_accelerators(args)
    trainer = ga.GatedTrainer(
        model, args, train_dataset=data, budget=ga.Budget(fraction=0.3), schedule=SOON, gate_learning_rate=1.0
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def as_on_accelerators(args: TrainingArguments) -> None:
    """Let accelerate shard on CPUs what it shards on GPUs alone: on CPUs it falls back to DistributedDataParallel."""
    assert args.device.type == "cpu"  # the process group is there from here on
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def block_classes(model: nn.Module) -> list[str]:
    """Names of the classes of a model's blocks."""
    return [
        name for name in ("LlamaDecoderLayer", "BertLayer") if any(type(m).__name__ == name for m in model.modules())
    ]


def trainer_outcome(trainer: ga.GatedTrainer) -> dict[str, Any]:
    """What a training ended with."""
    adapters = trainer.adapters
    assert adapters.structure is not None
    return {
        "state": {name: whole(value) for name, value in trained(adapters.model).items()},
        "kept": {record.key: record.kept for record in adapters.structure.paths},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def classifier(folder: Path) -> dict[str, Any]:
    """A classifier of two tasks, whose heads are sharded; saved compact, by the trainer and as a model."""
    model, data = gated_classifier({"a": 3, "b": 2}), labelled([12, 12], [3, 2])
    trainer = through_accelerate(folder / "classifier", model, data, save_strategy="steps", save_steps=8)
    outcome = trainer_outcome(trainer)
    trainer.save_model(str(folder / f"by the trainer {WORLD}"))
    trainer.adapters.compact()
    trainer.adapters.save(folder / f"compact {WORLD}")
    return outcome


WITH_WRAPPERS = {"activation_checkpointing": True, "state_dict_type": "SHARDED_STATE_DICT"}


def saving(folder: Path) -> dict[str, Any]:
    """A causal model under FSDP's own checkpointing, which leaves sharded checkpoints; exported to peft."""
    changes = {"config": WITH_WRAPPERS, "save_strategy": "steps", "save_steps": 2}
    trainer = through_accelerate(folder / "saving", gated_causal(), continued(24), **changes)
    outcome = trainer_outcome(trainer)
    trainer.adapters.compact()
    ga.export_peft(trainer.adapters, folder / f"peft {WORLD}")
    return outcome


def resumed(folder: Path, step: int) -> dict[str, Any]:
    """The same from a checkpoint that two processes left."""
    place = folder / f"resumed {step} on {WORLD}"
    checkpoint = folder / "saving" / f"checkpoint-{step}"
    changes = {"config": WITH_WRAPPERS, "resume": checkpoint}
    return trainer_outcome(through_accelerate(place, gated_causal(), continued(24), **changes))


def masks(kind: str) -> dict[str, Any]:
    """A mask from scores of the same batches on all processes."""
    model, _ = tiny("llama", head="lm")
    with_dropout(model, 0.0)
    if WORLD > 1:
        shard(model)
    rows = continued(8)
    batches = [{name: torch.tensor([row[name]]) for name in row} for row in rows]
    scores = ga.score(model, batches, kind=kind)
    mask = ga.select(scores, density=0.05)
    return {"scores": {name: scores[name].clone() for name in scores.names}, "mask": mask.digest, "made": mask}


def tuned() -> dict[str, Any]:
    """A sparse delta that is trained and removed."""
    model: Any
    model, _ = tiny("llama", head="lm")
    with_dropout(model, 0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if WORLD > 1:
        shard(model)
    delta = ga.apply_mask(model, ga.select(ga.score(model, kind="random"), density=0.1))
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    rows = continued(ROWS * STEPS)
    model.train()
    for step in range(STEPS):
        for micro_batch in halves(own_batch(rows, step)):
            (model(**micro_batch).loss * WORLD).backward()
        optimizer.step()
        optimizer.zero_grad()
    share = sum(local(part.values).numel() for part in delta.parts()) / delta.params
    values = {name: whole(part.values.detach()).clone() for name, part in delta.items()}
    written = {name: part.present().clone() for name, part in delta.items()}
    model.eval()
    logits = logits_of(model, rows)
    delta.remove()
    after_removal = {name: whole(p.detach()) for name, p in model.named_parameters()}
    restored = all(torch.equal(before[name], value) for name, value in after_removal.items())
    found = {"values": values, "written": written, "logits": logits, "restored": restored}
    return found | {"share of the values here": share}


def tuned_by_trainer(folder: Path, resume: Path | None = None) -> dict[str, Any]:
    """A `SelectiveTrainer` that selects, is sharded by accelerate, and saves; or that resumes from a checkpoint."""
    model, _ = tiny("llama", head="lm")
    with_dropout(model, 0.0)
    settings: dict[str, Any] = {"max_steps": 4}
    if resume is None:
        settings |= {"save_strategy": "steps", "save_steps": 2}
    if WORLD > 1:
        settings |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": block_classes(model)}}
    args = arguments(folder / f"tuned on {WORLD}", per_device_train_batch_size=ROWS // WORLD, **settings)
    if WORLD > 1:
        as_on_accelerators(args)
    selection = ga.SelectionConfig(kind="magnitude", protect=0.9)
    trainer = ga.SelectiveTrainer(
        model, args, train_dataset=continued(24), general_dataset=continued(8), selection=selection
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return {name: whole(part.values.detach()).clone() for name, part in trainer.delta.items()}


def _masked_before_sharding() -> None:
    model, _ = tiny("llama", head="lm")
    ga.apply_mask(model, ga.select(ga.score(model, kind="magnitude"), density=0.1))
    shard(model)
    model.train()(**own_batch(continued(ROWS), 0))


def _changed_on_one() -> None:
    model, _ = tiny("llama", head="lm")
    shard(model)
    delta = ga.apply_mask(model, ga.select(ga.score(model, kind="magnitude"), density=0.1))
    model(**own_batch(continued(ROWS), 0)).loss.backward()
    if RANK:
        reshard(model)
        with torch.no_grad():
            for part in delta.parts():
                local(part.weight).add_(1.0)
    torch.optim.AdamW(delta.parameters(), lr=1e-2).step()


def allocated() -> Any:
    """The structure of a probe on the same batches on all processes."""
    model, _ = tiny("llama", head="lm")
    with_dropout(model, 0.0)
    if WORLD > 1:
        shard(model)
    batches = [{name: torch.tensor([row[name] for row in rows]) for name in rows[0]} for rows in [continued(4)] * 8]
    structure = ga.allocate(model, SPACE, batches, budget=ga.Budget(fraction=0.3), probe_batches=8, progress=False)
    return {record.key: record.kept for record in structure.paths}


def joint(folder: Path) -> Tensor:
    """Logits of adapters and a delta that were saved together, loaded onto shards where there are several processes."""
    model: Any
    model, _ = tiny("llama", head="lm")
    with_dropout(model, 0.0)
    if WORLD > 1:
        shard(model)
    ga.load_joint(model, folder / "joint")
    return logits_of(model.eval(), continued(ROWS))


def save_joint(folder: Path) -> None:
    """Adapters and a delta with values of their own, trained by nobody."""
    model, _ = tiny("llama", head="lm")
    delta = ga.apply_mask(model, ga.select(ga.score(model, kind="magnitude"), density=0.05))
    adapters = ga.attach(model, SPACE)
    with torch.no_grad():
        for parameter in (*adapters.weight_parameters(), *delta.parameters()):
            parameter.add_(0.1)
    delta.write()
    adapters.compact()
    ga.save_joint(model, folder / "joint")


def frozen_head(folder: Path) -> list[float]:
    """Losses of a classifier whose head is not trained."""
    model, _ = tiny("bert", head="classification")
    ga.attach(with_dropout(model, 0.0), SPACE, heads=())
    changes: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 2}
    trainer = through_accelerate(folder / f"frozen head {WORLD}", model, labelled([24]), **changes)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def save_wide(folder: Path) -> None:
    """A model that is wide enough for blocks of 64 values."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
    tiny("llama", head="lm", **sizes)[0].save_pretrained(folder / "wide")


def quantised(folder: Path, **options: Any) -> Any:
    """That model, quantised by bitsandbytes."""
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **options)
    return LlamaForCausalLM.from_pretrained(folder / "wide", quantization_config=config)


def in_4_bits(folder: Path, place: Path) -> dict[str, Any]:
    """A search over 4-bit weights."""
    model = quantised(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ga.attach(model, SPACE)
    return trainer_outcome(through_accelerate(place / f"4 bits on {WORLD}", model, continued(24), max_steps=6))


def _in_8_bits(folder: Path) -> None:
    model = quantised(folder, load_in_8bit=True)
    ga.attach(model, SPACE)
    through_accelerate(folder / "8 bits", model, continued(24))


def _attached_to_4_bits(folder: Path) -> None:
    model = quantised(folder, load_in_4bit=True)
    shard(model)
    ga.attach(model, SPACE)


def _differently(**options: Any) -> None:
    """Train where one process has other settings than the others."""
    data = continued(24 if RANK or "rows" not in options else 12)
    seed = options.get("seed", 0) if RANK else 0
    model, _ = tiny("llama", head="lm")
    ga.attach(with_dropout(model, 0.0), SPACE, seed=seed)
    changes = {"learning_rate": options["rate"]} if RANK and "rate" in options else {}
    through_accelerate(Path("unused"), model, data, **changes)


def _other_weights() -> None:
    model, _ = tiny("llama", head="lm")
    adapters = ga.attach(with_dropout(model, 0.0), SPACE)
    shard(model)
    if RANK:
        with torch.no_grad():
            adapters.weight_parameters()[0].add_(1.0)
    model.train()(**own_batch(continued(ROWS), 0))


def _other_library() -> None:
    from gatedadapters.training import checked

    found = checked.versions
    checked.versions = (lambda: found() | {"torch": "2.0"}) if RANK else found  # type: ignore[assignment]
    try:
        _differently()
    finally:
        checked.versions = found


def _no_disk(folder: Path, rank: int) -> None:
    model = gated_causal()
    place = folder / f"no disk on {rank}"
    if rank == RANK:
        (folder / "a file").write_text("")
        place = folder / "a file" / "below"
    through_accelerate(place, model, continued(24), save_strategy="steps", save_steps=2, max_steps=2)


def _disk_full_on_the_second(folder: Path) -> None:
    """The second process cannot write its random numbers, the last of a checkpoint that it has to write."""
    save = Trainer._save_rng_state
    if RANK == 1:
        Trainer._save_rng_state = _full_disk  # type: ignore[method-assign]
    try:
        changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        through_accelerate(folder / "full disk", gated_causal(), continued(24), **changes)
    finally:
        Trainer._save_rng_state = save  # type: ignore[method-assign]


def _full_disk(trainer: Trainer, folder: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{folder}/rng_state_{RANK}.pth")


def _save_without_disk(folder: Path) -> None:
    model, _ = tiny("llama", head="lm")
    adapters = ga.attach(model, SPACE)
    shard(model)
    adapters.compact()
    (folder / "another file").write_text("")
    adapters.save(folder / "another file" / "below")


def _unsharded_checkpoint(folder: Path) -> None:
    checkpoint = folder / "one process" / "checkpoint-2"
    through_accelerate(folder / "resumed from it", gated_causal(), continued(24), resume=checkpoint)


def _tensor_parallel() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model: Any
    model, _ = tiny("llama", head="lm")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    parallelize_module(model.model.layers[0].mlp, mesh, {"up_proj": ColwiseParallel()})
    ga.attach(model, SPACE)


def _wrapped() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model: Any
    model, _ = tiny("llama", head="lm")
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    ga.attach(model, SPACE)


def failures(folder: Path) -> dict[str, Callable[[], None]]:
    """Runs that must end with an error on every process."""
    return {
        "other data": lambda: _differently(rows=True),
        "other seeds": lambda: _differently(seed=1),
        "other rates": lambda: _differently(rate=0.5),
        "other weights": _other_weights,
        "other libraries": _other_library,
        "no disk on the first": lambda: _no_disk(folder, 0),
        "no disk on the second": lambda: _no_disk(folder, 1),
        "disk full on the second": lambda: _disk_full_on_the_second(folder),
        "saved without a disk": lambda: _save_without_disk(folder),
        "a checkpoint of one process": lambda: _unsharded_checkpoint(folder),
        "tensor parallel": _tensor_parallel,
        "wrapped": _wrapped,
        "masked before sharding": _masked_before_sharding,
        "changed on one": _changed_on_one,
        **({"8 bits": lambda: _in_8_bits(folder)} if HAS_4_BITS else {}),
        **({"attached after 4 bits were sharded": lambda: _attached_to_4_bits(folder)} if HAS_4_BITS else {}),
    }


def error_of(run: Callable[[], None]) -> str:
    """The message that a run ends with."""
    try:
        run()
    except (GatedAdaptersError, OSError) as error:
        return str(error)
    return "no error"


def scenarios(folder: Path) -> dict[str, Callable[[], Any]]:
    """What this many processes run, by name."""
    if WORLD != 2:
        return {
            "attached after": lambda: by_hand(after=True),
            "resumed 2": lambda: resumed(folder, 2),
            **{f"mask {kind}": partial(masks, kind) for kind in SCORES},
            "tuned": tuned,
            "tuned by the trainer": lambda: tuned_by_trainer(folder),
            "allocated": allocated,
            "tuned, resumed": lambda: tuned_by_trainer(folder / "resumed", folder / "tuned on 2" / "checkpoint-2"),
        }
    return {
        **{name: partial(by_hand, **options) for name, options in ORDERS.items()},
        **{f"policy {name}": partial(policy, name) for name in POLICIES},
        "classifier": lambda: classifier(folder),
        "saving": lambda: saving(folder),
        **{f"resumed {step}": partial(resumed, folder, step) for step in (2, 6)},
        **{f"mask {kind}": partial(masks, kind) for kind in SCORES},
        "tuned": tuned,
        "tuned by the trainer": lambda: tuned_by_trainer(folder),
        "tuned, resumed": lambda: tuned_by_trainer(folder / "resumed", folder / "tuned on 2" / "checkpoint-2"),
        "allocated": allocated,
        "joint": lambda: joint(folder),
        "frozen head": lambda: frozen_head(folder),
        **({"4 bits": lambda: in_4_bits(folder, folder)} if HAS_4_BITS else {}),
        **{name: partial(error_of, run) for name, run in failures(folder).items()},
    }


def main(folder: Path, only: list[str]) -> None:
    """Run everything, or some of it, in this process."""
    found = {}
    for name, run in scenarios(folder).items():
        if not only or name in only:
            print(f"== {name}", flush=True)
            found[name] = run()
    torch.save(found, folder / f"rank {RANK} of {WORLD}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    main(Path(sys.argv[1]), sys.argv[2:])
