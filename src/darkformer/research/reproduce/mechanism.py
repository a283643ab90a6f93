"""Why a method works or fails: anisotropy, the estimator's variance and the learned geometry of a model."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from torch import Tensor

from ...calibration.moments import Moments
from ...config import DarkConfig
from ...diagnostics.estimators import estimator_map, predicted_log_moment, spectrum
from ...diagnostics.run import Collector
from ...features.feature_map import FeatureMap
from ...features.proposals import optimal_covariance, pair_moments
from ...features.transforms import regularise, symmetric_power
from ...hf.convert import convert, revert
from ...hf.interface import observing
from ...hf.layers import dark_layers

#: Tokens whose queries and keys are looked at.
TOKENS = 1024


def shape_distance(a: Tensor, b: Tensor) -> Tensor:
    """How far two covariances (…, d, d) are apart but for their scale: the spread of log eigenvalues of A^-½BA^-½.

    0 if one is a multiple of the other; symmetric; the same in every basis.
    """
    root = symmetric_power(regularise(a), -0.5)
    logs = torch.linalg.eigvalsh(root @ regularise(b) @ root).clamp_min(1e-12).log()
    return logs.std(-1, correction=0)


def _geometry(fm: FeatureMap, moments: Moments) -> dict[str, float]:
    """M's condition number, and Σ = MᵀM beside whitening and the optimal proposal's Σ*; means over heads."""
    geometry = fm.learned("geometry")
    assert geometry is not None
    sigma = fm.covariance().detach().double().cpu()
    sides = [moments.covariance(side, True) for side in ("query", "key")]
    whitening = torch.linalg.inv(regularise(0.5 * (sides[0] + sides[1])))
    query, key = (moments.covariance(side, False) for side in ("query", "key"))
    best = optimal_covariance(pair_moments(query, key, moments.mean("query"), moments.mean("key")).total)
    eye = torch.eye(fm.head_dim, dtype=torch.float64).expand_as(sigma)
    values = torch.linalg.svdvals(geometry.detach().double().cpu())
    return {
        "condition": float((values[:, 0] / values[:, -1]).mean()),
        "scale": float(values.log().mean().exp()),
        "to_whitening": float(shape_distance(sigma, whitening).mean()),
        "identity_to_whitening": float(shape_distance(eye, whitening).mean()),
        "to_optimal": float(shape_distance(sigma, best).mean()),
        "identity_to_optimal": float(shape_distance(eye, best).mean()),
    }


def _layer(fm: FeatureMap, moments: Moments) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": fm.layer}
    for side in ("query", "key"):
        shape = spectrum(moments.covariance(side, True))
        row[f"{side}_rank"] = statistics.fmean(shape["effective_rank"])
        row[f"{side}_condition"] = statistics.median(shape["condition"])
        row[f"{side}_square"] = float(moments.covariance(side, False).diagonal(dim1=-2, dim2=-1).sum(-1).mean())
    own = fm
    if fm.config.method == "exact":  # what Performer's features would be worth in the softmax model
        own = estimator_map("performer", moments, 1, layer=fm.layer, heads=fm.num_heads, seed=0)
    if own.config.method in ("dark", "performer"):  # LFK's rows are no longer draws of a known law
        row["log_moment"] = float(predicted_log_moment(copy.deepcopy(own).cpu(), moments).mean())
    if fm.geometry is not None:
        row["geometry"] = _geometry(fm, moments)
    return row


def measure(model: Any, blocks: Tensor) -> list[dict[str, Any]]:
    """One row a layer, means over its heads; the model is as it was afterwards.

    Args:
        model: converted, or a softmax model. blocks: (N, L) tokens, of which the first `TOKENS` are used.

    Returns:
        `query_rank`, `key_rank` (effective ranks: d is isotropic), `query_condition`, `key_condition`, `query_square`,
        `key_square` (mean squared norms), `log_moment` (log second moment of one draw of the method's own estimator,
        nats; for softmax that of Performer), `geometry` (DARK: condition and scale of M, shape distances).
    """
    softmax = next(dark_layers(model), None) is None
    if softmax:
        convert(model, DarkConfig(method="exact", sinks=0, convert_sliding=True))
    collected = Collector()
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        with observing(model, collected, softmax=softmax):
            for batch in blocks[: max(1, TOKENS // blocks.shape[1])].split(1):
                model(batch.to(device), use_cache=False)
        rows = [_layer(fm, collected.every[fm.layer]) for fm in dark_layers(model)]
    finally:
        model.train(was_training)
        if softmax:
            revert(model)
    return rows
