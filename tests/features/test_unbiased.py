"""Lemma 2.1: the mean of φ(q)ᵀφ(k) over draws is exp(qᵀΣk) (issue 2, point 4).

Every kv head has its own independent Ω, so a map with 3,000 heads is 3,000 draws.
"""

import functools

import pytest
import torch
from tolerances import relative_error
from torch import Tensor

from darkformer import DarkConfig, FeatureMap, attention, feature_map
from darkformer.features.affine import key_log_features, query_log_features
from darkformer.features.draws import DRAW_FUNCTIONS

DRAWS, FEATURES, DIM, PAIRS = 3000, 6, 4, 8


@functools.cache
def pairs() -> tuple[Tensor, Tensor]:
    """Queries and keys in the operator's unit √s·q: (PAIRS, d), logits of both signs.

    Norms about 0.7: the estimates' variance grows as exp(‖q + k‖²), and with it the skewness, for which the standard
    error of 3,000 draws would be no measure any more.
    """
    generator = torch.Generator().manual_seed(11)
    query, key = (0.35 * torch.randn(PAIRS, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    return query, key


def near_identity(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(DIM, dtype=torch.float64) + 0.25 * torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)


@functools.cache
def many_draws(draw: str) -> Tensor:
    config = DarkConfig.paper(num_features=FEATURES, draw=draw)
    return feature_map(config, num_heads=DRAWS, num_kv_heads=DRAWS, head_dim=DIM).double().projection


def make(draw: str, method: str = "dark", **values: Tensor) -> FeatureMap:
    """3,000 heads that differ in Ω only; `values` replace parameters in all of them."""
    config = DarkConfig.paper(
        num_features=FEATURES, method=method, draw=draw,
        far_bias="far_bias" in values, window=int("far_bias" in values),
        tied="key_geometry" not in values, center="query_center" in values, balance="query_balance" in values,
    )  # fmt: skip
    with torch.device("meta"):  # Ω is drawn once per test run, by `many_draws`
        made = feature_map(config, num_heads=DRAWS, num_kv_heads=DRAWS, head_dim=DIM)
    made = made.double().to_empty(device="cpu")
    eye = torch.eye(DIM, dtype=torch.float64)
    with torch.no_grad():
        made.projection.copy_(many_draws(draw))
        for parameter in made.parameters():
            parameter.zero_()
        for name in made.values():
            if name != "projection":
                made.set_(name, values.get(name, eye))
    return made


@torch.no_grad()
def z_scores(made: FeatureMap, expected: Tensor) -> Tensor:
    """(mean over draws - expected) in standard errors, per pair."""
    query, key = (x.expand(1, DRAWS, -1, -1) for x in pairs())
    parameters, positions = made.parameters_for(torch.float64), torch.arange(PAIRS)[None]
    log_query = query_log_features(parameters, query, positions)
    estimates = (log_query + key_log_features(parameters, key, positions)).exp().sum(-1)[0]  # (DRAWS, PAIRS)
    return (estimates.mean(0) - expected) / (estimates.std(0) / DRAWS**0.5)


@pytest.fixture(params=sorted(DRAW_FUNCTIONS))
def draw(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("method", ["performer", "lfk", "dark"])
def test_isotropic(draw: str, method: str) -> None:
    query, key = pairs()
    assert z_scores(make(draw, method), (query * key).sum(-1).exp()).abs().max() <= 4


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_dark(draw: str, seed: int) -> None:
    query, key = pairs()
    geometry = near_identity(seed)
    made = make(draw, geometry=geometry)
    sigma = geometry.T @ geometry
    torch.testing.assert_close(made.covariance()[0], sigma)
    expected = (query @ sigma * key).sum(-1).exp()
    assert z_scores(made, expected).abs().max() <= 4
    # Negative controls: neither softmax's kernel nor that of MMᵀ.
    assert z_scores(made, (query * key).sum(-1).exp()).abs().max() > 8
    assert z_scores(made, (query @ (geometry @ geometry.T) * key).sum(-1).exp()).abs().max() > 8


def test_dark_untied(draw: str) -> None:
    query, key = pairs()
    geometry, key_geometry = near_identity(1), near_identity(2)
    made = make(draw, geometry=geometry, key_geometry=key_geometry)
    expected = ((query @ geometry.T) * (key @ key_geometry.T)).sum(-1).exp()
    assert z_scores(made, expected).abs().max() <= 4


@pytest.mark.parametrize("method", ["performer", "dark"])
def test_centred_and_balanced_is_still_softmax(draw: str, method: str) -> None:
    """The change of variables leaves exp(qᵀk) itself, not only up to terms without k, for the exact part's sake."""
    query, key = pairs()
    balance = near_identity(4)
    generator = torch.Generator().manual_seed(5)
    centres = {name: 0.3 * torch.randn(DIM, generator=generator).double() for name in ("query_center", "key_center")}
    made = make(draw, method, query_balance=balance, key_balance=balance.inverse().T, **centres)
    assert z_scores(made, (query * key).sum(-1).exp()).abs().max() <= 4
    wrong = make(draw, method, query_balance=balance, key_balance=balance.inverse(), **centres)
    assert z_scores(wrong, (query * key).sum(-1).exp()).abs().max() > 8


def test_everything_together(draw: str) -> None:
    """exp(β + (A(q-b))ᵀMᵀM_k(B(k-c)) + bᵀk + cᵀq - bᵀc), with a free pair A, B."""
    query, key = pairs()
    geometry, key_geometry, a, b = (near_identity(seed) for seed in (6, 7, 8, 9))
    generator = torch.Generator().manual_seed(5)
    query_center, key_center = 0.3 * torch.randn(2, DIM, generator=generator).double()
    made = make(
        draw, geometry=geometry, key_geometry=key_geometry, query_balance=a, key_balance=b,
        query_center=query_center, key_center=key_center, far_bias=torch.tensor(0.7).double(),
    )  # fmt: skip
    logits = (((query - query_center) @ (geometry @ a).T) * ((key - key_center) @ (key_geometry @ b).T)).sum(-1)
    logits = logits + key @ query_center + query @ key_center - query_center @ key_center + 0.7
    assert z_scores(made, logits.exp()).abs().max() <= 4


def test_orthogonal_rows_vary_less() -> None:
    """Theorem 2 of the Performer: why `orthogonal` is the default."""
    query, key = (x.expand(1, DRAWS, -1, -1) for x in pairs())
    spread = {}
    for name in ("iid", "orthogonal"):
        parameters, positions = make(name, "performer").parameters_for(torch.float64), torch.arange(PAIRS)[None]
        log_query = query_log_features(parameters, query, positions)
        spread[name] = (log_query + key_log_features(parameters, key, positions)).exp().sum(-1)[0].var(0)
    assert (spread["orthogonal"] < spread["iid"]).float().mean() > 0.8
    assert spread["orthogonal"].sum() < 0.9 * spread["iid"].sum()


@pytest.mark.parametrize("name", ["simplex", "sobol"])
def test_other_structured_draws_vary_less_than_independent_ones(name: str) -> None:
    query, key = (x.expand(1, DRAWS, -1, -1) for x in pairs())
    spread = {}
    for draw in ("iid", name):
        parameters, positions = make(draw, "performer").parameters_for(torch.float64), torch.arange(PAIRS)[None]
        log_query = query_log_features(parameters, query, positions)
        spread[draw] = (log_query + key_log_features(parameters, key, positions)).exp().sum(-1)[0].var(0)
    assert spread[name].sum() < 0.9 * spread["iid"].sum()


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_estimates_softmax_with_its_scaling(scaling: float | None) -> None:
    """The unit of the maps is √s·q: many features approach softmax attention at the same scaling, at no other."""
    config = DarkConfig(method="dark", num_features=20_000, window=0, sinks=0, draw="iid")
    made = feature_map(config, num_heads=2, num_kv_heads=1, head_dim=DIM)
    query, key, value = (0.7 * torch.randn(1, heads, 12, DIM) for heads in (2, 1, 1))
    found = attention(query, key, value, made, scaling=scaling)

    def distance(factor: float) -> float:
        softmax = torch.nn.functional.scaled_dot_product_attention
        return relative_error(found, softmax(query, key, value, is_causal=True, scale=factor, enable_gqa=True))

    right = scaling or DIM**-0.5
    assert distance(right) < 0.03
    assert min(distance(2 * right), distance(right / 2), distance(right**0.5)) > 0.06
