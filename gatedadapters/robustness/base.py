"""What noise and perturbations share: a seed decides which share of what may be touched is touched."""

from __future__ import annotations

import math
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gatedadapters.data import Examples
from gatedadapters.errors import ConfigError

Ids = NDArray[np.int64]
Feature = Mapping[str, Any]
"""One tokenised example: `input_ids`, its other columns of the same length, and what belongs to it as a whole."""

DROPPED = -1  # in place of a token id: this position goes


class Corruption(ABC):
    """A way to spoil data or training, to a degree.

    The same seed always gives the same result, whatever else draws random numbers, and nothing else notices: every
    draw comes from a private generator. At ratio 0 everything stays as it is.

    Args:
        ratio: how much, in [0, 1]; each kind says of what.
        seed: of what is chosen.

    Raises:
        ConfigError: the ratio lies outside [0, 1].
    """

    kind: ClassVar[str]

    def __init__(self, ratio: float, *, seed: int = 0) -> None:
        if not 0 <= ratio <= 1:  # also where it is not a number
            raise ConfigError(
                "no such share",
                expected="a ratio in [0, 1]",
                got=ratio,
                where=f"{self.kind}: ratio",
                fix="0 changes nothing, 1 everything that may be changed",
            )
        self.ratio, self.seed = float(ratio), int(seed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ratio:g}, seed={self.seed})"

    def generator(self, *key: int) -> np.random.Generator:
        """Random numbers that depend on the kind, the seed and `key` alone, so that ratios are nested: what a small
        ratio touches, a larger one touches too.
        """
        return np.random.default_rng((zlib.crc32(self.kind.encode()), self.seed, *key))

    def choose(self, eligible: Sequence[int] | Ids, draw: np.random.Generator) -> Ids:
        """Which of `eligible` are touched, sorted: rounded up or down by chance, so that the expected share is exactly
        the ratio.
        """
        count = math.floor(self.ratio * len(eligible) + draw.random())
        order = draw.permutation(len(eligible))
        return np.sort(np.asarray(eligible, dtype=np.int64)[order[: min(count, len(eligible))]])


class Noise(Corruption):
    """Something that only training meets: labels, embeddings or gradients that are off."""


class Perturbation(Corruption):
    """Inputs that are off. For evaluation; training meets it where it is given as noise."""


