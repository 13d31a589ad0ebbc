"""Perturbations of texts and tokens, one class for each kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gatedadapters.errors import ConfigError
from gatedadapters.robustness.base import DROPPED, Ids, TextPerturbation, TokenPerturbation, Vocabulary


class Typos(TextPerturbation):
    """Swaps two neighbouring characters of a word. Eligible are words with two neighbouring characters that differ."""

    kind = "typos"

    def eligible(self, words: Sequence[str]) -> Sequence[int]:
        """Positions of words with two neighbouring characters that differ."""
        return [index for index, word in enumerate(words) if self._swaps(word)]

    def touch(self, words: list[str], chosen: Ids, draw: np.random.Generator) -> list[str]:
        """Swap two characters in each chosen word."""
        for index in chosen:
            word = words[index]
            at = int(draw.choice(self._swaps(word)))
            words[index] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        return words

    @staticmethod
    def _swaps(word: str) -> list[int]:
        """Positions of characters that differ from the next one."""
        return [at for at in range(len(word) - 1) if word[at] != word[at + 1]]


class Case(TextPerturbation):
    """Turns upper case into lower case and the reverse. Eligible are words with letters that have both.

    It makes no difference to a model whose tokenizer ignores case.
    """

    kind = "case"

    def eligible(self, words: Sequence[str]) -> Sequence[int]:
        """Positions of words that swapping case changes."""
        return [index for index, word in enumerate(words) if word.swapcase() != word]

    def touch(self, words: list[str], chosen: Ids, draw: np.random.Generator) -> list[str]:
        """Swap the case of every letter of each chosen word."""
        for index in chosen:
            words[index] = words[index].swapcase()
        return words


class TokenDeletion(TokenPerturbation):
    """Deletes tokens. If no token would be left, the first one stays."""

    kind = "token_deletion"

    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Delete the chosen tokens."""
        ids[chosen] = DROPPED
        return ids


class Truncation(TokenPerturbation):
    """Deletes the last tokens of a text. The ratio is the share of the text that is cut off."""

    kind = "truncation"

    def choose(self, eligible: Sequence[int] | Ids, draw: np.random.Generator) -> Ids:
        """As many positions as other kinds choose, but the last ones."""
        count = len(super().choose(eligible, draw))
        return np.asarray(eligible, dtype=np.int64)[len(eligible) - count :]

    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Delete the chosen tokens."""
        ids[chosen] = DROPPED
        return ids


class TokenSwap(TokenPerturbation):
    """Swaps neighbouring tokens. The ratio is the share of disjoint pairs of neighbours that are swapped."""

    kind = "token_swap"

    def eligible(self, positions: Ids) -> Ids:
        """The position of the first token of each pair. Tokens with a special one between them are no neighbours."""
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
        """Swap each chosen token with the next one."""
        ids[chosen], ids[chosen + 1] = ids[chosen + 1], ids[chosen].copy()
        return ids


class TokenReplacement(TokenPerturbation):
    """Replaces tokens by others; each other ordinary token is equally likely."""

    kind = "token_replacement"

    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Draw another token for each chosen one."""
        ordinary = vocabulary.ordinary()
        drawn = draw.integers(0, len(ordinary) - 1, size=len(chosen))
        drawn += drawn >= np.searchsorted(ordinary, ids[chosen])  # skips the token itself
        ids[chosen] = ordinary[drawn]
        return ids


class TokenMasking(TokenPerturbation):
    """Replaces tokens by the mask token. It needs a tokenizer that has one."""

    kind = "token_masking"

    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Mask the chosen tokens.

        Raises:
            ConfigError: the tokenizer has no mask token.
        """
        if vocabulary.mask is None:
            raise ConfigError(
                "tokens cannot be masked without a mask token",
                expected="a tokenizer with a mask token",
                got="none",
                where=self.kind,
                fix="use token_replacement or token_deletion",
            )
        ids[chosen] = vocabulary.mask
        return ids


class NearestEmbedding(TokenPerturbation):
    """Replaces tokens by those with the nearest embedding (largest cosine) in the pretrained model.

    It stands in for synonyms and needs no dictionary.
    """

    kind = "nearest_embedding"

    def touch(self, ids: Ids, chosen: Ids, draw: np.random.Generator, vocabulary: Vocabulary) -> Ids:
        """Look up the nearest token of each chosen one.

        Raises:
            ConfigError: the vocabulary has no embedding.
        """
        ids[chosen] = vocabulary.nearest(ids[chosen])
        return ids
