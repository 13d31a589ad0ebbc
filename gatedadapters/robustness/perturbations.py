"""Perturbations of texts and tokens, one class each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gatedadapters.errors import ConfigError
from gatedadapters.robustness.base import DROPPED, Ids, TextPerturbation, TokenPerturbation, Vocabulary


class Typos(TextPerturbation):
    """Two neighbouring characters of a word change places. Eligible: words with two neighbours that differ."""

    kind = "typos"

    def eligible(self, words: Sequence[str]) -> Sequence[int]:
        """Words in which a change of places shows."""
        return [index for index, word in enumerate(words) if self._places(word)]

    def touch(self, words: list[str], chosen: Ids, draw: np.random.Generator) -> list[str]:
        """One exchange in each."""
        for index in chosen:
            word = words[index]
            at = int(draw.choice(self._places(word)))
            words[index] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        return words

    @staticmethod
    def _places(word: str) -> list[int]:
        return [at for at in range(len(word) - 1) if word[at] != word[at + 1]]


class Case(TextPerturbation):
    """Upper case becomes lower case and the reverse. Eligible: words with letters that have both.

    A model whose tokenizer ignores case does not notice.
    """

    kind = "case"

    def eligible(self, words: Sequence[str]) -> Sequence[int]:
        """Words in which it shows."""
        return [index for index, word in enumerate(words) if word.swapcase() != word]

    def touch(self, words: list[str], chosen: Ids, draw: np.random.Generator) -> list[str]:
        """Every letter of each."""
        for index in chosen:
            words[index] = words[index].swapcase()
        return words


class TokenDeletion(TokenPerturbation):
    """Tokens are left out; where nothing would be left to read, the first stays."""

    kind = "token_deletion"

    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Drop them."""
        ids[chosen] = DROPPED
        return ids


class Truncation(TokenPerturbation):
    """The last tokens are left out; the ratio is the share of a text that is cut off."""

    kind = "truncation"

    def choose(self, eligible: Sequence[int] | Ids, draw: np.random.Generator) -> Ids:
        """As many as by chance, but the last ones."""
        count = len(super().choose(eligible, draw))
        return np.asarray(eligible, dtype=np.int64)[len(eligible) - count :]

    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Drop them."""
        ids[chosen] = DROPPED
        return ids


class TokenSwap(TokenPerturbation):
    """Neighbouring tokens change places; the ratio is the share of disjoint pairs of neighbours that do."""

    kind = "token_swap"

    def eligible(self, positions: Ids) -> Ids:
        """The first of each pair. Tokens with a special one between them are no neighbours."""
        first = []
        at = 0
        while at + 1 < len(positions):
            if positions[at + 1] == positions[at] + 1:
                first.append(positions[at])
                at += 2
            else:
                at += 1
        return np.array(first, dtype=np.int64)

    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Exchange each with its neighbour."""
        ids[chosen], ids[chosen + 1] = ids[chosen + 1], ids[chosen].copy()
        return ids


class TokenReplacement(TokenPerturbation):
    """Tokens become others, each ordinary one with equal probability."""

    kind = "token_replacement"

    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Draw for each another one than it is."""
        ordinary = vocabulary.ordinary()
        drawn = draw.integers(0, len(ordinary) - 1, size=len(chosen))
        drawn += drawn >= np.searchsorted(ordinary, ids[chosen])  # leaves out the one that stands there
        ids[chosen] = ordinary[drawn]
        return ids


class TokenMasking(TokenPerturbation):
    """Tokens become the mask token, for tokenizers that have one."""

    kind = "token_masking"

    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Mask them."""
        if vocabulary.mask is None:
            raise ConfigError(
                "tokens cannot be masked",
                expected="a tokenizer with a mask token",
                got="none",
                where=self.kind,
                fix="use token_replacement or token_deletion",
            )
        ids[chosen] = vocabulary.mask
        return ids


class NearestEmbedding(TokenPerturbation):
    """Tokens become those with the nearest embedding in the pretrained model (cosine): a stand-in for synonyms that
    needs no dictionary.
    """

    kind = "nearest_embedding"

    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Look each up."""
        ids[chosen] = vocabulary.nearest(ids[chosen])
        return ids
