"""What sharding with FSDP2 saves and costs: memory of each process, steps against peft, and what kills leave behind.

Claims under test, with gloo processes on CPUs: the peak memory of each of two processes is at most 0.62 of that of one
alone, for a model of 109 M parameters with a small vocabulary; `ga.experiments.plan` tells every peak within 15 %, for
one, two and four processes; a search step takes no longer than a step of peft's LoRA under FSDP2; when one of two
processes is killed the other ends with an error, and the resumed run ends with the bits of an undisturbed one.

    python -m benchmarks sharding run [--rounds 7] [--kills 10]
    python -m benchmarks sharding table

Memory: random Llamas, one of SmolLM2-135M's shape, batch 4 x 64 in all, beyond what the same steps of a tiny model take
(code that is loaded on first use, buffers of gloo). What bounds it from below: the table of tokens (28 M of SmolLM2's
135 M parameters), which is tied to the head and so gathered whole from the start of a forward pass to the end of the
backward pass; three blocks, gathered; and what every process holds: adapters and their moments. Both sides give freed
blocks back at once (`mallopt`): glibc keeps blocks of a few megabytes, such as gathered weights, and without this each
of two processes seems to take 1.37 of what one alone takes. Steps: a Llama of 12 blocks, width 384;
the sides take turns within one launch.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import resource
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import gatedadapters as ga
from benchmarks.common.command import carry_out, parser
from benchmarks.common.models import lora_space
from benchmarks.common.store import Result, Store
from gatedadapters.errors import TrainingError
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions
from gatedadapters.runtime.sharding import digest, whole
from gatedadapters.training.resumable import check_resumable

STORE = Store("sharding")
MOST_MEMORY, MOST_TIME, MOST_ERROR = 0.62, 1.0, 0.15
LARGE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
LARGE |= {"num_attention_heads": 9, "num_key_value_heads": 3}
WIDE = {"vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16}
WIDE |= {"num_attention_heads": 12}
MEASURED = {"SmolLM2-135M": LARGE, "its blocks, 4,096 tokens": LARGE | {"vocab_size": 4096}, "16 wide blocks": WIDE}
MIDDLE = {"vocab_size": 1024, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12}
MIDDLE |= {"num_attention_heads": 6}
SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LENGTH, BATCH, RANK, WORLDS = 64, 4, 8, (1, 2, 4)
STEPS, EVERY = 16, 2  # of the run that is killed, and between its checkpoints


def model_of(shape: dict[str, int], *, sharded: bool) -> LlamaForCausalLM:
    """A random model with tied tables; a process of a sharded one never holds more than its share."""
    config = LlamaConfig(**shape, tie_word_embeddings=True, use_cache=False)
    torch.manual_seed(0)
    if not sharded:
        return LlamaForCausalLM(config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shard(model)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    return model


def shard(model: Any) -> None:
    """Every block, then the rest: with a tied table, it is gathered for as long as accelerate's units keep it."""
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)


