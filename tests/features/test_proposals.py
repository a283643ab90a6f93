"""The Gaussian proposals, their closed-form second moments, and the feature map that draws from them.

Statistical assertions allow 4 standard errors.
"""

import pytest
import torch
from tolerances import PARITY, relative_error
from torch import Tensor

from darkformer import ConfigError, DarkConfig, FeatureMap, attention, feature_map
from darkformer.config import PROPOSALS
from darkformer.features.affine import key_log_features, query_log_features
from darkformer.features.draws import DRAW_FUNCTIONS
from darkformer.features.proposals import (
    expected_log_moment,
    expected_moment,
    log_determinant,
    log_moment,
    log_weight,
    oprf_covariance,
    optimal_covariance,
    optimal_eigenvalue,
    pair_moments,
    proposal_covariance,
)
from darkformer.features.transforms import balance, symmetric_power

from .test_lemmas import EYE, normal, spd

HEADS, FEATURES, PAIRS = 3000, 6, 8


@pytest.mark.parametrize("largest", [0.1, 1.0, 20.0])
def test_the_optimal_covariance_minimises_the_expected_log_moment(largest: float) -> None:
    """Every perturbation in 200 random directions and 2 sizes is worse; at every size of the moments it exists."""
    moment = spd(1, 0.02, largest)
    best = optimal_covariance(moment)
    least, root = expected_log_moment(best, moment), symmetric_power(best, 0.5)
    assert least.isfinite() and least < expected_log_moment(oprf_covariance(moment), moment)
    assert expected_log_moment(oprf_covariance(moment), moment) < expected_log_moment(EYE, moment)
    assert float(expected_log_moment(EYE, moment)) == pytest.approx(float(moment.trace()))
    generator = torch.Generator().manual_seed(0)
    for size in (0.02, 0.3):
        for _ in range(200):
            direction = torch.randn(3, 3, generator=generator, dtype=torch.float64)
            direction = direction + direction.T
            factor = torch.linalg.matrix_exp(size * direction / direction.norm())
            assert expected_log_moment(root @ factor @ root, moment) > least + 0.01 * size**2


def test_oprf_is_the_closed_form_of_favor_plus_plus() -> None:
    """σ = 1 - 4A*, A* = (1 - 1/ρ)/8 with ρ of Likhosherstov et al. 2022, theorem 3, for λ = ‖z‖²/d."""
    d, square = 7, torch.tensor([0.01, 0.5, 3.0, 40.0], dtype=torch.float64)
    rho = (((2 * square + d) ** 2 + 8 * d * square).sqrt() - 2 * square - d) / (4 * square)
    torch.testing.assert_close(optimal_eigenvalue(square / d), 1 - 4 * (1 - 1 / rho) / 8)
    moment = spd(1, 0.5, 2.0)
    sigma = oprf_covariance(moment)
    least = expected_log_moment(sigma, moment)
    assert all(expected_log_moment(factor * sigma, moment) > least for factor in (0.98, 1.02))


@pytest.mark.parametrize("name", sorted(PROPOSALS))
def test_the_pointwise_second_moment_is_the_measured_one(name: str) -> None:
    """log E[w²φ(q)²φ(k)²] - 2qᵀk by 400,000 draws of N(0, Σ)."""
    query, key = 0.25 * normal(5, EYE, 2), 0.25 * normal(5, EYE, 3)
    second = spd(1, 0.02, 0.12)
    sigma = proposal_covariance(name, pair_moments(second, second, torch.zeros(3).double(), torch.zeros(3).double()))
    isotropic, root = normal(400_000, EYE, 4), symmetric_power(sigma, 0.5)
    z = query + key
    weight = log_weight(isotropic, root, log_determinant(root))
    one = weight[:, None] + isotropic @ root @ z.T - 0.5 * (query**2 + key**2).sum(-1)
    for power, expected in ((1, torch.ones(5).double()), (2, log_moment(sigma, z).exp())):
        samples = (power * (one - (query * key).sum(-1))).exp()
        error = samples.std(0) / len(samples) ** 0.5
        assert ((samples.mean(0) - expected).abs() <= 4 * error).all()
        assert (error < 0.02 * expected).all()


@pytest.mark.parametrize("name", sorted(PROPOSALS))
def test_expectations_over_gaussian_inputs(name: str) -> None:
    """`expected_log_moment` and `expected_moment` against averages of the pointwise form over 400,000 z."""
    second = spd(1, 0.02, 0.08)
    zero = torch.zeros(3, dtype=torch.float64)
    sigma = proposal_covariance(name, pair_moments(second, second, zero, zero))
    pointwise = log_moment(sigma, normal(400_000, 2 * second, 5))
    for samples, expected in (
        (pointwise, expected_log_moment(sigma, 2 * second)),
        (pointwise.exp(), expected_moment(sigma, 2 * second).exp()),
    ):
        assert (samples.mean() - expected).abs() <= 4 * samples.std() / len(samples) ** 0.5
    assert expected_moment(sigma, 2 * second) > expected_log_moment(sigma, 2 * second)  # Jensen
    assert torch.isinf(expected_log_moment(0.4 * EYE, second))  # 2I - Σ⁻¹ is not positive definite
    assert torch.isinf(expected_moment(EYE, 1.1 * EYE)) and torch.isfinite(expected_moment(EYE, 0.4 * EYE))


