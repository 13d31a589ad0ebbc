"""The contract of noise and perturbations, as a test class to inherit from.

In a test file of your own, with pytest::

    class TestMyPerturbation(CorruptionContract):
        corruptions = MyPerturbation
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gatedadapters.data import Examples
from gatedadapters.errors import ConfigError
from gatedadapters.robustness import (
    Corruption,
    EmbeddingNoise,
    GradientNoise,
    LabelNoise,
    NoiseCallback,
    TextPerturbation,
    TokenPerturbation,
    Vocabulary,
    corrupt_batch,
)
from gatedadapters.testing.backbones import tiny

RATIOS = (0.0, 0.1, 0.25, 0.5, 1.0)
SEEDS = 60
CLASSES = 5
SIZE, SPECIAL = 120, (0, 1, 2, 3)  # padding, beginning, end, mask
TEXT = "Once upon\ta Time there was  one Miller who had three Sons and 1 Mill, 7 Donkeys and some Cats."


class CorruptionContract:
    """Tests of what every noise and every perturbation guarantees.

    Attributes:
        corruptions: the class to test, or several; each is built as `cls(ratio, seed=seed)`.
    """

    corruptions: ClassVar[type[Corruption] | Sequence[type[Corruption]]]

    @classmethod
    def pytest_generate_tests(cls, metafunc: Any) -> None:
        """Run every test for every class."""
        if "subject" in metafunc.fixturenames:
            offered = [cls.corruptions] if isinstance(cls.corruptions, type) else list(cls.corruptions)
            metafunc.parametrize("subject", offered, ids=[found.kind for found in offered])

    def test_the_ratio_is_exact_in_expectation(self, subject: type[Corruption]) -> None:
        """The share of changed units is never off by a whole unit, and exact on the average over seeds."""
        for ratio in RATIOS:
            shares, units = [], 1
            for seed in range(SEEDS):
                share, units = touched(subject(ratio, seed=seed))
                shares.append(share)
                if units:
                    assert abs(share - ratio) < 1 / units, f"{share} of {units} for ratio {ratio}, seed {seed}"
            # A random rounding up or down deviates by at most half a unit; amplitudes have a chi-square distribution.
            deviation = (0.5 / units if units else 0.05 * ratio) / math.sqrt(SEEDS)
            assert abs(float(np.mean(shares)) - ratio) <= 5 * deviation + 1e-6, (ratio, float(np.mean(shares)))

    def test_the_same_seed_gives_the_same_and_another_one_another(self, subject: type[Corruption]) -> None:
        """Also if other code draws random numbers in between."""
        once = outcome(subject(0.5, seed=1))
        torch.rand(3)
        np.random.random()  # noqa: NPY002
        assert outcome(subject(0.5, seed=1)) == once
        others = [outcome(subject(0.5, seed=seed)) for seed in range(2, 8)]
        if subject.kind != "truncation":  # truncation cuts the end for any seed
            assert any(other != once for other in others)

    def test_ratio_0_is_the_identity(self, subject: type[Corruption]) -> None:
        """Bit for bit."""
        assert outcome(subject(0.0)) == outcome(None, like=subject)

    def test_global_random_states_do_not_change(self, subject: type[Corruption]) -> None:
        """Neither torch's, nor NumPy's, nor Python's."""
        before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
        outcome(subject(0.5))
        after = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]

    def test_special_tokens_and_labels_are_untouched(self, subject: type[Corruption]) -> None:
        """Special tokens stay in their order, and none is added; only label noise changes labels."""
        for ratio in RATIOS:
            found = subject(ratio, seed=3)
            if isinstance(found, TokenPerturbation):
                feature = example()
                changed = found.feature(feature, vocabulary())
                specials = [token for token in changed["input_ids"] if token in SPECIAL]
                expected = [token for token in feature["input_ids"] if token in SPECIAL]
                if found.kind == "token_masking":
                    specials = [token for token in specials if token != 3]
                assert specials == expected
                assert changed["labels"] == feature["labels"]
                assert changed["task_ids"] == feature["task_ids"]
            elif isinstance(found, TextPerturbation):
                examples = Examples([TEXT, "", "one"], [0, 1, 2], ["a Pair", TEXT, ""])
                changed_examples = found.examples(examples)
                assert changed_examples.labels == examples.labels
                assert found.text("") == ""
                assert [white(text) for text in changed_examples.texts] == [white(text) for text in examples.texts]
            elif isinstance(found, LabelNoise):
                assert all(0 <= label < CLASSES for label in found.labels(labels(), CLASSES))
            elif isinstance(found, EmbeddingNoise):
                ids, output = embedded()
                special = torch.isin(ids, torch.tensor(SPECIAL))
                assert torch.equal(found.embedded(ids, output, SPECIAL)[special], output[special])

    def test_columns_keep_their_lengths_and_padding_stays_padding(self, subject: type[Corruption]) -> None:
        """In single examples, and in batches that are padded on the left or on the right."""
        if not issubclass(subject, TokenPerturbation):
            return
        for ratio in RATIOS:
            changed = subject(ratio).feature(example(), vocabulary())
            length = len(changed["input_ids"])
            assert length >= 1
            assert all(len(changed[name]) == length for name in ("attention_mask", "token_type_ids"))
            assert set(changed["attention_mask"]) == {1}
            for left in (False, True):
                batch = padded(left=left)
                new = corrupt_batch(batch, subject(ratio), vocabulary())
                assert new["input_ids"].shape == new["attention_mask"].shape == new["token_type_ids"].shape
                assert bool((new["input_ids"][new["attention_mask"] == 0] == 0).all())
                mask = new["attention_mask"].flip(1) if left else new["attention_mask"]
                assert bool((mask[:, 1:] <= mask[:, :-1]).all()), "holes in the attention mask"
                assert torch.equal(new["labels"], batch["labels"])
                assert all(new[name].dtype == value.dtype for name, value in batch.items())
                if ratio == 0:
                    assert all(torch.equal(new[name], value) for name, value in batch.items())

    def test_inputs_are_not_changed(self, subject: type[Corruption]) -> None:
        """A corruption returns new objects; only gradients are changed in place."""
        found = subject(1.0)
        if isinstance(found, TokenPerturbation):
            feature, before = example(), example()
            found.feature(feature, vocabulary())
            assert feature == before
        elif isinstance(found, LabelNoise):
            given = labels()
            found.labels(given, CLASSES)
            assert given == labels()
        elif isinstance(found, EmbeddingNoise):
            ids, output = embedded()
            copy = output.clone()
            found.embedded(ids, output, SPECIAL)
            assert torch.equal(copy, output)

    def test_a_ratio_outside_0_to_1_is_refused(self, subject: type[Corruption]) -> None:
        """The error names the kind."""
        for ratio in (-0.1, 1.5, math.nan):
            said = ""
            try:
                subject(ratio)
            except ConfigError as error:
                said = str(error)
            assert subject.kind in said, f"ratio {ratio} was to be refused; got {said!r}"


