"""The estimators a diagnosis compares, and their second moments: predicted from moments, measured on samples."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calibration.moments import HeadProposals, Moments, feature_moments, set_transforms
from ..config import DarkConfig
from ..features.affine import affine
from ..features.feature_map import FeatureMap
from ..features.proposals import PairMoments, expected_log_moment, log_determinant, log_weight, proposal_covariance
from ..features.transforms import regularise, symmetric_power, whitening


class Estimator(NamedTuple):
    """One way to draw features. `whitened` sets M to Proposition C.1's whitening, so the kernel is not softmax's."""

    title: str
    changes: dict[str, Any]
    whitened: bool = False


ESTIMATORS: dict[str, Estimator] = {
    "performer": Estimator("Performer", {}),
    "oprf": Estimator("OPRF", {"proposal": "oprf"}),
    "optimal": Estimator("optimal proposal", {"proposal": "optimal"}),
    "centered": Estimator("centred", {"center": True}),
    "balanced": Estimator("centred, balanced", {"center": True, "balance": True}),
    "balanced-oprf": Estimator("centred, balanced, OPRF", {"center": True, "balance": True, "proposal": "oprf"}),
    "balanced-optimal": Estimator(
        "centred, balanced, optimal proposal", {"center": True, "balance": True, "proposal": "optimal"}
    ),
    "whitened": Estimator("centred, whitened", {"center": True}, whitened=True),
}


def closed_form_map(config: DarkConfig, moments: Moments, *, layer: int, heads: int) -> FeatureMap:
    """A feature map with centres and balance from `moments`, as far as `config` has them. heads: query heads H."""
    groups, dim = moments.total["key"].shape
    fm = FeatureMap(config, num_heads=heads, num_kv_heads=groups, head_dim=dim, layer=layer)
    set_transforms(fm, moments)
    return fm


def estimator_map(name: str, moments: Moments, num_features: int, *, layer: int, heads: int, seed: int) -> FeatureMap:
    """The feature map of one estimator, window 0, closed forms from `moments`.

    Args:
        heads: query heads H of the layer. num_features: m.
    """
    estimator = ESTIMATORS[name]
    config = DarkConfig.paper(num_features, seed=seed, **estimator.changes)
    fm = closed_form_map(config, moments, layer=layer, heads=heads)
    if fm.proposal_root is not None:
        HeadProposals(fm, moments).set_(torch.ones(fm.num_kv_heads))
    if estimator.whitened and fm.geometry is not None:
        pooled = 0.5 * (moments.covariance("query", True) + moments.covariance("key", True))
        fm.set_("geometry", whitening(pooled, "preserve"))
    return fm


def predicted_log_moment(fm: FeatureMap, moments: Moments, scale: float = 1.0) -> Tensor:
    """E log of one draw's relative second moment, (G,) nats: `expected_log_moment` in the map's own coordinates.

    At `scale` times the queries and keys, with the proposal of scale 1 (that of `fm`).
    """
    pairs = feature_moments(fm, moments)
    if (geometry := fm.learned("geometry")) is not None:
        geometry = geometry.detach().double()
        pairs = PairMoments(*(geometry @ x @ geometry.mT for x in pairs))
    return expected_log_moment(proposal_covariance(fm.config.proposal, pairs), scale**2 * pairs.total)


@torch.no_grad()
def measured_log_moment(fm: FeatureMap, query: Tensor, key: Tensor, *, scale: float, draws: int, seed: int) -> Tensor:
    """The same from `draws` real features a pair: the mean over pairs of the log of their mean square, (G,) nats.

    A mean of N numbers cannot show what rarer than one in N carries: values beyond half of log(draws) are too low,
    at last even falling. Hence a cold `scale` of queries and keys: their second moment is small enough to be seen.

    Args:
        query, key: samples (G, N, d) in units of √s·q and √s·k; the n-th query is paired with the n-th key.
    """
    query_form, key_form = affine(fm.parameters_for(torch.float64))
    z = scale * (query_form.mapped(query) + key_form.mapped(key))
    generator = torch.Generator().manual_seed(seed)
    isotropic = torch.randn(draws, z.shape[-1], generator=generator, dtype=torch.float64)
    weights, rows = torch.zeros(z.shape[0], draws, dtype=torch.float64), isotropic.expand(z.shape[0], -1, -1)
    if fm.proposal_root is not None:
        root = fm.proposal_root.double()
        weights, rows = log_weight(rows, root, log_determinant(root)), rows @ root
    exponent = 2 * (z @ rows.mT + weights[:, None]) - z.square().sum(-1, keepdim=True)
    return (exponent.logsumexp(-1) - math.log(draws)).mean(-1)


def spectrum(covariance: Tensor) -> dict[str, Any]:
    """Eigenvalues (descending), condition number and effective rank of covariances (G, d, d): lists over heads.

    The effective rank is the exponential of the entropy of the eigenvalues' shares: d for an isotropic head. The
    condition number is that of the regularised covariance (`transforms.regularise`), about 10⁴·d at the most.
    """
    values = torch.linalg.eigvalsh(covariance).flip(-1).clamp_min(0)
    regular = torch.linalg.eigvalsh(regularise(covariance))
    share = values / values.sum(-1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-300).log()).sum(-1)
    return {
        "eigenvalues": values.tolist(),
        "condition": (regular[:, -1] / regular[:, 0]).tolist(),
        "effective_rank": entropy.exp().tolist(),
    }


def balanced_covariance(moments: Moments) -> Tensor:
    """Λ that queries and keys share after centring and balancing, (G, d, d): (Λ_q^½ Λ_k Λ_q^½)^½ up to a rotation."""
    query, key = (regularise(moments.covariance(side, True)) for side in ("query", "key"))
    root = symmetric_power(query, 0.5)
    return symmetric_power(root @ key @ root, 0.5)
