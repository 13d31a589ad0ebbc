"""Rewrite a LoRA for readers that ignore rank_pattern and alpha_pattern: one rank, and a scale of 1."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters.artifacts import normalise


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("lora", type=Path, metavar="LORA_DIR", help="a LoRA that peft saved")
    parser.add_argument("--out", type=Path, help="folder for the new one (default: LORA_DIR-normalised)")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter in --out")


def run(options: argparse.Namespace) -> None:
    """Rewrite it and print what was done."""
    out = options.out or options.lora.with_name(f"{options.lora.resolve().name}-normalised")
    print(normalise(options.lora, out, overwrite=options.overwrite))
