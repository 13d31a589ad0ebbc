"""The base classes of noises and perturbations: a ratio says how much is changed, a seed decides what."""

from __future__ import annotations

import math
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gatedadapters.data import ChoiceExample, Conversation, Examples, LanguageExample
from gatedadapters.errors import ConfigError

Ids = NDArray[np.int64]
TokenisedExample = Mapping[str, Any]
"""One tokenised example: `input_ids`, other columns of the same length, and values of the example as a whole."""

DROPPED = -1
"""Stands in place of a token's id where the token is deleted."""


class Corruption(ABC):
    """A noise or a perturbation of a given strength.

    Every draw comes from a generator of its own. So the same seed always gives the same result, and global random
    numbers are not affected. At ratio 0 everything stays as it is.

    Args:
        ratio: how much is changed, in [0, 1]; each kind says of what.
        seed: decides what is changed.

    Raises:
        ConfigError: the ratio lies outside [0, 1].
    """

    kind: ClassVar[str]

    def __init__(self, ratio: float, *, seed: int = 0) -> None:
        if not 0 <= ratio <= 1:  # also where it is not a number
            raise ConfigError(
                "a ratio lies between 0 and 1",
                expected="a ratio in [0, 1]",
                got=ratio,
                where=f"{self.kind}: ratio",
                fix="0 changes nothing, 1 everything that may be changed",
            )
        self.ratio, self.seed = float(ratio), int(seed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ratio:g}, seed={self.seed})"

    def generator(self, *key: int) -> np.random.Generator:
        """A generator of random numbers that depends only on the kind, the seed and `key`.

        It does not depend on the ratio. So what a small ratio changes, a larger ratio changes as well.
        """
        return np.random.default_rng((zlib.crc32(self.kind.encode()), self.seed, *key))

    def choose(self, eligible: Sequence[int] | Ids, draw: np.random.Generator) -> Ids:
        """Draw which of the eligible positions are changed, sorted.

        Their number is rounded up or down at random, so that the expected share is exactly the ratio.

        Args:
            eligible: positions to choose from.
            draw: see `generator`.
        """
        count = math.floor(self.ratio * len(eligible) + draw.random())
        order = draw.permutation(len(eligible))
        return np.sort(np.asarray(eligible, dtype=np.int64)[order[: min(count, len(eligible))]])


class Noise(Corruption):
    """A corruption that is applied in training only: wrong labels, noisy embeddings or gradients."""


class Perturbation(Corruption):
    """A corruption of inputs, for evaluation. It can be applied in training as well."""