def test_moments_of_pairs() -> None:
    query, key = normal(50_000, EYE, 1) + 0.5, normal(50_000, spd(2, 0.1, 1.0), 2) - 1.0
    second = [x.T @ x / len(x) for x in (query, key)]
    moments = pair_moments(*second, query.mean(0), key.mean(0))
    total = query + key
    assert relative_error(moments.total, total.T @ total / len(total)) < 0.02
    scaled = pair_moments(*(x / 4 for x in second), query.mean(0) / 2, key.mean(0) / 2)
    for found, want in zip(moments.scaled(torch.tensor(0.5)), scaled, strict=True):
        assert relative_error(found, want) < 1e-12


def test_unknown_proposal() -> None:
    with pytest.raises(ConfigError, match="proposal='best' is unknown: choose one of isotropic, oprf"):
        proposal_covariance("best", pair_moments(EYE, EYE, EYE[0], EYE[0]))


# The feature map


def make(sigma: Tensor, proposal: str = "optimal", heads: int = HEADS, **fields: object) -> FeatureMap:
    config = DarkConfig.paper(num_features=FEATURES, proposal=proposal, **fields)
    made = feature_map(config, num_heads=heads, num_kv_heads=heads, head_dim=3).double()
    made.propose_(sigma.expand(heads, -1, -1))
    return made


@torch.no_grad()
def z_scores(made: FeatureMap, query: Tensor, key: Tensor, expected: Tensor) -> Tensor:
    """(mean over the heads' draws - expected) in standard errors, per pair."""
    parameters, positions = made.parameters_for(torch.float64), torch.arange(len(query))[None]
    query, key = (x.expand(1, made.num_kv_heads, -1, -1) for x in (query, key))
    log_query = query_log_features(parameters, query, positions)
    log_key = key_log_features(parameters, key, positions)
    estimates = (log_query + log_key).exp().sum(-1)[0]
    return (estimates.mean(0) - expected) / (estimates.std(0) / made.num_kv_heads**0.5)


@pytest.mark.parametrize("draw", sorted(DRAW_FUNCTIONS))
@pytest.mark.parametrize("method", ["dark", "performer", "lfk"])
def test_weighted_features_are_unbiased_for_softmax(method: str, draw: str) -> None:
    query, key = 0.35 * normal(PAIRS, EYE, 2), 0.35 * normal(PAIRS, EYE, 3)
    sigma = spd(1, 0.9, 1.8)
    softmax, dark = (query * key).sum(-1).exp(), (query @ sigma * key).sum(-1).exp()
    weighted = make(sigma, method=method, draw=draw)
    assert z_scores(weighted, query, key, softmax).abs().max() <= 4
    assert z_scores(weighted, query, key, dark).abs().max() > 8
    unweighted = make(sigma, method=method, draw=draw, proposal_weights=False)
    assert z_scores(unweighted, query, key, dark).abs().max() <= 4
    assert z_scores(unweighted, query, key, softmax).abs().max() > 8


def test_without_weights_it_is_darks_kernel_from_the_same_code() -> None:
    """M = Σ*^½ as a parameter gives the same numbers as Σ* as a proposal without weights."""
    sigma = spd(1, 0.9, 1.8)
    proposed = make(sigma, heads=2, proposal_weights=False)
    learned = feature_map(DarkConfig.paper(num_features=FEATURES), num_heads=2, num_kv_heads=2, head_dim=3).double()
    with torch.no_grad():
        learned.geometry.copy_(symmetric_power(sigma, 0.5))
    tensors = [torch.randn(1, 2, 20, 3, dtype=torch.float64) for _ in range(3)]
    assert relative_error(attention(*tensors, proposed), attention(*tensors, learned)) <= PARITY
    weighted = make(sigma, heads=2)
    assert relative_error(attention(*tensors, weighted), attention(*tensors, learned)) > 1e-3


