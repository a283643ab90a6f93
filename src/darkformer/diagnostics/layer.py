"""Everything a diagnosis says about one layer, as one plain dict a key/value head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration.moments import Moments, feature_moments, head_rows
from ..calibration.probe import SCALES as SEARCH_SCALES
from ..calibration.probe import Probe
from ..config import DarkConfig, option
from ..features.feature_map import FeatureMap
from ..features.proposals import PairMoments, proposal_covariance
from .bounds import optimality
from .estimators import (
    ESTIMATORS,
    balanced_covariance,
    estimator_map,
    measured_log_moment,
    predicted_log_moment,
    spectrum,
)
from .prediction import Predictor
from .summary import what_helps

#: Numbers of features at which the output error is measured.
COUNTS = (16, 32, 64, 128, 256, 512, 1024)
#: Scales of the geometry tried for the cold start: every second one of those that calibration tries.
SCALES = SEARCH_SCALES[::2]
#: Scale of queries and keys at which second moments are small enough to be measured.
COLD = 0.3
#: Windows at which the default form is measured, beside the configured one: a quarter of the probe's tokens at most, or
#: little would be left for the features.
WINDOWS = (16, 32, 64, 128)
#: Log of float32's smallest normal number: weights below it in every feature are lost without the log domain.
SMALLEST = math.log(torch.finfo(torch.float32).tiny)
#: Tokens whose keys share one stabiliser in the chunked operator.
CHUNK = 64


@dataclass(frozen=True)
class Effort:
    """How much is sampled; the defaults keep SmolLM2-135M under five minutes on two cores."""

    counts: tuple[int, ...] = COUNTS
    tokens: int = option(512, "Tokens of a sequence; the cost is quadratic.", minimum=16)
    pairs: int = 128  # for measured second moments
    draws: int = 4096  # per pair
    queries: int = 16  # per query head, for the predicted noise of the output
    noise_draws: int = 512
    seed: int = 0


class Layer:
    """One layer's captured tensors and moments.

    Args:
        every, far: moments of all keys, and without the sinks.
        captured: query (B, H, L, d), key, value (B, G, L, d), padding mask or None, and scaling of the probe sequence.
        config: window, sinks and m of the form that is diagnosed.
    """

    def __init__(
        self, number: int, every: Moments, far: Moments, captured: Sequence[Any], config: DarkConfig, effort: Effort
    ) -> None:
        self.number, self.every, self.far, self.config, self.effort = number, every, far, config, effort
        self.groups, self.heads = captured[1].shape[1], captured[0].shape[1]
        self.paper = DarkConfig.paper(effort.counts[-1])
        self.probe = Probe(*captured, config=self.paper, tokens=effort.tokens, dtype=torch.float64)
        self.predictor = Predictor(self.probe, queries=effort.queries, draws=effort.noise_draws, seed=effort.seed)

    def _map(self, name: str, moments: Moments, num_features: int) -> FeatureMap:
        return estimator_map(name, moments, num_features, layer=self.number, heads=self.heads, seed=self.effort.seed)

    def geometry(self) -> list[dict[str, Any]]:
        """Norms, spectra, anisotropy and the admissibility of Theorem 3.2."""
        rows: list[dict[str, Any]] = [{} for _ in range(self.groups)]
        shapes = {side: spectrum(self.every.covariance(side, True)) for side in ("query", "key")}
        shapes["balanced"] = spectrum(balanced_covariance(self.far))
        for g, row in enumerate(rows):
            for side in ("query", "key"):
                second = self.every.covariance(side, False)[g].trace()
                row[f"{side}_square"] = float(second)
                row[f"{side}_mean_square"] = float(self.every.mean(side)[g].square().sum())
            for name, shape in shapes.items():
                row[name] = {field: values[g] for field, values in shape.items()}
            row["inadmissible"] = sum(v >= 0.5 for v in row["balanced"]["eigenvalues"])
        return rows

    def mass(self) -> list[dict[str, float]]:
        """Shares of softmax's attention on sinks, window and far keys, over the queries that have all three."""
        weights = self.probe.weights / self.probe.weights.sum(-1, keepdim=True)
        sink = (self.probe.position < self.config.sinks)[:, None, None, None, :]
        near = (self.probe.offset < self.config.window)[:, None, None] & ~sink
        late = (self.probe.position >= self.config.sinks + self.config.window)[:, None, None, :, None]
        total = (weights * late).sum((0, 2, 3, 4)).clamp_min(1e-30)
        parts = [(weights * late * part).sum((0, 2, 3, 4)) / total for part in (sink, near)]
        return [
            {"sinks": float(s), "window": float(w), "far": max(0.0, 1 - float(s) - float(w))}
            for s, w in zip(*parts, strict=True)
        ]

    def moments(self) -> dict[str, dict[str, list[float]]]:
        """Log second moments of every estimator per head: predicted at scale 1; predicted and measured `COLD`."""
        keep = self.probe.real
        generator = torch.Generator().manual_seed(self.effort.seed)
        samples = []
        for x in (self.probe.q, self.probe.k):
            rows = head_rows(x, keep)
            samples.append(rows[:, torch.randint(rows.shape[1], (self.effort.pairs,), generator=generator)])
        result = {}
        for name in ESTIMATORS:
            fm = self._map(name, self.every, 1)
            measured = measured_log_moment(fm, *samples, scale=COLD, draws=self.effort.draws, seed=self.effort.seed)
            result[name] = {
                "predicted": predicted_log_moment(fm, self.every).tolist(),
                "cold_predicted": predicted_log_moment(fm, self.every, COLD).tolist(),
                "cold_measured": measured.tolist(),
            }
        return result

    def errors(self) -> dict[str, dict[int, list[float]]]:
        """Relative error of the output by features alone (window 0, sinks 0), per estimator, m and head."""
        none = torch.zeros(self.groups, dtype=torch.float64)
        result = {}
        for name in ESTIMATORS:
            p = self._map(name, self.every, self.effort.counts[-1]).parameters_for(torch.float64)
            kernels = self.probe.kernels(p, self.effort.counts)
            result[name] = {
                m: self.probe.error(self.probe.far_part(kernel), none).sqrt().tolist()
                for m, kernel in zip(self.effort.counts, kernels, strict=True)
            }
        return result

    def default(self) -> dict[str, Any]:
        """The default form, scale and bias searched per head: error against m, against the window, exact part alone.

        Windows other than the configured one are measured at the configured m only.
        """
        own, m_own = self.config.window, self.config.num_features
        counts = tuple(sorted({*self.effort.counts, m_own}))
        windows = {w for w in WINDOWS if 4 * w <= self.probe.k.shape[2]} | {own}
        every: dict[int, dict[int, list[Tensor]]] = {w: {} for w in sorted(windows)}
        alone = []
        parameters = self._map("balanced", self.far, counts[-1]).parameters_for(torch.float64)
        for scale in SCALES:
            for m, kernel in zip(counts, self.probe.kernels(parameters.scaled(scale), counts), strict=True):
                for window, by_m in every.items():
                    if window == own or m == m_own:
                        self.probe.split(DarkConfig(window=window, sinks=self.config.sinks))
                        by_m.setdefault(m, []).append(self.probe.least_error(self.probe.far_part(kernel)))
                if m == m_own:
                    self.probe.split(self.paper)
                    alone.append(self.probe.error(self.probe.far_part(kernel), kernel.new_zeros(self.groups)))
        exact_part = {}
        for window in every:
            self.probe.split(DarkConfig(window=window, sinks=self.config.sinks))
            exact_part[window] = self.probe.error_exact_part().sqrt().tolist()
        self.probe.split(self.paper)
        return {
            "error": {
                w: {m: torch.stack(e).amin(0).sqrt().tolist() for m, e in by_m.items()} for w, by_m in every.items()
            },
            "exact_part": exact_part,
            "measured": {"features": torch.stack(alone).sqrt(), "default": torch.stack(every[own][m_own]).sqrt()},
        }

    def scales(self, measured: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Per head error against the geometry's scale at the configured m, measured and predicted, of both forms.

        Args:
            measured: (S, G) errors of features alone and of the default form.
        """
        parameters = self._map("balanced", self.far, 1).parameters_for(torch.float64)
        forms = {"features": self.paper, "default": self.config}
        predicted = {}
        for name, form in forms.items():
            self.probe.split(form)
            found = [
                self.predictor.errors(parameters.scaled(s), [self.config.num_features], biased=name == "default")[0]
                for s in SCALES
            ]
            predicted[name] = torch.stack(found)
        self.probe.split(self.paper)
        moments = self.predictor.moment_scale(parameters, SCALES, self.config.num_features)
        rows = []
        for g in range(self.groups):
            row: dict[str, Any] = {"scales": list(SCALES), "moments": moments[g]}
            for name in forms:
                row[name] = {"measured": measured[name][:, g].tolist(), "predicted": predicted[name][:, g].tolist()}
            rows.append(row)
        return rows

    def optimality(self, measured: dict[str, Tensor]) -> list[dict[str, Any]]:
        """How far draws for the default form's far keys are from the least error of the kernel, per head.

        At each head's best measured scale, for the isotropic draws that the default form has and for the proposals it
        could have. Queries and keys are samples, taken as independent; the log-weight
        that centring puts on keys is left out, as it is exact.

        Args:
            measured: (S, G) errors of the default form.
        """
        fm = self._map("balanced", self.far, 1)
        query, key = self.probe.mapped(fm.parameters_for(torch.float64))
        moments, generator = feature_moments(fm, self.far), torch.Generator().manual_seed(self.effort.seed)
        late = self.probe.real & (self.probe.position >= self.config.sinks)
        rows = []
        for x in (query, key):
            samples = head_rows(x, late)
            rows.append(samples[:, torch.randint(samples.shape[1], (self.effort.pairs,), generator=generator)])
        found = []
        for g, best in enumerate(measured["default"].argmin(0).tolist()):
            scale = SCALES[best]
            own = PairMoments(*(x[g] for x in moments)).scaled(torch.tensor(scale))
            proposals = {name: proposal_covariance(name, own) for name in ("isotropic", "oprf", "optimal")}
            head = optimality(
                scale * rows[0][g], scale * rows[1][g], proposals, draws=self.effort.draws, generator=generator
            )
            row: dict[str, Any] = {"scale": scale, **head._asdict()}
            found.append({**row, "helps": what_helps(row, self.config.num_features)})
        return found

    def noise(self) -> list[dict[str, Any]]:
        """Bound, first-order and predicted error of the centred, balanced estimator (window 0), per head."""
        p = self._map("balanced", self.every, 1).parameters_for(torch.float64)
        predicted = self.predictor.errors(p, self.effort.counts, biased=False)
        return [
            {
                "bound": math.sqrt(sum(n.bound for n in noises) / len(noises)),
                "first_order": math.sqrt(sum(n.first_order for n in noises) / len(noises)),
                "predicted": {m: float(predicted[i, g]) for i, m in enumerate(self.effort.counts)},
                "divergence": float(divergence.median()),
            }
            for g, (noises, divergence) in enumerate(self.predictor.noise(p))
        ]

    def sample_size(self) -> list[dict[str, float]]:
        """Effective number of the features, and underflow, of the centred, balanced estimator at m = `num_features`.

        The effective size of one query is (Σ_i c_i)²/Σ c_i², c_i the share of feature i in its normaliser; the median
        over queries is given. Underflow: the share of rows whose normaliser is below float32's smallest number
        if the stabiliser is the maximum over a chunk of `CHUNK` keys, as in the chunked operator with window 0.
        """
        fm = self._map("balanced", self.every, self.config.num_features)
        lq, lk = self.probe.log_features(fm.parameters_for(torch.float64))
        past = lk.logcumsumexp(2)  # (B, G, L, m) causal sums of every feature
        share = (lq + past[:, :, None]).softmax(-1)
        size = 1 / share.square().sum(-1)  # (B, G, R, L)
        length = lk.shape[2]
        end = (torch.arange(length) // CHUNK + 1).mul(CHUNK).sub(1).clamp_max(length - 1)
        top = lk.cummax(2).values[:, :, end]  # the chunk's last running maximum: it may be a future key's
        stabilised = lq + top[:, :, None]
        normaliser = (lq + past[:, :, None]).logsumexp(-1) - stabilised.amax(-1)
        lost = (normaliser < SMALLEST).to(torch.float64)
        real = self.probe.real[:, None, None]
        sizes = [size[:, g].masked_select(real[:, 0].expand_as(size[:, g])).median() for g in range(self.groups)]
        shares = (lost * real).sum((0, 2, 3)) / (real.sum() * self.heads / self.groups)
        return [{"effective": float(s), "underflow": float(u)} for s, u in zip(sizes, shares, strict=True)]


def diagnose_layer(layer: Layer) -> list[dict[str, Any]]:
    """All of it, one dict a key/value head. Keys of `m` and windows are integers here and strings in JSON."""
    geometry, mass, noise, size = layer.geometry(), layer.mass(), layer.noise(), layer.sample_size()
    moments, errors, default = layer.moments(), layer.errors(), layer.default()
    scales, optimal = layer.scales(default["measured"]), layer.optimality(default["measured"])
    rows = []
    for g in range(layer.groups):
        rows.append(
            {
                "layer": layer.number,
                "head": g,
                "problem": None,
                **geometry[g],
                "mass": mass[g],
                **noise[g],
                **size[g],
                "log_moment": {n: {k: v[g] for k, v in both.items()} for n, both in moments.items()},
                "error": {n: {m: e[g] for m, e in by.items()} for n, by in errors.items()},
                "default_error": {w: {m: e[g] for m, e in by.items()} for w, by in default["error"].items()},
                "exact_part_error": {w: e[g] for w, e in default["exact_part"].items()},
                "by_scale": scales[g],
                "optimality": optimal[g],
            }
        )
    return rows
