"""The hard-concrete distribution against formulas written out again here, quadrature and Monte Carlo."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from gatedadapters.config import GateConfig
from gatedadapters.gates import hard_concrete

PUBLISHED = GateConfig()
OTHER = GateConfig(temperature=0.4, low=-0.2, high=1.3)
CONFIGS = pytest.mark.parametrize("config", [PUBLISHED, OTHER], ids=["published", "other"])
LOG_ALPHAS = [-4.6, -2.0, -0.5, 0.0, 1.0, 2.5, 4.6]
DRAWS = 200_000


def published_gate(u: float, log_alpha: float, beta: float, gamma: float, zeta: float) -> float:
    """Louizos et al. 2018, equation 10, in Python's float64."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / beta))
    return min(1.0, max(0.0, s * (zeta - gamma) + gamma))


def draw(log_alpha: float, config: GateConfig, n: int = DRAWS) -> torch.Tensor:
    noise = hard_concrete.logistic_noise((n,), config, torch.Generator().manual_seed(0))
    return hard_concrete.sample(torch.full((n,), log_alpha), noise, config)


def test_the_defaults_are_the_published_constants() -> None:
    assert (PUBLISHED.temperature, PUBLISHED.low, PUBLISHED.high) == (2 / 3, -0.1, 1.1)
    assert PUBLISHED.epsilon == 1e-6
    assert PUBLISHED.bounds == (math.log(1e-2), math.log(1e2))


@CONFIGS
def test_samples_equal_the_published_formula(config: GateConfig) -> None:
    u = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).clamp(1e-6, 1 - 1e-6)
    noise = torch.log(u) - torch.log(1 - u)
    for log_alpha in LOG_ALPHAS:
        gates = hard_concrete.sample(torch.tensor(log_alpha, dtype=torch.float64), noise, config)
        expected = [published_gate(v, log_alpha, config.temperature, config.low, config.high) for v in u.tolist()]
        np.testing.assert_allclose(gates.numpy(), expected, rtol=1e-12, atol=1e-12)


@CONFIGS
def test_the_test_time_gate_equals_the_published_formula(config: GateConfig) -> None:
    for log_alpha in np.linspace(-4.6, 4.6, 47):
        expected = min(1.0, max(0.0, (config.high - config.low) / (1 + math.exp(-log_alpha)) + config.low))
        gate = hard_concrete.sample(torch.tensor(log_alpha), None, config)
        assert float(gate) == pytest.approx(expected, abs=1e-12)


def test_the_test_time_gate_reaches_both_ends_within_the_range_of_log_alpha() -> None:
    ends = hard_concrete.sample(torch.tensor(PUBLISHED.bounds), None, PUBLISHED)
    assert ends.tolist() == [0.0, 1.0]


@CONFIGS
def test_open_probability_equals_the_logistic_tail_and_monte_carlo(config: GateConfig) -> None:
    for log_alpha in LOG_ALPHAS:
        probability = float(hard_concrete.open_probability(torch.tensor(log_alpha, dtype=torch.float64), config))
        # z > 0 where s > -gamma / (zeta - gamma), that is where the noise exceeds beta logit(...) - log alpha
        threshold = config.temperature * math.log(-config.low / config.high) - log_alpha
        assert probability == pytest.approx(stats.logistic.sf(threshold), abs=1e-12)
        share = float((draw(log_alpha, config) > 0).double().mean())
        assert share == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / DRAWS))


@CONFIGS
def test_mean_and_atoms_of_the_samples_equal_quadrature(config: GateConfig) -> None:
    for log_alpha in LOG_ALPHAS:
        gates = draw(log_alpha, config).double()
        constants = (log_alpha, config.temperature, config.low, config.high)
        mean, _ = integrate.quad(published_gate, 1e-6, 1 - 1e-6, args=constants, limit=200)
        assert float(gates.mean()) == pytest.approx(mean, abs=4 * float(gates.std()) / math.sqrt(DRAWS) + 1e-5)
        # z = 1 where s >= (1 - gamma) / (zeta - gamma)
        top = stats.logistic.sf(config.temperature * math.log((1 - config.low) / (config.high - 1)) - log_alpha)
        share = float((gates == 1).double().mean())
        assert share == pytest.approx(top, abs=4 * math.sqrt(top * (1 - top) / DRAWS) + 1e-5)


def test_noise_is_logistic() -> None:
    noise = hard_concrete.logistic_noise((50_000,), PUBLISHED, torch.Generator().manual_seed(0))
    assert stats.kstest(noise.numpy(), "logistic").pvalue > 0.01


def test_noise_stays_finite_at_the_ends_of_the_uniform_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    for end in (0.0, 1.0 - 2**-53):
        monkeypatch.setattr(torch, "rand", lambda *a, end=end, **k: torch.tensor([end], dtype=torch.float64))
        noise = hard_concrete.logistic_noise((1,), PUBLISHED, torch.Generator())
        assert noise.dtype == torch.float32
        assert abs(float(noise)) == pytest.approx(-math.log(1e-6), rel=1e-6)


@CONFIGS
@pytest.mark.parametrize("stochastic", [True, False])
def test_slope_equals_autograd(config: GateConfig, stochastic: bool) -> None:
    log_alpha = torch.linspace(-4.6, 4.6, 501, dtype=torch.float64, requires_grad=True)
    noise = None
    if stochastic:
        noise = hard_concrete.logistic_noise((501,), config, torch.Generator().manual_seed(2)).double()
    gates = hard_concrete.sample(log_alpha, noise, config)
    (expected,) = torch.autograd.grad(gates.sum(), log_alpha)
    slope = hard_concrete.slope(log_alpha.detach(), noise, config)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-14)
    saturated = (gates == 0) | (gates == 1)
    assert saturated.any()
    assert (~saturated).any()
    assert not slope[saturated].any(), "a saturated gate must have a slope of exactly 0"
    assert (slope[~saturated] > 0).all()