def test_a_better_proposal_has_less_variance_in_the_feature_map() -> None:
    """The order of the closed forms, measured: optimal < OPRF < isotropic, for anisotropic inputs."""
    second = torch.diag(torch.tensor([0.5, 0.1, 0.02], dtype=torch.float64))
    query, key = normal(200, second, 2), normal(200, second, 3)
    spread = {}
    for name in ("isotropic", "oprf", "optimal"):
        moments = pair_moments(second, second, EYE[0] * 0, EYE[0] * 0)
        made = make(proposal_covariance(name, moments), heads=2000, draw="iid")
        parameters, positions = made.parameters_for(torch.float64), torch.arange(200)[None]
        with torch.no_grad():
            log_query = query_log_features(parameters, query.expand(1, 2000, -1, -1), positions)
            sums = (log_query + key_log_features(parameters, key.expand(1, 2000, -1, -1), positions)).exp().sum(-1)[0]
        spread[name] = (sums.var(0) / (2 * (query * key).sum(-1)).exp()).log().mean()
    assert spread["optimal"] < spread["oprf"] - 0.05 < spread["isotropic"] - 0.1


def test_the_buffer_is_there_where_the_configuration_uses_it() -> None:
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 3}
    for method in ("dark", "performer", "lfk"):
        made = feature_map(DarkConfig(method=method, proposal="oprf"), **shape)
        assert torch.equal(made.proposal_root, torch.eye(3).expand(2, -1, -1))
        assert "proposal_root" in made.state_dict() and "proposal_root" not in dict(made.named_parameters())
        isotropic = feature_map(DarkConfig(method=method, proposal="isotropic"), **shape)
        assert "proposal_root" not in isotropic.state_dict()
        tensors = [torch.randn(1, heads, 9, 3, dtype=torch.float64) for heads in (4, 2, 2)]
        assert relative_error(attention(*tensors, made), attention(*tensors, isotropic)) <= PARITY
        with pytest.raises(ConfigError, match=r"proposal='isotropic' with method=.* has none to set"):
            isotropic.propose_(torch.eye(3).expand(2, -1, -1))
    for method in ("random", "constant", "local", "exact"):
        assert feature_map(DarkConfig(method=method, proposal="optimal"), **shape).proposal_root is None


def test_exact_softmax_through_the_change_of_variables_under_grouped_queries() -> None:
    """Point 3: centres, log-weight and balance of two kv heads shared by three query heads each, to 1e-10."""
    config = DarkConfig(num_features=4, proposal="optimal")
    made = feature_map(config, num_heads=6, num_kv_heads=2, head_dim=5).double()
    query, key = torch.randn(2, 6, 11, 5).double() + 1.0, 2 * torch.randn(2, 2, 13, 5).double() - 0.5
    grouped = query.unflatten(1, (2, 3))
    rows = [x.movedim(1, 0).flatten(1, -2) for x in (grouped, key)]
    pair = balance(*(torch.stack([torch.cov(g.T) for g in x]) for x in rows))
    with torch.no_grad():
        made.query_center.copy_(rows[0].mean(1)), made.key_center.copy_(rows[1].mean(1))
        made.query_balance.copy_(pair.query), made.key_balance.copy_(pair.key)
        p = made.parameters_for(torch.float64)
    q = (grouped - p.query_center[:, None, None]) @ p.query_map[:, None].mT
    k = (key - p.key_center[:, None]) @ p.key_map.mT
    centred = q @ k[:, :, None].mT
    log_weight_of_keys = (key @ p.query_center[:, :, None]).mT[:, :, None]
    expected = (grouped @ key[:, :, None].mT).softmax(-1)
    assert relative_error((centred + log_weight_of_keys).softmax(-1), expected) <= 1e-10
    assert relative_error(centred.softmax(-1), expected) > 0.1  # the log-weight is needed
    wrong = (key @ p.query_center.flip(0)[:, :, None]).mT[:, :, None]  # and that of the right group
    assert relative_error((centred + wrong).softmax(-1), expected) > 0.01


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_a_forward_pass_takes_no_determinant_by_lapack(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL's factorisation can hang where the number of threads changed; the weights follow the proposal anyway."""
    fm = feature_map(DarkConfig(num_features=8, proposal="optimal"), num_heads=2, num_kv_heads=2, head_dim=6)
    covariance = torch.stack([spd(seed, 0.5, 3.0)[:1, :1] * torch.eye(6).double() + 0.1 for seed in (1, 2)])
    expected = []
    for factor in (1.0, 2.0):  # a new proposal has another determinant
        root = symmetric_power(factor * covariance, 0.5).float()
        expected.append(torch.linalg.slogdet(root.double()).logabsdet)
    monkeypatch.setattr(torch.linalg, "slogdet", None)
    with torch.set_grad_enabled(grad):
        for factor, log_det in zip((1.0, 2.0), expected, strict=True):
            fm.propose_(factor * covariance)
            parameters = fm.parameters_for(torch.float32)
            assert fm.proposal_root is not None and parameters.log_weight is not None
            assert relative_error(log_determinant(fm.proposal_root), log_det) <= 1e-12
            rest = log_weight(fm.projection, fm.proposal_root, torch.zeros(2))
            assert relative_error(parameters.log_weight - rest, log_det[:, None].expand(-1, 8)) <= 1e-5
            attention(*(torch.randn(1, 2, 5, 6) for _ in range(3)), fm)
