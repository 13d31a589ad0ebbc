from __future__ import annotations

from collections import Counter

import pytest

from gatedadapters.data.tasks import (
    Examples,
    Row,
    TextTask,
    distinct,
    split_rows,
    split_sizes,
    stratified_order,
)
from gatedadapters.errors import DataError

LABELS = [0] * 60 + [1] * 30 + [2] * 10


def rows() -> list[Row]:
    return [Row(f"text {index}", None, label) for index, label in enumerate(LABELS)]


def test_every_run_of_a_stratified_order_has_the_shares_of_the_whole() -> None:
    order = stratified_order(LABELS, seed=3)
    assert sorted(order) == list(range(100))
    for start in range(0, 100, 20):
        counts = Counter(LABELS[index] for index in order[start : start + 20])
        assert abs(counts[0] - 12) <= 1
        assert abs(counts[1] - 6) <= 1
        assert abs(counts[2] - 2) <= 1


def test_a_sample_has_the_shares_of_the_whole_and_changes_nothing_where_there_is_no_cut() -> None:
    whole = Examples.from_rows(rows())
    assert whole.sample(100, seed=3) == whole.sample(None, seed=3) == whole
    cut = whole.sample(10, seed=3)
    assert Counter(cut.labels) == {0: 6, 1: 3, 2: 1}
    assert all(
        whole.labels[whole.texts.index(text)] == label for text, label in zip(cut.texts, cut.labels, strict=True)
    )
    assert cut == whole.sample(10, seed=3) != whole.sample(10, seed=4)


def test_splits_are_disjoint_and_deterministic_by_seed() -> None:
    first = split_rows(rows(), train=50, validation=20, test=20, seed=1)
    assert first == split_rows(rows(), train=50, validation=20, test=20, seed=1)
    assert first != split_rows(rows(), train=50, validation=20, test=20, seed=2)
    texts = [row.text for part in first for row in part]
    assert len(set(texts)) == len(texts) == 90


def test_test_split_does_not_depend_on_the_size_of_the_training_split() -> None:
    small = split_rows(rows(), train=10, validation=20, test=20, seed=0)
    large = split_rows(rows(), train=50, validation=20, test=20, seed=0)
    assert small[1:] == large[1:]
    assert small[0] == large[0][:10]


@pytest.mark.parametrize(
    ("wanted", "sizes"),
    [((50, 20, 20), (50, 20, 20)), ((None, 20, 20), (60, 20, 20)), ((200, 100, 100), (50, 25, 25))],
)
def test_splits_shrink_in_proportion_where_examples_are_few(
    wanted: tuple[int | None, int, int], sizes: tuple[int, int, int]
) -> None:
    assert split_sizes(100, *wanted) == sizes


def test_repeats_are_kept_once_and_contradictions_not_at_all() -> None:
    table = [
        Row("A  b", None, 0),
        Row("a B", None, 0),
        Row("c", None, 0),
        Row("C", None, 1),
        Row("c", "d", 1),
    ]
    assert distinct(table) == [Row("A  b", None, 0), Row("c", "d", 1)]


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(DataError, match="2 texts, 1 labels, none pairs"):
        Examples(["a", "b"], [0])


def test_a_missing_split_is_named() -> None:
    examples = Examples(["a", "b"], [0, 1])
    task = TextTask("tiny", examples, examples, None, ("no", "yes"))
    assert task.split("train") is examples
    assert task.n_classes == 2
    with pytest.raises(DataError, match=r"no test split[\s\S]*tiny"):
        task.split("test")
    with pytest.raises(DataError, match=r"train / validation / test[\s\S]*'dev'"):
        task.split("dev")