def rows(shape: dict[str, int], count: int) -> dict[str, torch.Tensor]:
    """Random token ids, (count, LENGTH)."""
    ids = torch.randint(3, shape["vocab_size"], (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def measure_memory(world: int, told: Any, name: str) -> None:
    """Peak bytes of three search steps beyond what the same steps of a tiny model take."""
    three_steps(SMALL, world)
    before = _highest()
    three_steps(MEASURED[name], world)
    told.put(_highest() - before)


def three_steps(shape: dict[str, int], world: int) -> None:
    """Three steps of a search on this process's share of the rows."""
    model = model_of(shape, sharded=world > 1)
    adapters = ga.attach(model, lora_space(RANK))
    adapters.set_penalty(ga.Budget(fraction=0.25), total_steps=3)
    optimizer = torch.optim.AdamW(adapters.parameter_groups(1e-3))
    batch = rows(shape, BATCH // world)
    for _ in range(3):
        (model.train()(**batch).loss + adapters.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


def _highest() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_steps(world: int, told: Any, rounds: int) -> None:
    """Seconds of a step: gates and candidates of rank 8 against peft's LoRA of that rank, both under FSDP2."""
    from peft import LoraConfig, get_peft_model

    ours = model_of(MIDDLE, sharded=False)
    adapters = ga.attach(ours, lora_space(RANK))
    adapters.set_penalty(ga.Budget(fraction=0.25), total_steps=10_000)
    shard(ours)
    base = model_of(MIDDLE, sharded=False)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs: Any = get_peft_model(base, LoraConfig(r=RANK, target_modules=names))
    for block in base.model.layers:
        fully_shard(block)
    fully_shard(theirs)
    batch = rows(MIDDLE, BATCH // world)
    optimizers = {
        "gated": torch.optim.AdamW(adapters.parameter_groups(1e-4)),
        "peft": torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-4),
    }

    def step(side: str) -> float:
        began = time.perf_counter()
        loss = (ours if side == "gated" else theirs).train()(**batch).loss
        (loss + adapters.penalty() if side == "gated" else loss).backward()
        optimizers[side].step()
        optimizers[side].zero_grad()
        return time.perf_counter() - began

    for side in optimizers:
        step(side)
    times: dict[str, list[float]] = {side: [] for side in optimizers}
    for number in range(rounds):
        for side in sorted(times, reverse=bool(number % 2)):
            dist.barrier()
            times[side].append(step(side))
    told.put(times)


def search(world: int, told: Any, folder: str, resume: str | None) -> None:
    """A search through accelerate's FSDP2 that leaves checkpoints; tells a digest of all bits it ends with."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers.trainer_callback import PrinterCallback

    model = model_of(SMALL, sharded=False)
    ga.attach(model, lora_space(RANK))
    args = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        save_steps=EVERY,
        per_device_train_batch_size=BATCH // world,
        learning_rate=1e-2,
        logging_steps=STEPS,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        fsdp=True,
        fsdp_config={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT"},
    )
    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate shards on GPUs alone
    ids = rows(SMALL, 64)["input_ids"].tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = ga.GatedTrainer(model, args, train_dataset=data, budget=ga.Budget(fraction=0.25), prior=None)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    state = {key: whole(value) for key, value in model.state_dict().items() if "gated_adapters" in key}
    told.put(digest(state))


class Launch:
    """Processes of one gloo group that run a function, forked from this one."""

    def __init__(self, function: Callable[..., None], world: int, *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.told: Any = context.Queue()
        self.ranks = [
            context.Process(target=_rank, args=(function, rank, world, port, self.told, arguments))
            for rank in range(world)
        ]
        for process in self.ranks:
            process.start()

    def results(self) -> list[Any]:
        """What the processes told; they must end well."""
        found = [self.told.get(timeout=600) for _ in self.ranks]
        assert self.codes() == [0] * len(self.ranks)
        return found

    def codes(self) -> list[int | None]:
        """Exit codes, when all have ended."""
        for process in self.ranks:
            process.join(120)
        return [process.exitcode for process in self.ranks]


_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


def _rank(function: Callable[..., None], rank: int, world: int, port: int, told: Any, arguments: Sequence[Any]) -> None:
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # accelerate sets two
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    function(world, told, *arguments)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def memory(name: str, world: int) -> Result:
    """Peak bytes of each of so many processes, and what the plan says of them."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**MEASURED[name], tie_word_embeddings=True))
    told = ga.experiments.plan(model, lora_space(RANK), processes=world, tokens=BATCH // world * LENGTH)
    peak = max(Launch(measure_memory, world, name).results())
    return {"measured": peak, "planned": told.memory_of_a_process["fp32"], "versions": versions()}


def steps(rounds: int) -> Result:
    """Median seconds of both sides, and the median ratio within a round."""
    times = Launch(measure_steps, 2, rounds).results()[0]
    ratios = [a / b for a, b in zip(times["gated"], times["peft"], strict=True)]
    found = {side: statistics.median(values) for side, values in times.items()}
    return {**found, "ratio": statistics.median(ratios), "rounds": rounds, "versions": versions()}


def kills(count: int) -> Result:
    """Kill one of two processes at a random moment, so many times; resume, and compare with an undisturbed run."""
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, seconds = undisturbed_search(Path(folder))
    done, ended, same = 0, 0, 0
    while done < count:
        with tempfile.TemporaryDirectory() as folder:
            told = killed_and_resumed(Path(folder), victim=done % 2, after=random.random() * seconds)
        if told is not None:
            done, ended, same = done + 1, ended + told[0], same + (told[1] == undisturbed)
    return {"kills": count, "ended with an error": ended, "resumed to the same": same, "versions": versions()}


def undisturbed_search(folder: Path) -> tuple[list[str], float]:
    """What the two processes of a whole search tell, and the seconds it takes."""
    began = time.monotonic()
    return Launch(search, 2, str(folder), None).results(), time.monotonic() - began


def killed_and_resumed(folder: Path, *, victim: int, after: float) -> tuple[bool, list[str]] | None:
    """Kill one of two processes, and resume from the newest checkpoint that is whole, or from the start without one.

    Args:
        folder: of the run; empty.
        victim: the rank that is killed.
        after: seconds between the start of the processes and the kill.

    Returns:
        Whether the other process ended with an error, too, and what the processes of the resumed run tell; None if the
        search had ended before the kill.
    """
    launch = Launch(search, 2, str(folder), None)
    process = launch.ranks[victim]
    process.join(after)
    process.kill()
    codes = launch.codes()
    if codes[victim] != -signal.SIGKILL:
        return None
    return all(codes), Launch(search, 2, str(folder), whole_checkpoint(folder)).results()


def whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))
    for checkpoint in found:
        try:
            check_resumable(str(checkpoint), sharded=True)
        except TrainingError:
            continue
        return str(checkpoint)
    return None


def table() -> str:
    """What was measured, and whether the claims hold."""
    lines = []
    cells = []
    for name in MEASURED:
        found = [STORE.read(_memory_of(name, world)) for world in WORLDS]
        peaks = [entry["measured"] for entry in found if entry is not None]
        for world, entry in zip(WORLDS, found, strict=True):
            if entry is not None and peaks:
                planned, peak = entry["planned"]["total"], entry["measured"]
                sizes = [f"{value / 2**20:,.0f} MiB" for value in (peak, planned)]
                cells.append([name, str(world), sizes[0], f"{peak / peaks[0]:.2f}", sizes[1], f"{planned / peak:.2f}"])
    if cells:
        lines.append(format_table(["model", "processes", "peak of each", "share", "planned", "share"], cells))
        halves = {row[0]: float(row[3]) for row in cells if row[1] == "2"}
        worst = max(abs(float(row[5]) - 1) for row in cells)
        for name, share in halves.items():
            lines.append(f"{name}: {share:.2f} of one process, {_verdict(share <= MOST_MEMORY)} {MOST_MEMORY}")
        lines.append(f"planned within {worst:.0%}, {_verdict(worst <= MOST_ERROR)} {MOST_ERROR:.0%}")
    found = STORE.read("steps")
    if found is not None:
        lines.append(format_table(["step", "s"], [[side, f"{found[side]:.3f}"] for side in ("gated", "peft")]))
        lines.append(f"{found['ratio']:.2f} of peft's, {_verdict(found['ratio'] <= MOST_TIME)} the claimed {MOST_TIME}")
    found = STORE.read("kills")
    if found is not None:
        told = f"{found['ended with an error']} ended with an error, {found['resumed to the same']} resumed to the same"
        lines.append(f"of {found['kills']} kills, {told}")
    return "\n".join(lines) or "nothing was measured yet"


def _memory_of(name: str, world: int) -> str:
    return f"memory, {name}, {world}"


def _verdict(holds: bool) -> str:
    return "within" if holds else "NOT within"


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("sharding", __doc__)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--kills", type=int, default=10)
    options = made.parse_args(arguments)

    def run() -> None:
        if sys.platform != "linux":
            sys.exit("this benchmark forks, which is safe on Linux alone")
        for name in MEASURED:
            for world in WORLDS:
                STORE.computed(_memory_of(name, world), partial(memory, name, world))
        STORE.computed("steps", lambda: steps(options.rounds))
        STORE.computed("kills", lambda: kills(options.kills))

    carry_out(options, run=run, table=table, pack=STORE.pack)