def touched(found: Corruption) -> tuple[float, int]:
    """Measure a corruption from its input and output.

    Returns:
        The share of changed units and the number of units; for noise on tensors, its relative amplitude and 0.
    """
    if isinstance(found, TextPerturbation):
        words = TEXT.split()
        return edits(words, found.text(TEXT).split()) / len(found.eligible(words)), len(found.eligible(words))
    if isinstance(found, TokenPerturbation):
        feature = example()
        ids = feature["input_ids"]
        ordinary = np.array([at for at, token in enumerate(ids) if token not in SPECIAL])
        units = len(found.eligible(ordinary))
        return edits(ids, found.feature(feature, vocabulary())["input_ids"]) / units, units
    if isinstance(found, LabelNoise):
        given = labels()
        wrong = sum(a != b for a, b in zip(given, found.labels(given, CLASSES), strict=True))
        return wrong / len(given), len(given)
    if isinstance(found, EmbeddingNoise):
        ids, output = embedded()
        ordinary_rows = ~torch.isin(ids, torch.tensor(SPECIAL))
        noise = (found.embedded(ids, output, SPECIAL) - output)[ordinary_rows]
        return root_mean_square(noise) / root_mean_square(output[ordinary_rows]), 0
    assert isinstance(found, GradientNoise), f"tell the contract how {type(found).__name__} is applied"
    parameter = torch.nn.Parameter(torch.zeros(64, 32))
    before = torch.randn(64, 32, generator=torch.Generator().manual_seed(5))
    parameter.grad = before.clone()
    found.gradients([parameter])
    return root_mean_square(parameter.grad - before) / root_mean_square(before), 0


