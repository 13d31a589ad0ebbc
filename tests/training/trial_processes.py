"""What the two processes of one sharded trial run for `test_sharded.py`: the first one asks the study, and tells it.

RANK=... WORLD_SIZE=... python trial_processes.py FOLDER     (FOLDER/../study.journal is the study's storage)
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import torch
import torch.distributed as dist
from sharded_processes import WORLD, by_hand

from gatedadapters.studies import open_storage

RATES = (1e-3, 1e-2)


def outcome(rate: float) -> float:
    """The mean of the logits that a search of this rate ends with."""
    return float(by_hand(rate=rate)["logits"].abs().mean())


def main(folder: Path) -> None:
    """One trial, over the processes of this launch alone."""
    study, asked = None, [None]
    if dist.get_rank() == 0:
        study = optuna.load_study(study_name="rates", storage=open_storage(folder.parent / "study.journal"))
        trial: Any = study.ask()
        asked = [trial.suggest_categorical("rate", RATES)]
    dist.broadcast_object_list(asked, src=0)
    assert dist.get_world_size() == WORLD == 2
    found = outcome(asked[0])
    if study is not None:
        study.tell(trial, found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    main(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
