"""The contract of a path, as a test class to inherit from.

In a test file of your own, with pytest::

    class TestMyPath(PathContract):
        options = MyPathOptions(width=4)

Nothing here imports pytest: it calls `pytest_generate_tests` of a test class by itself.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from gatedadapters.backbone import discover
from gatedadapters.config import GateConfig, PathOptions, SearchSpace
from gatedadapters.errors import PathError
from gatedadapters.masking.scores import Batch
from gatedadapters.paths import Path, Site, SkippedSite, path_class
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters, get_adapters
from gatedadapters.supernet.attach import attach, detach
from gatedadapters.testing.backbones import tiny
from gatedadapters.testing.helpers import (
    assert_equal,
    assert_same_state,
    awaken,
    checkpoint_activations,
    gradients_of,
    output_of,
    random_loss,
    train_briefly,
)


class PathContract:
    """Tests of the contract in `Path`, on tiny backbones and on the path alone.

    Attributes:
        options: the candidate to test, or several of the same or of different kinds.
        families: backbones to attach it to, among `gatedadapters.testing.FAMILIES`.
    """

    options: ClassVar[PathOptions | Sequence[PathOptions]]
    families: ClassVar[Sequence[str]] = ("bert", "llama", "gpt2")

    @classmethod
    def pytest_generate_tests(cls, metafunc: Any) -> None:
        """Run every test for every option and, if it has an argument `family`, for every family."""
        if "option" in metafunc.fixturenames:
            offered = [cls.options] if isinstance(cls.options, PathOptions) else list(cls.options)
            metafunc.parametrize("option", offered, ids=[options.kind for options in offered])
        if "family" in metafunc.fixturenames:
            metafunc.parametrize("family", cls.families)

    # -- attached to a backbone ----------------------------------------------------------------------

    def test_output_is_unchanged_at_the_start(self, option: PathOptions, family: str) -> None:
        """Bit for bit, in evaluation and, for the same random state, in training."""
        model, batch = tiny(family)
        for mode in (False, True):
            before = output_of(model.train(mode), batch)
            attach(model, _space(option), batch)
            assert_equal(output_of(model, batch), before)
            detach(model)

    def test_closed_gate_equals_the_detached_backbone(self, option: PathOptions, family: str) -> None:
        """Bit for bit, with parameters of the path that are not zero."""
        model, batch = tiny(family)
        before = output_of(model, batch)
        adapters = _attached(model, option, batch)
        assert not torch.equal(output_of(model, batch), before), "the path has no effect even with open gates"
        _set_gates(adapters, -4.0)
        assert_equal(output_of(model, batch), before)
        detach(model)
        assert_equal(output_of(model, batch), before)

    def test_open_gate_equals_the_ungated_path(self, option: PathOptions, family: str) -> None:
        """A gate of 1 computes what the same weights compute in a model that has no gates."""
        model, batch = tiny(family)
        adapters = _attached(model, option, batch)
        _set_gates(adapters, 4.0)
        ungated, _ = tiny(family)
        plain = attach(ungated, adapters.discretize())
        plain.paths.load_state_dict(adapters.paths.state_dict())
        torch.testing.assert_close(output_of(model, batch), output_of(ungated, batch), rtol=1e-5, atol=1e-6)

    def test_gates_get_no_gradient_while_the_path_is_zero_and_some_once_it_is_not(
        self, option: PathOptions, family: str
    ) -> None:
        """At start weights get gradient and gates get exactly 0; later the gates of every path get some."""
        model, batch = tiny(family)
        adapters = attach(model, _space(option), batch)
        _set_gates(adapters, 0.0)
        bank = adapters._gates()
        random_loss(model, batch).backward()
        assert bank.log_alpha.grad is not None
        assert not bank.log_alpha.grad.any(), "a path that contributes nothing moved its gates"
        for key, path in adapters.paths.items():
            learns = any(p.grad is not None and p.grad.any() for p in path.parameters())
            assert learns, f"{key} cannot start to learn"
        awaken(adapters)
        model.zero_grad()
        random_loss(model, batch).backward()
        for key, where in bank.slices.items():
            own = bank.ancestry[where, -1]
            assert bank.log_alpha.grad[:, own].any(), f"the gates of {key} get no gradient"

    def test_each_example_sees_the_gates_of_its_own_task(self, option: PathOptions, family: str) -> None:
        """A mixed batch equals one batch per task."""
        model, batch = tiny(family)
        adapters = _attached(model, option, batch, tasks=("a", "b"))
        bank = adapters._gates()
        with torch.no_grad():
            bank.log_alpha[0].fill_(0.5)
            bank.log_alpha[1].copy_(torch.linspace(-4.0, 4.0, bank.n_gates))
        mixed = output_of(model, {**batch, "task_ids": torch.tensor([1, 0])})
        for row, task in enumerate((1, 0)):
            adapters.set_task(task)
            alone = output_of(model, {name: _one(value, row) for name, value in batch.items()})
            torch.testing.assert_close(_one(mixed, row), alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mixed, output_of(model, batch)), "the tasks' gates make no difference"

    def test_a_trained_deep_copy_leaves_the_original_alone(self, option: PathOptions, family: str) -> None:
        """Detaching the original does not change the copy either."""
        model, batch = tiny(family)
        adapters = _attached(model, option, batch)
        before, state = output_of(model, batch), copy.deepcopy(model.state_dict())
        twin = copy.deepcopy(model)
        assert_equal(output_of(twin, batch), before)
        train_briefly(twin.train(), batch)
        assert_same_state(model.state_dict(), state)
        assert_equal(output_of(model, batch), before)
        trained = output_of(twin.eval(), batch)
        assert not torch.equal(trained, before), "the copy learned nothing"
        assert get_adapters(twin).model is twin
        assert adapters.model is model
        detach(model)
        assert_equal(output_of(twin, batch), trained)

    def test_state_dict_round_trip(self, option: PathOptions, family: str) -> None:
        """A state dict loads into the same space attached with another seed."""
        model, batch = tiny(family)
        _set_gates(_attached(model, option, batch), 0.3)
        other, _ = tiny(family)
        attach(other, _space(option), batch, seed=1)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        assert_equal(output_of(other, batch), output_of(model, batch))

    def test_saving_the_whole_model_round_trips(self, option: PathOptions, family: str) -> None:
        """After `torch.save` of the attached model, outputs and gradients equal those of the original."""
        model, batch = tiny(family)
        _attached(model, option, batch)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert_equal(output_of(loaded, batch), output_of(model, batch))
        for each in (model, loaded):
            random_loss(each.train(), batch).backward()
        assert_same_state(gradients_of(loaded), gradients_of(model))

    def test_gradient_checkpointing_changes_no_gradient(self, option: PathOptions, family: str) -> None:
        """In either mode of checkpointing; gradients of gates up to rounding, since the order of a sum differs."""
        gradients = []
        for mode in (None, True, False):
            model, batch = tiny(family)
            _attached(model, option, batch)
            model.train().config.use_cache = False  # as checkpointing does; GPT-2 rounds differently without a cache
            if mode is not None:
                checkpoint_activations(model, use_reentrant=mode)
            random_loss(model, batch).backward()
            gradients.append(gradients_of(model))
        for checkpointed in gradients[1:]:
            assert checkpointed.keys() == gradients[0].keys()
            for name, value in gradients[0].items():
                if name.endswith("log_alpha"):
                    torch.testing.assert_close(checkpointed[name], value, rtol=1e-5, atol=1e-7)
                else:
                    assert torch.equal(checkpointed[name], value), name

    def test_bfloat16_autocast_keeps_the_type_of_the_output(self, option: PathOptions, family: str) -> None:
        """The dtype is that of the backbone alone, the values are close, and gradients are float32."""
        model, batch = tiny(family)
        with torch.autocast("cpu", torch.bfloat16):
            expected = output_of(model, batch).dtype
        _attached(model, option, batch)
        exact = output_of(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            rough = output_of(model, batch)
            loss = random_loss(model, batch)
        loss.backward()
        assert rough.dtype == expected
        close = torch.isclose(rough.float(), exact.float(), rtol=0.1, atol=0.1)
        assert close.float().mean() > 0.9, (
            "more differs than rounding explains, which may send a token to another expert"
        )
        for name, value in gradients_of(model).items():
            assert value.dtype == torch.float32, name
            assert value.isfinite().all(), name

    def test_compact_equals_gated_evaluation(self, option: PathOptions, family: str) -> None:
        """Gates between 0 and 1 are multiplied into the weights, and closed units are removed."""
        model, batch = tiny(family)
        adapters = _attached(model, option, batch)
        with torch.no_grad():
            adapters._gates().log_alpha.uniform_(-3.0, 3.0, generator=torch.Generator().manual_seed(0))
        gated = output_of(model, batch)
        structure = adapters.compact()
        torch.testing.assert_close(output_of(model, batch), gated, rtol=0, atol=1e-5)
        assert sum(p.numel() for p in adapters.paths.parameters()) == structure.params

    def test_a_structure_survives_json(self, option: PathOptions, family: str) -> None:
        """A structure with the path is read back equal from JSON and can be attached."""
        model, batch = tiny(family)
        structure = attach(model, _space(option), batch).discretize()
        again = Structure.from_json(structure.to_json())
        assert again == structure
        detach(model)
        assert set(attach(model, again).paths) == {path.key for path in structure.paths}

    def test_every_selected_site_is_found_or_skipped_with_a_reason(self, option: PathOptions, family: str) -> None:
        """The modules of a site are modules of the model."""
        model, batch = tiny(family)
        modules = dict(model.named_modules())
        for site in path_class(option).sites(option, discover(model, batch)):
            if isinstance(site, SkippedSite):
                assert site.reason
            else:
                assert site.tap.module in modules
                assert site.write.module in modules

    # -- the path alone ------------------------------------------------------------------------------

    def test_zero_gates_return_the_target_itself_in_value(self, option: PathOptions) -> None:
        """Also if gates of other units or examples are open, so that the path is not skipped."""
        path = self.path(option)
        tapped, target = _tensors(path)
        closed = torch.zeros(path.units)
        assert_equal(path(tapped, target, closed), target)
        assert_equal(path(tapped, target, torch.zeros(1)), target)
        if path.site.at_weight:
            return
        some = torch.stack([closed, torch.ones(path.units), closed])
        assert_equal(path(tapped, target, some)[[0, 2]], target[[0, 2]])

    def test_unit_gates_equal_no_gate(self, option: PathOptions) -> None:
        """For gates of ones of every shape: (1,), (units,), (examples, units), (examples, 1)."""
        path = self.path(option)
        tapped, target = _tensors(path)
        plain = path(tapped, target, None)
        gates = (torch.ones(1), torch.ones(path.units), torch.ones(3, path.units), torch.ones(3, 1))
        for gate in gates[: 2 if path.site.at_weight else None]:
            torch.testing.assert_close(path(tapped, target, gate), plain)

    def test_gates_per_example_equal_each_example_alone(self, option: PathOptions) -> None:
        """Values and gradients, for a gate per unit and one for the path; paths at weights refuse gates per example."""
        path = self.path(option)
        tapped, target = _tensors(path)
        if path.site.at_weight:
            _assert_refused_by_name(path, tapped, target, torch.rand(3, path.units))
            return
        for width in {1, path.units}:
            gate = torch.rand(3, width, requires_grad=True)
            together = path(tapped, target, gate)
            apart = torch.cat([path(_one(tapped, i), _one(target, i), gate[i]) for i in range(3)])
            torch.testing.assert_close(together, apart)
            weight = torch.randn_like(together)
            wanted = [gate, *path.parameters()]
            expected = torch.autograd.grad((apart * weight).sum(), wanted)
            for got, want in zip(torch.autograd.grad((together * weight).sum(), wanted), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_paths_together_equal_one_after_the_other(self, option: PathOptions) -> None:
        """For any mixture of gates: none, per unit, per path and per example."""
        paths = [self.path(option, seed=seed) for seed in range(3)]
        tapped, target = _tensors(paths[0])
        units = paths[0].units
        mixtures: list[list[Tensor | None]] = [
            [None, None, None],
            [None, torch.rand(units), torch.rand(1)],
            [torch.rand(3, units), None, torch.rand(1)],
            [torch.rand(3, 1), torch.rand(units), torch.rand(3, units)],
        ]
        for gates in mixtures[: 2 if paths[0].site.at_weight else None]:
            expected = target
            for path, gate in zip(paths, gates, strict=True):
                expected = path(tapped, expected, gate)
            together = type(paths[0]).forward_together(paths, tapped, target, gates)
            torch.testing.assert_close(together, expected)

    def test_gradients_equal_finite_differences(self, option: PathOptions) -> None:
        """In float64, with respect to the tapped value, the target, the gates and every parameter."""
        path = self.path(option.resized(min(3, option.size))).double()
        names, values = zip(*path.named_parameters(), strict=True)
        tapped, target = (
            t.double().requires_grad_() if t.is_floating_point() else t
            for t in (t[:, : None if path.site.at_weight else 2].clone() for t in _tensors(path))
        )
        for shape in (None, (1,), (path.units,), (3, path.units))[: 3 if path.site.at_weight else None]:
            gate = () if shape is None else (torch.rand(shape, dtype=torch.float64, requires_grad=True),)
            taps = (tapped,) if path.site.tap != path.site.write and tapped.requires_grad else ()
            fixed = tapped if path.site.tap != path.site.write else None

            def run(
                target: Tensor,
                *rest: Tensor,
                taps: int = len(taps),
                gates: int = len(gate),
                fixed: Tensor | None = fixed,
            ) -> Tensor:
                tapped = rest[0] if taps else target if fixed is None else fixed
                own = dict(zip(names, rest[taps + gates :], strict=True))
                gate = rest[taps] if gates else None
                return cast(Tensor, functional_call(path, own, (tapped, target, gate)))

            assert torch.autograd.gradcheck(run, (target, *taps, *gate, *values), fast_mode=True)

    def test_cost_counts_the_parameters(self, option: PathOptions) -> None:
        """The parameters of a path are its units times those of a unit, before and after units are dropped."""
        path = self.path(option)
        units, params, flops = type(path).cost(path.site, option)
        assert units == path.units == option.size * (path.site.experts or 1)
        assert sum(p.numel() for p in path.parameters()) == units * params
        assert flops > 0
        if units > 1:
            kept = range(0, units, 2)
            path.select_units(torch.tensor(kept))
            assert path.units == len(kept)
            assert sum(p.numel() for p in path.parameters()) == path.units * params
            smaller = option.select(kept)
            assert smaller.size == path.units
            assert type(path).cost(path.site, smaller) == (path.units, params, flops)
            path.load_state_dict(type(path)(path.site, smaller).state_dict())  # equal names and shapes

    def test_scaled_and_selected_units_do_what_gates_of_those_values_did(self, option: PathOptions) -> None:
        """`scale_units` multiplies gates into the weights; `select_units` removes units with a gate of 0."""
        path = self.path(option)
        tapped, target = _tensors(path)
        gate = torch.rand(path.units)
        gate[1::2] = 0.0
        gated = path(tapped, target, gate)
        path.scale_units(gate)
        torch.testing.assert_close(path(tapped, target, None), gated)
        path.select_units(gate.nonzero().flatten())
        torch.testing.assert_close(path(tapped, target, None), gated)
        assert all(p.requires_grad for p in path.parameters())

    def test_condensing_drops_what_is_closed_at_no_change(self, option: PathOptions) -> None:
        """`condense` computes what the gates did if only closed units are dropped; dropped units contribute nothing."""
        path = self.path(option)
        tapped, target = _tensors(path)
        gate = torch.rand(path.units) + 0.1
        everything = torch.arange(path.units)
        gated = path(tapped, target, gate)
        path.condense(everything, gate)
        torch.testing.assert_close(path(tapped, target, None), gated)
        keep = everything[::2]
        gate[1::2] = 0.0
        gated = path(tapped, target, gate)
        path.condense(keep, gate)
        torch.testing.assert_close(path(tapped, target, None), gated)
        path.condense(keep[:1], torch.ones(path.units))  # this drops open units, so the function may change
        condensed = path(tapped, target, None)
        path.select_units(keep[:1])
        torch.testing.assert_close(path(tapped, target, None), condensed)

    def test_the_result_has_the_shape_and_type_of_the_target(self, option: PathOptions) -> None:
        """For any leading dimensions and dtypes, with and without autocast; backward runs too."""
        path = self.path(option)
        site = path.site
        *leading, width = _tensors(path)[1].shape
        for shape in (leading,) if path.site.at_weight else ((4,), (2, 3), (2, 3, 5)):
            for dtype in (torch.float32, torch.bfloat16):
                for autocast in (False, True):
                    target = torch.randn(*shape, width).to(dtype).requires_grad_()
                    tapped = target if site.tap == site.write else _tapped(path, shape)
                    gate = torch.rand(path.units, requires_grad=True)
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        result = path(tapped, target, gate)
                    assert result.shape == target.shape
                    assert result.dtype == dtype, f"target {dtype}, autocast {autocast}"
                    result.float().sum().backward()
                    assert gate.grad is not None
                    assert gate.grad.dtype == torch.float32

    def test_a_merged_map_equals_map_and_path_or_is_refused_by_name(self, option: PathOptions) -> None:
        """`merge_into` for every gate, with and without a bias."""
        path = self.path(option)
        tapped, target = _tensors(path)
        if path.site.at_weight:
            for gate in (None, torch.rand(path.units), torch.rand(1)):
                changed, _ = path.merge_into(target, None, gate)
                torch.testing.assert_close(changed, path(tapped, target, gate))
            return
        at_input = path.site.write.side == "input"
        weight = torch.randn(7 if at_input else path.site.width_out, path.site.width_in)
        for bias, gate in ((None, None), (torch.randn(len(weight)), torch.rand(path.units)), (None, torch.rand(1))):
            try:
                merged = path.merge_into(weight, bias, gate)
            except PathError as error:
                return _assert_named(path, str(error))
            plain = _linear(tapped, weight, bias)
            end = _linear(path(tapped, target, gate), weight, bias) if at_input else path(tapped, plain, gate)
            torch.testing.assert_close(_linear(tapped, *merged), end, rtol=1e-4, atol=1e-4)

    def test_a_wrong_shape_names_the_point(self, option: PathOptions) -> None:
        """For widths that differ from the layout's, and for rows that are not a multiple of the examples."""
        path = self.path(option)
        tapped, target = _tensors(path)
        wide_tap, wide = (torch.cat([t, t[..., :1]], -1) for t in (tapped, target))
        if path.site.tap == path.site.write:
            _assert_refused_by_name(path, wide, wide, None)
        else:
            _assert_refused_by_name(path, wide_tap, target, None)
            _assert_refused_by_name(path, tapped, wide, None)
        _assert_refused_by_name(path, tapped, target, torch.rand(4, path.units))

    # -- helpers -------------------------------------------------------------------------------------

    def path(self, option: PathOptions, *, seed: int = 0) -> Path:
        """The path alone, at its first site in the first family, with parameters that are not zero."""
        model, batch = tiny(self.families[0])
        kind = path_class(option)
        site = next(site for site in kind.sites(option, discover(model, batch)) if isinstance(site, Site))
        path = kind(site, option, torch.Generator().manual_seed(seed))
        awaken(path, seed=seed)
        return path


