"""What each of two processes runs for `test_ranks.py`: weakened steps under DistributedDataParallel.

RANK=... WORLD_SIZE=2 ... python ranks.py FOLDER
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gatedadapters as ga
from gatedadapters.testing.backbones import tiny


def main(folder: Path) -> None:
    """Four steps; every rank draws for itself, and parameters that are dropped must not be waited for."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    steps = []
    for family in ("llama", "bert"):
        model, batch = tiny(family)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("pooler" not in name)
        alone = copy.deepcopy(model)
        shared = DistributedDataParallel(model.train())
        with ga.weaken_knowledge(model, drop=0.5) as handle, ga.weaken_knowledge(alone.train(), drop=0.5):
            for step in range(4):
                alone.load_state_dict(model.state_dict())
                for each in (alone, shared):
                    torch.manual_seed(10 * step + rank)
                    each.zero_grad()
                    each(**batch)[0].square().sum().backward()
                steps.append(
                    {
                        "dropped": dict(handle.dropped),
                        "alone": [p.grad for p in alone.parameters() if p.grad is not None],
                        "shared": [p.grad for p in model.parameters() if p.grad is not None],
                    }
                )
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.grad is not None:
                            parameter -= 1e-3 * parameter.grad
    torch.save(copy.deepcopy(steps), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
