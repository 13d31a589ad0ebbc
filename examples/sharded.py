"""A search over a backbone that no process holds whole: each reads its shards, and all hold the adapters.

torchrun --nproc-per-node 2 examples/sharded.py OUT     (a new folder; on CPUs as on GPUs)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.distributed import DistributedConfig

import gatedadapters as ga

WORDS = 64


def sentences(count: int) -> list[dict[str, list[int]]]:
    """Rows that count upwards from a random word."""
    starts = torch.randint(0, WORDS, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [[(start + step) % WORDS for step in range(12)] for start in starts]
    return [{"input_ids": row, "labels": row} for row in rows]


def main(out: str, steps: int = 12) -> float:
    """Returns the loss of the last step."""
    folder = Path(out)
    on_cpu = not torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=8 // dist.get_world_size(),
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=on_cpu,
        disable_tqdm=True,
    )
    if dist.get_rank() == 0:  # any model on the hub or on a disk that every machine reads takes its place
        shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
        LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **shape)).save_pretrained(folder / "base")
    dist.barrier()

    sharding = DistributedConfig(fsdp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=sharding)
    adapters = ga.attach(model, "decoder-mixed")
    trainer = ga.GatedTrainer(model, args, train_dataset=sentences(256), budget=ga.Budget(fraction=1 / 8), prior=None)
    trainer.train()
    adapters.compact()
    adapters.save(folder / "adapter")  # every process calls it, the first one writes
    return float(next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry))


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    loss = main(sys.argv[1])
    if dist.get_rank() == 0:
        print(f"loss {loss:.3f}")
    dist.destroy_process_group()