class TextPerturbation(Perturbation):
    """Changes words of a text, before it is tokenised. To add one: `kind`, `touch`, and where not every word can be
    touched, `eligible`.

    The ratio is the share of eligible words. White space stays.
    """

    def eligible(self, words: Sequence[str]) -> Sequence[int]:
        """Positions of the words that can be touched."""
        return range(len(words))

    @abstractmethod
    def touch(self, words: list[str], chosen: Ids, draw: np.random.Generator) -> list[str]:
        """The words with each of `chosen` changed, and no other; a list of its own, of the same length."""

    def text(self, text: str, key: int = 0) -> str:
        """A text, perturbed; `key` (say, the example's position) makes texts differ in what is chosen."""
        parts = re.split(r"(\s+)", text)  # words at even positions, white space between
        words, draw = parts[::2], self.generator(key)
        chosen = self.choose(self.eligible(words), draw)
        if len(chosen):
            parts[::2] = self.touch(list(words), chosen, draw)
        return "".join(parts)

    def examples(self, examples: Examples) -> Examples:
        """A split with every text and second text perturbed; labels stay."""
        texts = [self.text(text, index) for index, text in enumerate(examples.texts)]
        pairs = examples.pairs
        if pairs is not None:
            pairs = [self.text(text, len(texts) + index) for index, text in enumerate(pairs)]
        return Examples(texts, list(examples.labels), pairs)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What is to be known of tokens.

    Attributes:
        size: token ids lie in 0..size-1.
        special: ids that are never touched nor put in place of others: padding, separators, unknown, ...
        mask: the id that masks, where there is one.
        embedding: (size or more, width), of the pretrained model; None where it is not at hand.
    """

    size: int
    special: frozenset[int]
    mask: int | None = None
    embedding: Tensor | None = None
    _nearest: dict[int, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> Vocabulary:
        """Of a tokenizer, and the input embeddings of its model as they are now."""
        weight = None
        if model is not None:
            embeddings: Any = model
            weight = embeddings.get_input_embeddings().weight.detach().float().clone()
        special = frozenset(int(token) for token in tokenizer.all_special_ids)
        return cls(len(tokenizer), special, tokenizer.mask_token_id, weight)

    def ordinary(self) -> Ids:
        """Every id that is not special."""
        return np.setdiff1d(np.arange(self.size), list(self.special))

    def nearest(self, ids: Ids) -> Ids:
        """For each id the other ordinary one whose embedding points most nearly in the same direction.

        Raises:
            ConfigError: there is no embedding.
        """
        if self.embedding is None:
            raise ConfigError(
                "nothing says which tokens are alike",
                expected="a vocabulary with the model's embedding",
                got="none",
                where="nearest_embedding",
                fix="Vocabulary.of(tokenizer, model)",
            )
        fresh = [token for token in np.unique(ids).tolist() if token not in self._nearest]
        if fresh:
            table = nn.functional.normalize(self.embedding[: self.size], dim=-1)
            likeness = table[fresh] @ table.T
            likeness[:, sorted(self.special)] = -torch.inf
            likeness[range(len(fresh)), fresh] = -torch.inf
            self._nearest.update(zip(fresh, likeness.argmax(-1).tolist(), strict=True))
        return np.array([self._nearest[token] for token in ids.tolist()], dtype=np.int64)


class TokenPerturbation(Perturbation):
    """Changes tokens of a tokenised example. To add one: `kind` and `touch`.

    The ratio is the share of eligible tokens: attended to and not special.
    """

    def eligible(self, positions: Ids) -> Ids:
        """What is chosen among, given the positions of ordinary tokens."""
        return positions

    @abstractmethod
    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Token ids with those at `chosen` changed or `DROPPED`; an array of its own, (length,)."""

    def feature(self, feature: Feature, vocabulary: Vocabulary, key: int = 0) -> dict[str, Any]:
        """A tokenised example, perturbed: where tokens go, so do their entries in every column of the same length."""
        ids = np.asarray(feature["input_ids"], dtype=np.int64)
        attended = np.asarray(feature.get("attention_mask", np.ones_like(ids))) == 1
        ordinary = np.flatnonzero(attended & ~np.isin(ids, list(vocabulary.special)))
        draw = self.generator(key)
        chosen = self.choose(self.eligible(ordinary), draw)
        if not len(chosen):
            return dict(feature)
        changed = self.touch(ids.copy(), chosen, draw, vocabulary)
        stays = changed != DROPPED
        if not (stays & attended).any():  # a model cannot read nothing
            first = int(np.flatnonzero(attended)[0])
            changed[first], stays[first] = ids[first], True
        columns = {name: _kept(value, stays) for name, value in feature.items()}
        given, left = feature["input_ids"], changed[stays]
        if isinstance(given, Tensor):
            return {**columns, "input_ids": torch.from_numpy(left).to(given)}
        return {**columns, "input_ids": left if isinstance(given, np.ndarray) else left.tolist()}


def _kept(column: Any, stays: NDArray[np.bool_]) -> Any:
    """The entries of a column that go by tokens; anything else as it is."""
    if isinstance(column, str) or not hasattr(column, "__len__") or getattr(column, "ndim", 1) == 0:
        return column
    if len(column) != len(stays):
        return column
    if isinstance(column, Tensor):
        return column[torch.from_numpy(stays)]
    return (
        column[stays] if isinstance(column, np.ndarray) else [e for e, stay in zip(column, stays, strict=True) if stay]
    )
