"""Answer texts or a table with a saved adapter: labels with their probabilities, or words."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters import experiments


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("folder", metavar="DIR", help="a saved adapter, the output folder of a search, or a hub id")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", action="append", metavar="TEXT", help="a text to answer; may be given several times")
    given.add_argument("--table", type=Path, metavar="FILE", help="CSV, TSV, JSON lines or parquet with texts")
    parser.add_argument("--task", metavar="NAME", help="the task to answer for (all of them)")
    parser.add_argument("--column", metavar="NAME", help="column of the text (that of the table learned from)")
    parser.add_argument("--pair", metavar="NAME", help="column of the second text (likewise)")
    parser.add_argument("--model", help="folder, hub id or bundled:NAME (default: the base that the adapter names)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the adapter on the hub (newest)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer in words (64)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", action="store_true", help="print a JSON object per line in place of a table")


def run(options: argparse.Namespace) -> None:
    """Predict and print the result."""
    found = experiments.predict(
        options.folder,
        options.text,
        table=options.table,
        task=options.task,
        text=options.column,
        pair=options.pair,
        model=options.model,
        revision=options.revision,
        max_new_tokens=options.max_new_tokens,
        device=options.device,
    )
    print(found.to_json_lines() if options.json else found)
