"""Write a saved adapter for another library: as a peft folder, or as a GGUF file for llama.cpp."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters import experiments


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("folder", metavar="DIR", help="a saved adapter, the output folder of a search, or a hub id")
    parser.add_argument("--to", choices=("peft", "gguf"), default="peft", help="the format (peft)")
    parser.add_argument("--out", type=Path, help="the new folder or file (default: DIR-peft or DIR.gguf)")
    parser.add_argument("--task", metavar="NAME", help="the task whose adapter it is, where there are several")
    parser.add_argument("--model", help="folder, hub id or bundled:NAME (default: the base that the adapter names)")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")


def run(options: argparse.Namespace) -> None:
    """Write it and say where."""
    written = experiments.export(
        options.folder,
        options.out,
        to=options.to,
        task=options.task,
        model=options.model,
        overwrite=options.overwrite,
    )
    print(f"written to {written}")
