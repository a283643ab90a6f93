"""What follows from the heads' rows: rank correlations, recommendations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

Row = Mapping[str, Any]


def ranks(values: Sequence[float]) -> torch.Tensor:
    """Ranks from 0, ties sharing their mean. (N,) float64."""
    x = torch.tensor(values, dtype=torch.float64)
    less = (x[:, None] > x[None, :]).sum(1)
    same = (x[:, None] == x[None, :]).sum(1)
    return less + (same - 1) / 2.0


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's ρ; nan for fewer than three pairs or a constant side."""
    if len(a) != len(b) or len(a) < 3:
        return float("nan")
    stacked = torch.stack([ranks(a), ranks(b)])
    return float(torch.corrcoef(stacked)[0, 1])


def measured_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows without a problem."""
    return [row for row in rows if row["problem"] is None]


#: Relative squared error of the kernel below which nothing needs to be done about it.
ENOUGH = 0.01
#: Times that a proposal must lower the error by, to be worth its cost.
WORTH = 2.0
#: `what_helps` → what it says.
HELPS = {
    "nothing": "the features' kernel is within 10 %",
    "features": "more features: the draws are as good as Gaussian ones get",
    "oprf": "a better proposal: proposal=oprf",
    "optimal": "a better proposal: proposal=optimal",
    "colder": "a colder kernel, an exact part or training: no draws of this kernel do with so few features",
}


def what_helps(optimality: Mapping[str, Any], m: int) -> str:
    """What lowers a head's error of the features' kernel, a key of `HELPS`.

    `colder` where even the best draws would leave an error as large as the kernel; else the proposal that lowers the
    error `WORTH` times or more; else `features`, or `nothing` where the error is below `ENOUGH`.

    Args:
        optimality: `log_least` and `log_times_bound` of the scale in use.
    """
    above, least = optimality["log_times_bound"], optimality["log_least"] - math.log(m)
    if least > 0:
        return "colder"
    if least + above["isotropic"] < math.log(ENOUGH):
        return "nothing"
    best = min(above, key=lambda name: above[name])
    return best if above["isotropic"] - above[best] >= math.log(WORTH) else "features"


def layer_errors(rows: Sequence[Row], window: int, m: int) -> dict[int, float]:
    """Layer → root mean square over heads of the default form's error."""
    layers: dict[int, list[float]] = {}
    for row in measured_rows(rows):
        layers.setdefault(row["layer"], []).append(row["default_error"][window][m] ** 2)
    return {layer: (sum(e) / len(e)) ** 0.5 for layer, e in layers.items()}


def recommendations(rows: Sequence[Row], *, window: int, m: int, exact_share: float) -> dict[str, Any]:
    """What to do with this model, each with the numbers it rests on.

    num_features: the fewest at which the mean error is within 5 % of that with the most.
    window: the smallest whose successor among the measured ones lowers the mean error by less than 10 %.
    proposal: least mean error of features alone at m, softmax's kernel.
    exact_layers: the layers with the greatest error, as many as `exact_share` of all layers allows.
    helps: how many heads each of `HELPS` holds for.
    """
    good = measured_rows(rows)
    by_m = {c: fmean(r["default_error"][window][c] for r in good) for c in good[0]["default_error"][window]}
    most = by_m[max(by_m)]
    features = min(c for c, e in by_m.items() if e <= 1.05 * most)
    by_window = {w: fmean(r["default_error"][w][m] for r in good) for w in sorted(good[0]["default_error"])}
    widths = list(by_window)
    chosen = widths[-1]
    for small, large in itertools.pairwise(widths):
        if by_window[large] > 0.9 * by_window[small]:
            chosen = small
            break
    names = [n for n in good[0]["error"] if n != "whitened"]
    by_estimator = {n: fmean(r["error"][n][m] for r in good) for n in names}
    errors = layer_errors(rows, window, m)
    count = int(exact_share * len(errors))
    worst = sorted(errors, key=lambda layer: -errors[layer])[:count]
    return {
        "num_features": {"choice": features, "mean_error": by_m},
        "window": {"choice": chosen, "mean_error": by_window},
        "estimator": {"choice": min(by_estimator, key=lambda n: by_estimator[n]), "mean_error": by_estimator},
        "exact_layers": {"choice": sorted(worst), "error": errors, "share": exact_share},
        "helps": {name: sum(r["optimality"]["helps"] == name for r in good) for name in HELPS},
    }


def _best(by_scale: Row, form: str, side: str) -> int:
    errors = by_scale[form][side]
    return min(range(len(errors)), key=lambda i: errors[i])


def scale_agreement(rows: Sequence[Row], form: str) -> dict[str, Any]:
    """How well predictions over the geometry's scale (features alone, or the default form) agree with measurement.

    rank: Spearman's ρ over heads at every scale, and `best` at each head's best measured scale.
    hits: share of heads whose best scale is the predicted one; cost: mean ratio of the measured error at the scale
    predicted to the least one; `moments_hits`, `moments_cost`: the same for the scale from moments alone.
    """
    good = [r["by_scale"] for r in measured_rows(rows)]
    scales = good[0]["scales"]
    rank = {
        str(s): rank_correlation(*([r[form][side][i] for r in good] for side in ("predicted", "measured")))
        for i, s in enumerate(scales)
    }
    best = [_best(r, form, "measured") for r in good]
    rank["best"] = rank_correlation(
        *([r[form][side][i] for r, i in zip(good, best, strict=True)] for side in ("predicted", "measured"))
    )
    result: dict[str, Any] = {"rank": rank}
    chosen = {"": [_best(r, form, "predicted") for r in good], "moments_": [scales.index(r["moments"]) for r in good]}
    for name, indices in chosen.items():
        pairs = list(zip(good, indices, best, strict=True))
        result[f"{name}hits"] = fmean(i == b for _, i, b in pairs)
        result[f"{name}cost"] = fmean(r[form]["measured"][i] / r[form]["measured"][b] for r, i, b in pairs)
    return result


def agreement(rows: Sequence[Row], m: int) -> dict[str, Any]:
    """Predicted against measured quantities over heads, rank correlations where nothing else is said.

    output: predicted error of features alone at scale 1 with the measured one (centred, balanced, m features).
    moment: predicted E[L] with that error. `moment:NAME`, one an estimator: E[L] of cold queries and keys, predicted
        with measured. `features`, `default`: `scale_agreement` of the two forms.
    """
    good = measured_rows(rows)
    measured = [r["error"]["balanced"][m] for r in good]
    result: dict[str, Any] = {
        "output": rank_correlation([r["predicted"][m] for r in good], measured),
        "moment": rank_correlation([r["log_moment"]["balanced"]["predicted"] for r in good], measured),
        **{form: scale_agreement(rows, form) for form in ("features", "default")},
    }
    for name in good[0]["log_moment"]:
        pairs = [r["log_moment"][name] for r in good]
        result[f"moment:{name}"] = rank_correlation(
            [p["cold_predicted"] for p in pairs], [p["cold_measured"] for p in pairs]
        )
    return result