def outcome(found: Corruption | None, like: type[Corruption] | None = None) -> Any:
    """The output of a corruption as data that == compares; for None, the input that `like` would get."""
    kind = like or type(found)
    if issubclass(kind, TextPerturbation):
        return TEXT if found is None else call(found, "text", TEXT)
    if issubclass(kind, TokenPerturbation):
        return example() if found is None else call(found, "feature", example(), vocabulary())
    if issubclass(kind, LabelNoise):
        return labels() if found is None else call(found, "labels", labels(), CLASSES)
    return trained_weights(None if found is None else NoiseCallback(found, frozenset(SPECIAL)))


def call(found: Corruption, method: str, *args: Any) -> Any:
    """Call a method that only a subclass of `Corruption` has."""
    function: Callable[..., Any] = getattr(found, method)
    return function(*args)


def trained_weights(noise: NoiseCallback | None) -> list[float]:
    """Sums of a tiny model's weights after two steps, with the noise called as a Trainer calls it."""
    model, batch = tiny("bert", head="classification")
    model.eval()  # no dropout; the hook reads the mode of the embedding alone
    embedding: Any = model
    embedding.get_input_embeddings().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments: Any = type("Arguments", (), {"gradient_accumulation_steps": 1})()
    state: Any = type("State", (), {"global_step": 0})()
    if noise is not None:
        noise.on_train_begin(arguments, state, state, model=model)
    for step in range(2):
        state.global_step = step
        model(**batch)[0].float().square().mean().backward()
        if noise is not None:
            noise.on_pre_optimizer_step(arguments, state, state, model=model)
        optimizer.step()
        optimizer.zero_grad()
    if noise is not None:
        noise.on_train_end(arguments, state, state)
    return [float(p.detach().double().sum()) for p in model.parameters()]


def edits(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Fewest substitutions, deletions, insertions and exchanges of neighbours that lead from `a` to `b`.

    References:
        Damerau 1964; the restricted (optimal string alignment) distance.
    """
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, rows[-2][j - 2] + (x != y))
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def example() -> dict[str, Any]:
    """A tokenised pair of texts, with special tokens at both ends and between."""
    ids = [1, *range(10, 23), 2, *range(40, 51), 2]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "token_type_ids": [0] * 15 + [1] * 12,
        "labels": 1,
        "task_ids": 0,
    }


def padded(*, left: bool) -> dict[str, Tensor]:
    """A padded batch of two examples of unequal length."""
    long, short = example(), [1, 30, 31, 32, 33, 34, 2]
    room = len(long["input_ids"]) - len(short)

    def row(values: list[int]) -> list[int]:
        return [0] * room + values if left else values + [0] * room

    return {
        "input_ids": torch.tensor([long["input_ids"], row(short)]),
        "attention_mask": torch.tensor([long["attention_mask"], row([1] * len(short))]),
        "token_type_ids": torch.tensor([long["token_type_ids"], row([0] * len(short))], dtype=torch.int32),
        "labels": torch.tensor([1, 0]),
    }


def vocabulary() -> Vocabulary:
    """The vocabulary of a made-up tokenizer."""
    embedding = torch.randn(SIZE, 8, generator=torch.Generator().manual_seed(1))
    embedding[SIZE // 2 :] = 2 * embedding[: SIZE // 2]  # each token's nearest neighbour is one that no example holds
    return Vocabulary(SIZE, frozenset(SPECIAL), mask=3, embedding=embedding)


def labels() -> list[int]:
    """The labels of a split."""
    return [index % CLASSES for index in range(37)]


def embedded() -> tuple[Tensor, Tensor]:
    """Token ids (4, 27) and made-up embeddings (4, 27, 16)."""
    ids = torch.tensor([example()["input_ids"]]).repeat(4, 1)
    return ids, torch.randn(4, 27, 16, generator=torch.Generator().manual_seed(2))


def root_mean_square(value: Tensor) -> float:
    """The root mean square of a tensor."""
    return float(value.detach().square().mean().sqrt())


def white(text: str) -> list[str]:
    """The white space of a text."""
    return [character for character in text if character.isspace()]