class TextPerturbation(Perturbation):
    """Changes words of a text before it is tokenised. The ratio is the share of eligible words. White space stays.

    A subclass defines `kind` and `touch`, and `eligible` if not every word can be changed.
    """

    def eligible(self, words: Sequence[str]) -> Sequence[int]:
        """Positions of the words that can be changed."""
        return range(len(words))

    @abstractmethod
    def touch(self, words: list[str], chosen: Ids, draw: np.random.Generator) -> list[str]:
        """The words with each chosen word changed, and no other.

        Args:
            words: of the text; the list may be changed in place.
            chosen: positions of the words to change, sorted.
            draw: random numbers.

        Returns:
            As many words.
        """

    def text(self, text: str, key: int = 0) -> str:
        """A perturbed text. Texts with different keys (such as their positions) are changed at different words."""
        parts = re.split(r"(\s+)", text)  # words at even positions, white space between
        words, draw = parts[::2], self.generator(key)
        chosen = self.choose(self.eligible(words), draw)
        if len(chosen):
            parts[::2] = self.touch(list(words), chosen, draw)
        return "".join(parts)

    def language_example(self, example: LanguageExample, index: int) -> LanguageExample:
        """An example of a language task with what is asked perturbed. What is to be predicted stays.

        Args:
            example: a question with an answer, a conversation, or a multiple-choice question.
            index: its position in the split.

        Raises:
            ConfigError: it is running text, of which every word is to be predicted.
        """
        if isinstance(example, ChoiceExample):
            passage = self.text(example.passage, 2 * index + 1)
            return replace(example, question=self.text(example.question, 2 * index), passage=passage)
        if isinstance(example, Conversation):
            key = int(self.generator(index).integers(2**31))
            turns = enumerate(example.messages)
            return Conversation(
                tuple(
                    turn._replace(content=self.text(turn.content, key + number)) if turn.role == "user" else turn
                    for number, turn in turns
                )
            )
        if example.answer is None:
            raise ConfigError(
                "in running text every word is to be predicted, so perturbed words would be learned",
                expected="texts with answers, conversations or choices",
                got=f"running text and {self.kind}",
                where=self.kind,
                fix="a perturbation of tokens, such as replacement, changes what is read alone",
            )
        return example._replace(text=self.text(example.text, index))

    def examples(self, examples: Examples) -> Examples:
        """A split with every text and second text perturbed. Labels stay."""
        texts = [self.text(text, index) for index, text in enumerate(examples.texts)]
        pairs = examples.pairs
        if pairs is not None:
            pairs = [self.text(text, len(texts) + index) for index, text in enumerate(pairs)]
        return Examples(texts, list(examples.labels), pairs)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What perturbations need to know about tokens.

    Attributes:
        size: token ids lie in 0..size-1.
        special: ids of padding, separators, unknown tokens and the like. They are neither changed nor inserted.
        mask: id of the mask token; None where there is none.
        embedding: input embeddings of the pretrained model, (at least size, width); None where they are not known.
    """

    size: int
    special: frozenset[int]
    mask: int | None = None
    embedding: Tensor | None = None
    _nearest: dict[int, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> Vocabulary:
        """The vocabulary of a tokenizer, with the input embeddings that its model has now.

        Args:
            tokenizer: the tokenizer.
            model: its model; only `nearest_embedding` needs it.
        """
        weight = None
        if model is not None:
            embeddings: Any = model
            weight = embeddings.get_input_embeddings().weight.detach().float().clone()
        special = frozenset(int(token) for token in tokenizer.all_special_ids)
        return cls(len(tokenizer), special, tokenizer.mask_token_id, weight)

    def ordinary(self) -> Ids:
        """All ids that are not special, sorted."""
        return np.setdiff1d(np.arange(self.size), list(self.special))

    def nearest(self, ids: Ids) -> Ids:
        """For each id, the other ordinary id whose embedding has the largest cosine with its own.

        Raises:
            ConfigError: the vocabulary has no embedding.
        """
        if self.embedding is None:
            raise ConfigError(
                "without embeddings, similar tokens are not known",
                expected="a vocabulary with the model's embedding",
                got="none",
                where="nearest_embedding",
                fix="Vocabulary.of(tokenizer, model)",
            )
        fresh = [token for token in np.unique(ids).tolist() if token not in self._nearest]
        if fresh:
            table = nn.functional.normalize(self.embedding[: self.size], dim=-1)
            cosines = table[fresh] @ table.T
            cosines[:, sorted(self.special)] = -torch.inf
            cosines[range(len(fresh)), fresh] = -torch.inf
            self._nearest.update(zip(fresh, cosines.argmax(-1).tolist(), strict=True))
        return np.array([self._nearest[token] for token in ids.tolist()], dtype=np.int64)


class TokenPerturbation(Perturbation):
    """Changes tokens of a tokenised example. The ratio is the share of eligible tokens: attended to, and not special.

    Where some tokens are labelled and others are not, as where the answer to a question is learned, only the others are
    eligible: what is to be predicted stays.

    A subclass defines `kind` and `touch`.
    """

    def eligible(self, positions: Ids) -> Ids:
        """The positions that can be chosen, given those of ordinary tokens."""
        return positions

    @abstractmethod
    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """The token ids with each chosen one changed or set to `DROPPED`.

        Args:
            ids: token ids (length,) int64; the array may be changed in place.
            chosen: positions of the tokens to change, sorted.
            draw: random numbers.
            vocabulary: of the tokenizer.

        Returns:
            Token ids (length,).
        """

    def feature(self, feature: TokenisedExample, vocabulary: Vocabulary, key: int = 0) -> dict[str, Any]:
        """A perturbed tokenised example. Where a token is deleted, so is its entry in every column of the same length.

        Args:
            feature: the example; it is not changed.
            vocabulary: of the tokenizer.
            key: for example its position: examples with different keys are changed at different tokens.
        """
        ids = np.asarray(feature["input_ids"], dtype=np.int64)
        attended = np.asarray(feature.get("attention_mask", np.ones_like(ids))) == 1
        ordinary = np.flatnonzero(attended & ~np.isin(ids, list(vocabulary.special)) & _asked(feature, len(ids)))
        draw = self.generator(key)
        chosen = self.choose(self.eligible(ordinary), draw)
        if not len(chosen):
            return dict(feature)
        changed = self.touch(ids.copy(), chosen, draw, vocabulary)
        stays = changed != DROPPED
        if not (stays & attended).any():  # a model needs at least one token
            first = int(np.flatnonzero(attended)[0])
            changed[first], stays[first] = ids[first], True
        columns = {name: _kept(value, stays) for name, value in feature.items()}
        given, left = feature["input_ids"], changed[stays]
        if isinstance(given, Tensor):
            return {**columns, "input_ids": torch.from_numpy(left).to(given)}
        return {**columns, "input_ids": left if isinstance(given, np.ndarray) else left.tolist()}


def _asked(feature: TokenisedExample, length: int) -> NDArray[np.bool_]:
    """The tokens that are not to be predicted; all, where there are no labels of tokens or every token has one."""
    labels = feature.get("labels")
    if labels is None or not hasattr(labels, "__len__") or getattr(labels, "ndim", 1) == 0 or len(labels) != length:
        return np.ones(length, dtype=bool)
    unlabelled: NDArray[np.bool_] = np.asarray(labels) == -100
    return unlabelled if unlabelled.any() else ~unlabelled


def _kept(column: Any, stays: NDArray[np.bool_]) -> Any:
    """A column without the entries of deleted tokens; values that are no column of that length as they are."""
    if isinstance(column, str) or not hasattr(column, "__len__") or getattr(column, "ndim", 1) == 0:
        return column
    if len(column) != len(stays):
        return column
    if isinstance(column, Tensor):
        return column[torch.from_numpy(stays)]
    return (
        column[stays] if isinstance(column, np.ndarray) else [e for e, stay in zip(column, stays, strict=True) if stay]
    )
