"""Coverage-guided fuzzing of every reader: `python tests/attack/fuzz.py READER [OPTIONS OF LIBFUZZER]`.

Needs atheris (`pip install -e '.[fuzz]'`). Stops at the first input that ends in anything but a result or an error of
the library with a place and a remedy. `-max_total_time=60` is the time in seconds; see `-help=1` for more options.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import atheris  # noqa: E402

with atheris.instrument_imports(include=["gatedadapters"]):
    import gatedadapters as ga
    from gatedadapters.artifacts.peft_folder import read_peft
    from gatedadapters.config import ContinualConfig, SearchConfig, SelectConfig, StudyConfig, TransferConfig
    from gatedadapters.continual import StreamResult
    from gatedadapters.continual.core import load_core
    from gatedadapters.continual.states import Change

import damage  # noqa: E402
import mutate_artefacts  # noqa: E402
import runner  # noqa: E402

CONFIGURATIONS = (SearchConfig, SelectConfig, ContinualConfig, StudyConfig, TransferConfig, ga.SearchSpace)


def _configurations(folder: Path) -> Any:
    for kind in CONFIGURATIONS:
        answer = runner.judge(runner.Attack("", lambda kind=kind: kind.load(folder / "any.yaml")))
        assert answer[0] != "fault", answer[1]


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {  # the file that changes, and who reads its folder
    "yaml": ("any.yaml", _configurations),
    "structure": ("adapters/structure.json", lambda folder: ga.Structure.load(folder / "adapters")),
    "adapters": (
        "adapters/adapters.safetensors",
        lambda folder: ga.load_adapters(mutate_artefacts.encoder(), folder / "adapters"),
    ),
    "mask": ("mask/mask.json", lambda folder: ga.Mask.load(folder / "mask")),
    "positions": ("mask/mask.safetensors", lambda folder: ga.Mask.load(folder / "mask")),
    "subspace": (
        "subspace/subspace.json",
        lambda folder: ga.load_subspace(mutate_artefacts.encoder(), folder / "subspace"),
    ),
    "scores": ("scores/scores.json", lambda folder: ga.Scores.load(folder / "scores")),
    "change": ("change/change.safetensors", lambda folder: Change.load(folder / "change")),
    "stream": ("stream/stream.json", lambda folder: StreamResult.load(folder / "stream")),
    "core": ("core/core.json", lambda folder: load_core(folder / "core")),
    "peft": ("peft/adapter_config.json", lambda folder: read_peft(folder / "peft")),
    "peft-weights": ("peft/adapter_model.safetensors", lambda folder: read_peft(folder / "peft")),
}


def main() -> None:
    """Fuzz one reader until libFuzzer's options say stop."""
    logging.disable(logging.WARNING)
    name, *options = sys.argv[1:] or [""]
    if name not in READERS:
        sys.exit(f"expected: a reader among {', '.join(READERS)}\ngot:      {name!r}")
    file, read = READERS[name]
    with tempfile.TemporaryDirectory() as place:
        folder, corpus = Path(place) / "artefacts", Path(place) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        if name == "yaml":
            import mutate_yaml

            mutate_yaml.prepare(corpus)
        else:
            mutate_artefacts.prepare(folder)
            damage.without_digests(folder)
            (corpus / "whole").write_bytes((folder / file).read_bytes())

        def one_input(data: bytes) -> None:
            (folder / file).write_bytes(data)
            kind, text = runner.judge(runner.Attack("", lambda: read(folder)))
            if kind == "fault":
                raise AssertionError(text)

        atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
