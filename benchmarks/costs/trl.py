"""What gating costs and brings under TRL: steps, memory and held-out loss against peft, in the same trainers.

Claims under test, SmolLM2-135M on questions of CommonsenseQA as chats, bf16 autocast: a gated SFT step takes at most
0.95 of the time of peft's LoRA of rank 8 under the same SFTTrainer; a DPO step's peak memory is at most peft's, with
the reference by switching off on both sides; attaching takes at most 0.5 s. Open: does a searched adapter of 57,600
parameters reach a lower held-out loss than peft's LoRA and IA3 of that size, each at its best rate of three?

    python -m benchmarks trl run [--parts attach step memory loss] [--steps 40] [--seeds 3] [--rounds 7]
    python -m benchmarks trl table

Rates are compared with seed 0 on validation questions; the other seeds run at the best. Memory is the high-water mark
of a fresh process above the loaded model. What is stored is not measured again.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import gatedadapters as ga
from benchmarks.common import peft_rivals
from benchmarks.common.command import carry_out, parser
from benchmarks.common.memory import peak_above, reset_peak
from benchmarks.common.store import BENCHMARKS, Result, Store
from benchmarks.common.tables import shown
from benchmarks.common.timing import CLOCKS, in_turns, medians, ratio
from benchmarks.common.tuning import best
from gatedadapters.data.bundled import load_choices, load_smollm2
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Store("trl")
PARTS = ("attach", "step", "memory", "loss")
SIDES = ("gated", "peft")
SPACES = ("lora-all-linear", "decoder-mixed")
BATCHES = ("chats", "packed")
SIZE = 57_600  # LoRA of rank 1 at peft's default maps (queries and values); IA3 at peft's default maps, too
SEARCHES = {"searched": "lora-scale", "searched, every kind": "decoder-mixed"}
RATES = {  # a grid around the best of each
    "searched": (1e-3, 3e-3, 1e-2),
    "searched, every kind": (3e-4, 1e-3, 3e-3),
    "peft LoRA": (1e-3, 3e-3, 1e-2),
    "peft IA3": (3e-3, 1e-2, 3e-2),
}


def questions(part: str) -> list[dict[str, Any]]:
    """Questions as prompts, with the right answer and a wrong one."""
    task = load_choices("commonsenseqa", train=None, validation=64, test=128)
    draw, rows = random.Random(0), []
    for example in getattr(task, part):
        wrong = draw.choice([i for i in range(len(example.choices)) if i != example.answer])
        asked = f"{example.question}\nChoose from: {', '.join(example.choices)}."
        says = [[{"role": "assistant", "content": example.choices[i]}] for i in (example.answer, wrong)]
        rows.append({"prompt": [{"role": "user", "content": asked}], "right": says[0], "wrong": says[1]})
    return rows


def data(part: str, **columns: str) -> Dataset:
    """Questions of a part as a data set; `columns` gives the answers names."""
    named = [{"prompt": row["prompt"]} | {new: row[old] for new, old in columns.items()} for row in questions(part)]
    return Dataset.from_list(named)


def trainer(kind: Any, config: Any, model: Any, tokenizer: Any, **more: Any) -> Any:
    """A trainer of TRL in bf16, four examples a batch, nothing written."""
    sft = issubclass(kind, SFTTrainer)
    columns = {"completion": "right"} if sft else {"chosen": "right", "rejected": "wrong"}
    settings = {"max_steps": 40, "learning_rate": 1e-3, "seed": 0, "max_length": 128} | more.pop("settings", {})
    disable_progress_bars()
    return kind(
        model,
        args=config(
            tempfile.mkdtemp(),
            per_device_train_batch_size=4,
            gradient_checkpointing=False,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=data("train", **columns),
        processing_class=tokenizer,
        **more,
    )


def rank_8(side: str, kind: Any, config: Any, **settings: Any) -> Any:
    """A trainer of LoRA of rank 8 at every map of the blocks: gated, or peft's.

    `backbone` is peft's LoRA of rank 1 at one map of the first block: hardly more than the frozen model, of which all
    steps consist for the most part.
    """
    model, tokenizer = load_smollm2()
    if side == "peft":
        return trainer(kind, config, peft_rivals.lora(model, 8), tokenizer, settings=settings)
    if side == "backbone":
        one = LoraConfig(r=1, target_modules=["q_proj"], layers_to_transform=[0])
        return trainer(kind, config, get_peft_model(model, one), tokenizer, settings=settings)
    ga.attach(model, "lora-all-linear")
    search = {"penalty": ga.L0(weight=1e-3), "schedule": ga.Schedule(prune=None)}
    return trainer(ga.gated(kind), config, model, tokenizer, settings=settings, **search)


def stepping(made: Any) -> Callable[[], None]:
    """One training step of a trainer and of its optimiser, in bf16, on the same batch every time."""
    optimizer, batch = made.create_optimizer(), next(iter(made.get_train_dataloader()))
    made.create_scheduler(40, optimizer)
    model = made.accelerator.prepare(made.model)  # which lets it run under autocast, as `train` does
    made.current_gradient_accumulation_steps = 1  # which `train` sets, too

    def step() -> None:
        made.training_step(model, dict(batch))
        optimizer.step()
        optimizer.zero_grad()

    return step


def attach() -> Result:
    """Median seconds of attaching the candidates of each preset, five times."""
    model, _ = load_smollm2()

    def once(space: str) -> None:
        ga.attach(model, space)
        ga.detach(model)

    times = in_turns({space: partial(once, space) for space in SPACES}, 5, warm_up=1)
    return {clock: medians(times[clock]) for clock in CLOCKS}


def step(rounds: int, batch: str) -> Result:
    """Both sides, and the backbone alone, in turns under SFT.

    Args:
        rounds: how many are counted.
        batch: `chats`, four of them, padded to the longest; or `packed`, four rows of 256 tokens.
    """
    settings = {"packing": True, "packing_strategy": "wrapped", "max_length": 256} if batch == "packed" else {}
    sides = {side: stepping(rank_8(side, SFTTrainer, SFTConfig, **settings)) for side in (*SIDES, "backbone")}
    times = in_turns(sides, rounds, warm_up=1)
    return {
        "seconds": {clock: medians(times[clock]) for clock in CLOCKS},
        "ratio": {clock: ratio(times[clock], *SIDES) for clock in CLOCKS},
        "backbone": {clock: ratio(times[clock], "backbone", "peft") for clock in CLOCKS},
        "rounds": rounds,
    }


def memory(side: str) -> Result:
    """In this process: the peak of two DPO steps above the loaded model."""
    loaded = reset_peak()
    one = stepping(rank_8(side, DPOTrainer, DPOConfig))
    one()
    one()
    return {"peak_bytes": peak_above(loaded)}


def loss(arm: str, rate: float, seed: int, steps: int) -> Result:
    """Train an adapter of `SIZE` parameters, and measure its loss on validation and on test questions."""
    set_seed(seed)
    model, tokenizer = load_smollm2()
    more: dict[str, Any] = {"settings": {"max_steps": steps, "learning_rate": rate, "seed": seed}}
    kind: Any = SFTTrainer
    if arm in SEARCHES:
        ga.attach(model, SEARCHES[arm], seed=seed)
        kind, more["budget"] = ga.gated(SFTTrainer), ga.Budget(params=SIZE)
    else:
        lora = LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        more["peft_config"] = lora if arm == "peft LoRA" else IA3Config(task_type="CAUSAL_LM")
    made = trainer(kind, SFTConfig, model, tokenizer, **more)
    began = time.process_time()
    made.train()
    taken = time.process_time() - began
    found = {}
    for part in ("validation", "test"):
        prepared = made._prepare_dataset(data(part, completion="right"), tokenizer, made.args, False, None, part)
        found[part] = made.evaluate(prepared)["eval_loss"]
    if arm in SEARCHES:
        size = ga.get_adapters(model).structure.params  # type: ignore[union-attr]
    else:
        size = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    return found | {"size": size, "cpu_seconds": taken}


def keep(name: str, found: Result) -> None:
    """Store a result."""
    STORE.write(name, found | {"versions": versions()})


def in_a_process(name: str, compute: str) -> Result:
    """The stored result of this name; otherwise `compute`, a call in this module, makes it in a fresh process."""
    if STORE.read(name) is None:
        code = (
            f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
            "from benchmarks.costs import trl\n"
            f"trl.keep({name!r}, trl.{compute})"
        )
        environment = os.environ | {"MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=BENCHMARKS.parent, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        print(name, flush=True)
    return STORE.read(name) or {}


def cell(arm: str, rate: float, seed: int, steps: int) -> tuple[str, str]:
    """The name of a training, and the call that computes it."""
    return (
        f"loss-{arm.replace(',', '').replace(' ', '-')}-{rate:g}-{seed}-{steps}",
        f"loss({arm!r}, {rate!r}, {seed}, {steps})",
    )


def run(parts: Sequence[str], steps: int, seeds: int, rounds: int) -> None:
    """Compute what is missing."""
    if "attach" in parts:
        in_a_process("attach", "attach()")
    if "memory" in parts:
        for side in SIDES:
            in_a_process(f"memory-{side}", f"memory({side!r})")
    for batch in BATCHES if "step" in parts else ():
        in_a_process(f"step-{batch}", f"step({rounds}, {batch!r})")
    for arm, rates in RATES.items() if "loss" in parts else ():
        tried = [cell(arm, rate, 0, steps) for rate in rates]
        chosen = best(tried, lambda one: in_a_process(*one), lambda found: -found["validation"])
        assert chosen is not None
        for seed in range(1, seeds):
            in_a_process(*cell(arm, rates[tried.index(chosen)], seed, steps))


def table() -> str:
    """Costs, then losses."""
    stored, rows = STORE.results(), []
    if "attach" in stored:
        for clock, space in itertools.product(CLOCKS, SPACES):
            rows.append([f"attach {space} ({clock} s)", f"{stored['attach'][clock][space]:.2f}", "0.5"])
    for batch, clock in itertools.product(BATCHES, CLOCKS):
        if found := stored.get(f"step-{batch}"):
            for what, value, most in (("gated", found["ratio"], "0.95"), ("backbone", found["backbone"], "")):
                rows.append([f"SFT step, {batch}, {what} / peft LoRA r 8 ({clock} s)", f"{value[clock]:.2f}", most])
    if all(f"memory-{side}" in stored for side in SIDES):
        mine, theirs = (stored[f"memory-{side}"]["peak_bytes"] for side in SIDES)
        rows.append(["DPO step, peak memory, gated / peft", f"{mine / theirs:.2f}", "1"])
    parts = [format_table(["measured", "found", "at most"], rows)] if rows else []
    losses = []
    for steps in sorted({int(name.rpartition("-")[2]) for name in stored if name.startswith("loss-")}):
        for arm, rates in RATES.items():
            names = [cell(arm, rate, 0, steps)[0] for rate in rates]
            chosen = best(names, stored.get, lambda found: -found["validation"])
            if chosen is None:
                continue
            rate = rates[names.index(chosen)]
            same = [stored[n] for seed in range(99) if (n := cell(arm, rate, seed, steps)[0]) in stored]
            test = shown([found["test"] for found in same], times=1)
            losses.append([arm, str(steps), f"{same[0]['size']:,}", f"{rate:g}", str(len(same)), test])
    if losses:
        parts.append(format_table(["adapter", "steps", "parameters", "rate", "seeds", "held-out loss"], losses))
    return "\n\n".join(parts) or "nothing is stored yet"


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("trl", __doc__, threads=1)
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--steps", type=int, default=40, help="of each training")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--rounds", type=int, default=7)
    options = made.parse_args(arguments)
    carry_out(
        options,
        run=lambda: run(options.parts, options.steps, options.seeds, options.rounds),
        table=table,
        pack=STORE.pack,
    )
