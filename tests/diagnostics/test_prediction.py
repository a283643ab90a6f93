"""Predicted errors of a layer against those of features that are really drawn."""

from __future__ import annotations

import pytest
import torch

from darkformer import DarkConfig
from darkformer.calibration.moments import Moments
from darkformer.calibration.probe import Probe
from darkformer.diagnostics.estimators import estimator_map
from darkformer.diagnostics.prediction import Predictor

GROUPS, HEADS, LENGTH, DIM = 2, 4, 96, 6
FORMS = {"features": DarkConfig.paper(64), "default": DarkConfig(num_features=64, window=12, sinks=2)}


@pytest.fixture(scope="module")
def probe() -> Probe:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, LENGTH, DIM, generator=generator) + 0.3
    key, value = (torch.randn(1, GROUPS, LENGTH, DIM, generator=generator) for _ in range(2))
    shape = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.2])
    return Probe(query * shape, key * shape, value, None, DIM**-0.5, config=FORMS["features"], tokens=LENGTH,
                 dtype=torch.float64)  # fmt: skip


@pytest.fixture(scope="module")
def moments(probe: Probe) -> Moments:
    moments = Moments(GROUPS, DIM)
    moments.add("query", probe.q, probe.real)
    moments.add("key", probe.k, probe.real)
    return moments


def _map(moments: Moments, m: int, seed: int = 0):
    fm = estimator_map("balanced", moments, m, layer=0, heads=HEADS, seed=seed)
    return fm.parameters_for(torch.float64)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_many_features_tend_to_the_expected_kernel(probe: Probe, moments: Moments, scale: float) -> None:
    probe.split(FORMS["features"])
    expected = probe.expected_kernel(_map(moments, 1).scaled(scale))
    if scale == 1.0:  # the changes of variables leave softmax's own weights
        assert torch.allclose(expected * probe.seen[:, None, None], probe.weights, rtol=1e-5, atol=1e-9)
        return
    drawn = sum(next(probe.kernels(_map(moments, 4000, seed).scaled(scale), [4000])) for seed in range(20)) / 20
    seen = probe.seen[:, None, None]
    assert float(((drawn - expected) * seen).norm().detach() / (expected * seen).norm().detach()) < 0.1


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("scale", [0.7, 0.35])
def test_predicted_errors_are_near_the_measured_ones(probe: Probe, moments: Moments, form: str, scale: float) -> None:
    probe.split(FORMS[form])
    predictor = Predictor(probe, queries=LENGTH, draws=2000, seed=0)
    predicted = predictor.errors(_map(moments, 1).scaled(scale), [64], biased=form == "default")[0]
    measured = []
    for seed in range(20):
        part = probe.far_part(next(probe.kernels(_map(moments, 64, seed).scaled(scale), [64])))
        biases = probe.biases(part) if form == "default" else [torch.zeros(GROUPS, dtype=torch.float64)]
        measured.append(torch.stack([probe.error(part, bias) for bias in biases]).amin(0))
    found = torch.stack(measured).mean(0).sqrt()
    assert torch.allclose(predicted, found, rtol=0.3)
    if scale == 0.7:  # here noise matters: the bias alone would be too low
        alone = predictor.errors(_map(moments, 1).scaled(scale), [10**9], biased=form == "default")[0]
        assert bool((alone < found).all())


def test_more_features_less_error_and_none_where_everything_is_exact(probe: Probe, moments: Moments) -> None:
    predictor = Predictor(probe, queries=8, draws=200, seed=0)
    probe.split(FORMS["default"])
    errors = predictor.errors(_map(moments, 1).scaled(0.7), [16, 64, 256], biased=True)
    assert bool((errors[0] >= errors[1]).all() and (errors[1] >= errors[2]).all())
    probe.split(DarkConfig(window=LENGTH))
    assert float(predictor.errors(_map(moments, 1), [16], biased=False).abs().max()) == pytest.approx(0, abs=1e-12)


def test_the_scale_of_the_moments_is_one_of_those_asked_for(probe: Probe, moments: Moments) -> None:
    predictor = Predictor(probe, queries=32, draws=10, seed=0)
    chosen = predictor.moment_scale(_map(moments, 1), (1.0, 0.5, 0.1), 16)
    assert len(chosen) == GROUPS and set(chosen) <= {1.0, 0.5, 0.1}
    warm = predictor.moment_scale(_map(moments, 1).scaled(0.2), (1.0, 0.01), 10**6)
    assert warm == [1.0, 1.0]  # small inputs and many features: no reason to be cold
