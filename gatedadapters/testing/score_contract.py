"""The contract of an importance score, as a test class to inherit from.

In a test file of your own, with pytest::

    class TestMyScore(ScoreContract):
        scores = MyScore()
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gatedadapters.errors import MaskError
from gatedadapters.masking import Score, Scores, score
from gatedadapters.testing.backbones import VOCABULARY, heads, tiny


class ScoreContract:
    """Tests of what every score guarantees, on tiny backbones.

    Attributes:
        scores: the score to test, or several.
        families: backbones to score, among `gatedadapters.testing.FAMILIES`.
    """

    scores: ClassVar[Score | Sequence[Score]]
    families: ClassVar[Sequence[str]] = ("bert", "llama")

    @classmethod
    def pytest_generate_tests(cls, metafunc: Any) -> None:
        """Run every test for every score and, if it has an argument `family`, for every family."""
        if "method" in metafunc.fixturenames:
            offered = [cls.scores] if isinstance(cls.scores, Score) else list(cls.scores)
            metafunc.parametrize("method", offered, ids=[method.kind for method in offered])
        if "family" in metafunc.fixturenames:
            metafunc.parametrize("family", cls.families)

    def test_every_element_has_a_finite_score_of_at_least_zero(self, method: Score, family: str) -> None:
        """For every parameter of the backbone, in its shape; the scores are not all equal."""
        model, batches = scored(family)
        found = score(model, batches, kind=method, heads=())
        assert found.kind == method.kind
        assert set(found.names) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            assert found[name].shape == parameter.shape
            assert bool(torch.isfinite(found[name]).all())
            assert float(found[name].min()) >= 0
        assert len({float(found[name].max()) for name in found.names}) > 1

    def test_the_model_is_left_as_it_was(self, method: Score, family: str) -> None:
        """Values, training mode, gradients and `requires_grad` flags, also if scoring fails half-way."""
        model, batches = scored(family)
        model.train()
        first = next(model.parameters())
        first.grad = torch.ones_like(first)
        list(model.parameters())[-1].requires_grad_(False)
        before = _state(model)
        score(model, batches, kind=method, heads=())
        _assert_state(before, model)
        if method.needs_data:
            broken = {**batches[0], "input_ids": batches[0]["input_ids"] + VOCABULARY}
            try:
                score(model, [batches[0], broken], kind=method, heads=())
            except IndexError:
                _assert_state(before, model)
            else:
                raise AssertionError("tokens outside the vocabulary were accepted")

    def test_equal_calls_give_equal_scores(self, method: Score) -> None:
        """Also for batches from a generator, which can be read only once."""
        model, batches = scored("bert")
        once, again = score(model, batches, kind=method), score(model, iter(batches), kind=method)
        for name in once.names:
            assert torch.equal(once[name], again[name]), name

    def test_scores_on_disk_are_those_in_memory(self, method: Score) -> None:
        """Both scores written while they are computed (`spill`), and scores saved and loaded later."""
        model, batches = scored("bert")
        held = score(model, batches, kind=method)
        with tempfile.TemporaryDirectory() as folder:
            spilled = score(model, batches, kind=method, spill=Path(folder) / "spilled")
            held.save(Path(folder) / "saved")
            for other in (spilled, Scores.load(Path(folder) / "spilled"), Scores.load(Path(folder) / "saved")):
                assert other.record == spilled.record
                for name in held.names:
                    assert torch.equal(other[name], held[name]), name

    def test_bad_data_is_refused(self, method: Score) -> None:
        """No data, an infinite loss, a loss of 0, and one loss for the whole batch."""
        if not method.needs_data:
            return
        model, batches = scored("bert")
        before = _state(model)
        no_data: list[Any] = [None, [], iter(())]
        for data in no_data:
            _refused("no data", model, data, kind=method)

        def infinite(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            return _output(model, batch).flatten(1).sum(1) * torch.inf

        def nothing(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            return _output(model, batch).flatten(1).sum(1) * 0.0

        def scalar(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            return _output(model, batch).sum()

        _refused("not finite", model, batches, kind=method, loss=infinite)
        _refused("all scores are 0", model, batches, kind=method, loss=nothing)
        _refused("one loss per example", model, batches, kind=method, loss=scalar)
        _assert_state(before, model)


def scored(family: str, *, batches: int = 2) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A tiny model with a head and labelled batches for it, of 3 and 2 examples with padding."""
    model, batch = tiny(family, head="lm" if "lm" in heads(family) else "base")
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(batches):
        size = 3 - index % 2
        shape = batch["input_ids"].shape[1]
        ids = torch.randint(3, VOCABULARY, (size, shape), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        row = {"input_ids": ids, "attention_mask": mask}
        if "decoder_input_ids" in batch:
            row["decoder_input_ids"] = torch.randint(3, VOCABULARY, (size, shape), generator=generator)
        labels = torch.randint(3, VOCABULARY, (size, shape), generator=generator)
        labels[:, :2] = -100
        made.append(row | {"labels": labels})
    return model, made


def _output(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    found: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"})[0]
    return found


def _state(model: nn.Module) -> list[Any]:
    parameters: list[Any] = [
        (name, p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    ]
    return [*parameters, [module.training for module in model.modules()]]


def _assert_state(before: Any, model: nn.Module) -> None:
    for old, new in zip(before[:-1], _state(model)[:-1], strict=True):
        assert torch.equal(old[1], new[1]), old[0]
        assert old[2] == new[2], old[0]
        assert (old[3] is None) == (new[3] is None), old[0]
        assert old[3] is None or torch.equal(old[3], new[3]), old[0]
    assert before[-1] == [module.training for module in model.modules()]


def _refused(message: str, *args: Any, **options: Any) -> None:
    said = ""
    try:
        score(*args, **options)
    except MaskError as error:
        said = str(error)
    assert message in said, f"{message!r} was to be refused; got {said!r}"
