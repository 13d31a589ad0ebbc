"""What each of two processes runs for `test_distributed.py`: every scenario, its outcome written to a file per rank.

RANK=... WORLD_SIZE=2 ... python two_processes.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from recipes import SOON, SPACE, Watch, arguments, continued, gated_causal, gated_classifier, labelled, trained
from scales import MODELS, search
from torch.nn.parallel import DistributedDataParallel

import gatedadapters as ga

CLASSES = {"a": 3, "b": 2}
WHOLE_PATHS = SPACE.model_copy(update={"gates": ga.GateConfig(levels=("path",))})


def scenario(name: str, folder: Path, processes: int) -> dict[str, Any]:
    """Train so that each optimiser step sees four examples, however many processes share them."""
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 8}
    batch, pieces = 4 // processes, 1
    options: dict[str, Any] = {"penalty": ga.Budget(fraction=0.3), "schedule": SOON, "gate_learning_rate": 1.0}
    if name == "accumulated":
        batch, pieces = batch // 2, 2
    if name in {"causal", "all closed"}:
        model, data = gated_causal(space=SPACE if name == "causal" else WHOLE_PATHS), continued(24)
    else:
        model, data = gated_classifier(CLASSES), labelled([12, 12], [3, 2])
    adapters = ga.get_adapters(model)
    closed = 0

    def look(model: Any, optimizer: Any) -> torch.Tensor:
        nonlocal closed
        closed += not any(adapters.bank.open_paths.values())
        gradient = adapters.bank.log_alpha.grad
        return adapters.bank.noise.clone(), None if gradient is None else gradient.clone()

    if name.startswith("all closed"):  # in most steps by chance, now and then not
        with torch.no_grad():
            adapters.bank.log_alpha.fill_(-4.5)
        options = {"penalty": ga.L0(weight=1.0), "schedule": ga.Schedule(warmup=0.3, ramp=0.3, prune=None)}
        options["gate_learning_rate"] = 0.1
        settings["max_steps"] = 12
    if name.startswith("resumed"):
        settings |= {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch_fused"}
    args = arguments(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=pieces, **settings)
    watch = Watch(look)
    trainer = ga.GatedTrainer(model, args, train_dataset=data, callbacks=[watch], **options)
    resume = folder.parent / "resumed 0" / f"checkpoint-{name.split()[1]}" if name.startswith("resumed ") else None
    trainer.train(resume_from_checkpoint=str(resume) if resume and not name.endswith(" 0") else None)
    return {
        "state": trained(model),
        "structure": None if adapters.structure is None else adapters.structure.to_json(),
        "noise and gradient": watch.seen,
        "fixed": watch.fixed_after,
        "steps with everything closed": closed,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def plain_loop(*, processes: int) -> dict[str, Any]:
    """Ten steps without a Trainer. Every process sees the same batch, so that the mean of their gradients has the bits
    of one process's gradient.
    """
    torch.manual_seed(0)
    model = gated_classifier().train()
    adapters = ga.get_adapters(model)
    adapters.set_penalty(ga.Budget(fraction=0.3), schedule=SOON, total_steps=10)
    groups = [
        {"params": [*adapters.weight_parameters(), *adapters.head_parameters()], "lr": 1e-2},
        {"params": adapters.gate_parameters(), "lr": 0.3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    called = model if processes == 1 else DistributedDataParallel(model, find_unused_parameters=True)
    rows, fixed, losses = labelled([40]), [], []
    for step in range(10):
        batch = {key: torch.tensor([row[key] for row in rows[4 * step : 4 * step + 4]]) for key in rows[0]}
        loss = called(**batch).loss
        (loss + adapters.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        fixed.append(adapters.structure is not None)
        losses.append(float(loss.detach()))
    return {
        "state": trained(model),
        "structure": None if adapters.structure is None else adapters.structure.to_json(),
        "fixed": fixed,
        "losses": losses,
    }


def probed(folder: Path) -> dict[str, Any]:
    """What the gates start from, and the size of a budget that is relative to the gain."""
    found = {}
    for name, budget in (("fraction", ga.Budget(fraction=0.3)), ("within", ga.Budget(within=0.1))):
        model = gated_causal()
        args = arguments(folder / name, per_device_train_batch_size=2, max_steps=32, learning_rate=3e-2)
        trainer = ga.GatedTrainer(model, args, train_dataset=continued(4) * 16, budget=budget, schedule=SOON)
        trainer._start_gates()
        assert trainer.placement is not None
        found[name] = ga.get_adapters(model).bank.log_alpha.detach().clone()
        found[f"{name} here"] = trainer.placement.for_their_cost()
        found[f"{name} learnt"] = torch.cat([p.detach().flatten() for p in ga.get_adapters(model).weight_parameters()])
    found["size"] = ga.get_adapters(model).pressure.penalty.params
    return found


PROBED = "probed"
PLAIN = "plain loop"
SCENARIOS = (
    "classifier",
    "causal",
    "accumulated",
    "all closed",
    "all closed but heads",
    "resumed 0",
    "resumed 4",
    "resumed 6",
)


def main(folder: Path) -> None:
    """Run every scenario in this process."""
    for name in SCENARIOS:
        outcome: dict[str, Any] | None
        try:
            outcome = scenario(name, folder / name, processes=2)
        except RuntimeError as error:
            if "data location" not in str(error):
                raise
            outcome = None  # early releases of transformers 5 cannot read checkpoints on several CPU processes
        torch.save(outcome, folder / f"{name} of rank {torch.distributed.get_rank()}.pt")
    for name in MODELS:
        for pieces in (1, 2):
            found = search(name, folder / name, batch=4 // pieces, pieces=pieces, processes=2)
            torch.save(found, folder / f"{name} in {pieces} of rank {torch.distributed.get_rank()}.pt")
    torch.save(probed(folder / PROBED), folder / f"{PROBED} of rank {torch.distributed.get_rank()}.pt")
    torch.save(plain_loop(processes=2), folder / f"{PLAIN} of rank {torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
