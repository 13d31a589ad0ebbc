"""Does one learning rate suit every kind of path, at every width and rank?

Claim under test: after `Path.rate_factor` the best rate of every kind lies within a factor of 2 of one value, at widths
from 128 to 1,024 and ranks from 1 to 64.

Llama-like backbones of two blocks learn English bytes first, then 40 steps of Indonesian with one kind of path
everywhere, at rates that differ by factors of 2. A cell stores the loss per byte on held-out Indonesian. The rate of a
cell is the optimiser's own; the table divides it by the library's factor.

    python -m benchmarks rates run     # about an hour on two cores
    python -m benchmarks rates table
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import gatedadapters as ga
from benchmarks.common.command import carry_out, parser
from benchmarks.common.store import SCRATCH, Result
from benchmarks.studies.rates.cells import KINDS, RATES, STORE, WIDTHS, Cell
from benchmarks.studies.rates.table import tables
from gatedadapters.data.bundled import load_corpus

LENGTH = 128
PRETRAINING = 300


def main(arguments: Sequence[str]) -> None:
    """Compute what is missing, and print the table."""
    made = parser("rates", __doc__, threads=2)
    made.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS), help="default: all")
    options = made.parse_args(list(arguments))
    carry_out(options, run=lambda: _run(options), table=tables, pack=STORE.pack)


def _run(options: argparse.Namespace) -> None:
    for width, kind in tqdm([(width, kind) for width in options.widths for kind in KINDS], "best rates"):
        climb(width, kind)


def climb(width: int, kind: str, seed: int = 0) -> None:
    """Compute rates from the middle of the grid towards the best, until both its neighbours are known."""
    at = RATES.index(2e-2)
    while True:
        near = [i for i in (at - 1, at, at + 1) if 0 <= i < len(RATES)]
        cells = {i: Cell(width, kind, RATES[i], seed) for i in near}
        losses = {i: STORE.computed(cell.name, lambda cell=cell: compute(cell))["loss"] for i, cell in cells.items()}
        best = min(near, key=lambda i: losses[i] if losses[i] == losses[i] else float("inf"))
        if best == at:
            return
        at = best


def compute(cell: Cell) -> Result:
    """Train one cell."""
    began = time.perf_counter()
    model = backbone(cell.width)
    text = "\n".join(load_corpus("quran_indonesian"))
    train, held_out = blocks(text[:200_000]), blocks(text[-30_000:])
    space = ga.SearchSpace.parse({"paths": [KINDS[cell.kind]]}, where="rates")
    whole = ga.attach(model, space, seed=cell.seed).discretize(ga.Budget(fraction=1.0))
    ga.detach(model)
    adapters = ga.attach(model, whole, seed=cell.seed)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(cell.seed))
    fit(model, adapters.weight_parameters(), [train[rows] for rows in order.split(8)[: cell.steps]], cell.rate)
    loss = evaluate(model, held_out)
    return {"loss": loss, "params": whole.params, "seconds": round(time.perf_counter() - began, 1)}


def backbone(width: int) -> nn.Module:
    """A byte-level model of two blocks that has learned English; it is made once."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=2,
        num_attention_heads=max(2, width // 64),
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    file = SCRATCH / "models" / f"bytes-{width}.pt"
    if not file.exists():
        text = blocks("\n".join(load_corpus("xsum"))[:1_200_000])
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
        rate = 3e-3 * (128 / width) ** 0.5
        fit(model, list(model.parameters()), [text[rows] for rows in order.split(8)[:PRETRAINING]], rate)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def blocks(text: str) -> Tensor:
    """A text as bytes, (blocks, LENGTH)."""
    ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def fit(model: nn.Module, parameters: Sequence[nn.Parameter], batches: Sequence[Tensor], rate: float) -> None:
    """AdamW without decay; the rate rises for a twentieth of the steps and then falls linearly."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps, warmup = len(batches), max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    model.train()
    for batch in batches:
        with autocast(model):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def autocast(model: nn.Module) -> torch.autocast:
    """bfloat16 where the products are large enough to gain from it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=model.config.hidden_size >= 512)


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Tensor) -> float:
    """Mean loss per byte."""
    model.eval()
    with autocast(model):
        losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in held_out.split(32)]
    return sum(losses) / len(held_out)
