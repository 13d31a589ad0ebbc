"""What `accelerate launch` starts for `test_sharded.py`: a search that every process saves, as in the examples.

accelerate launch --config_file examples/fsdp2.yaml launched.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from recipes import SOON, arguments, continued, gated_causal
from safetensors.torch import load_file

import gatedadapters as ga


def main(out: Path) -> None:
    """Search, compact, save."""
    args = arguments(out.with_name("run"), max_steps=4, per_device_train_batch_size=2, bf16=False)
    data = continued(16)
    trainer = ga.GatedTrainer(
        gated_causal(), args, train_dataset=data, eval_dataset=data, schedule=SOON, budget=ga.Budget(fraction=0.3)
    )
    trainer.evaluate()  # for which accelerate does not join the processes
    trainer.train()
    trainer.adapters.compact()
    trainer.adapters.save(out)
    assert load_file(out / "adapters.safetensors"), "this process has saved, so it finds the files"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