def _space(option: PathOptions) -> SearchSpace:
    return SearchSpace(gates=GateConfig(levels=("point", "rank"), init_spread=0.0), paths=(option,))


def _attached(model: nn.Module, option: PathOptions, batch: Batch, *, tasks: Sequence[str] = ("default",)) -> Adapters:
    """Attach with gates near the middle of their range and paths whose parameters are not zero."""
    adapters = attach(model, _space(option), batch, tasks=tasks)
    awaken(adapters)
    with torch.no_grad():
        adapters._gates().log_alpha.uniform_(-0.4, 0.4, generator=torch.Generator().manual_seed(1))
    return adapters


def _set_gates(adapters: Adapters, log_alpha: float) -> None:
    with torch.no_grad():
        adapters._gates().log_alpha.fill_(log_alpha)


def _one(tensor: Tensor, i: int) -> Tensor:
    return tensor[i : i + 1]


def _tensors(path: Path) -> tuple[Tensor, Tensor]:
    """The tapped value and the target of a path, for 3 examples of 5 tokens; at a weight, the weight as both."""
    generator = torch.Generator().manual_seed(3)
    if path.site.at_weight:
        weight = torch.randn(path.site.weight_shape, generator=generator)
        return weight, weight
    target = torch.randn(3, 5, path.site.width_out, generator=generator)
    if path.site.tap == path.site.write:
        return target, target
    return _tapped(path, (3, 5), generator), target


def _tapped(path: Path, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Vectors of the width at the tap; token ids at a table of them."""
    width = path.site.width_in
    if path.site.reads_ids:
        return torch.randint(width, tuple(shape), generator=generator)
    return torch.randn(*shape, width, generator=generator)


def _linear(tapped: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map; a token id stands for the vector with a 1 at its place."""
    if tapped.is_floating_point():
        return linear(tapped, weight, bias)
    rows = weight.t()[tapped]
    return rows if bias is None else rows + bias


def _assert_refused_by_name(path: Path, tapped: Tensor, target: Tensor, gate: Tensor | None) -> None:
    message = ""
    try:
        path(tapped, target, gate)
    except PathError as error:
        message = str(error)
    _assert_named(path, message)


def _assert_named(path: Path, message: str) -> None:
    assert path.site.tap.module in message or path.site.write.module in message, message or "accepted"
