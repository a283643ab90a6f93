"""What "Infinite Width Models That Work" claims in its abstract, each with a verdict that follows from records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..bench_targets import slope
from .plan import MODELS, Setting

#: Scores closer than this are equal: half a point of accuracy, 0.005 of R².
NOISE = 0.005
#: A difference over seeds counts from so many standard errors of the paired difference on.
ERRORS = 2.0
#: From here on a kernel's solution is said to select: parts of the resembling units over those of the control's.
SELECTS = 1.5
#: Least slope of the distance to the limit against the width: it would be -1/2 with infinitely many seeds.
FALLS = -0.35
Lines = Sequence[Mapping[str, Any]]


def settings(lines: Lines) -> list[Setting]:
    """Those with scores, in the order of the record."""
    return list(dict.fromkeys(Setting(x["task"], x["depth"]) for x in lines if x["kind"] == "score"))


def scores(lines: Lines, setting: Setting, model: str) -> dict[int, float | None]:
    """Seed → score; None where training diverged."""
    return {
        x["seed"]: x["score"]
        for x in lines
        if x["kind"] == "score" and (x["task"], x["depth"], x["model"]) == (setting.task, setting.depth, model)
    }


class Difference(NamedTuple):
    """Of two models' scores on the same splits."""

    mean: float
    error: float  # standard error

    @property
    def noise(self) -> float:
        return max(NOISE, ERRORS * self.error)

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} ± {100 * self.error:.1f}"


def difference(lines: Lines, setting: Setting, model: str, other: str) -> Difference | None:
    """`model` minus `other`, over the seeds that both have; None if those are fewer than two."""
    own, others = scores(lines, setting, model), scores(lines, setting, other)
    pairs = [(own[seed], others[seed]) for seed in own if seed in others]
    gains = [a - b for a, b in pairs if a is not None and b is not None]
    if len(gains) < 2:
        return None
    return Difference(statistics.fmean(gains), statistics.stdev(gains) / len(gains) ** 0.5)


def _judged(conditions: Sequence[bool]) -> str:
    if not conditions:
        return "not finished"
    return "reproduced" if all(conditions) else "partly" if any(conditions) else "not reproduced"


def _compared(
    lines: Lines, pairs: Sequence[tuple[str, str, Callable[[Difference], bool]]], tasks: Sequence[str] = ()
) -> tuple[list[bool], str]:
    """Conditions on differences in every setting, and the differences in words."""
    conditions, texts = [], []
    for setting in settings(lines):
        if tasks and setting.task not in tasks:
            continue
        parts = []
        for model, other, holds in pairs:
            found = difference(lines, setting, model, other)
            if found is not None:
                conditions.append(holds(found))
                parts.append(f"{model} − {other} {found}")
        if parts:
            texts.append(f"{setting.name}: {', '.join(parts)}")
    return conditions, "; ".join(texts)


def _better(found: Difference) -> bool:
    return found.mean > found.noise


def _not_worse(found: Difference) -> bool:
    return found.mean > -found.noise


def _not_better(found: Difference) -> bool:
    return found.mean < found.noise


def underperform(lines: Lines) -> tuple[str, str]:
    """(a): a finite network with frozen features and the usual optimizer, Adam, scores higher than the NTK."""
    conditions, text = _compared(lines, [("adam-frozen", "ntk", _better)])
    return _judged(conditions), text


def optimizer(lines: Lines) -> tuple[str, str]:
    """(b): with frozen features Adam scores higher than SGD, and SGD no higher than the NTK."""
    conditions, text = _compared(lines, [("adam-frozen", "sgd-frozen", _better), ("sgd-frozen", "ntk", _not_better)])
    return _judged(conditions), text


def erased(lines: Lines) -> tuple[str, str]:
    """(c): the Adam-like limit scores higher than the NTK, and no lower than the finite network that Adam trains."""
    conditions, text = _compared(lines, [("adam-like", "ntk", _better), ("adam-like", "adam-learned", _not_worse)])
    return _judged(conditions), text


def selects(lines: Lines) -> tuple[str, str]:
    """(d): on the sparse target both limits rest on the units like the target's, and Adam's is as good as learning."""
    conditions, text = _compared(lines, [("adam-like", "adam-learned", _not_worse)], ("sparse",))
    texts = [text] if text else []
    for model in ("ntk", "adam-like"):
        found = [x for x in lines if x["kind"] == "selection" and x["model"] == model]
        if found:
            own, control = (statistics.fmean(x[name] for x in found) for name in ("nearest", "control"))
            conditions.append(own > SELECTS * control)
            texts.append(f"{model}: units like the target's move {own:.2f} × the mean, the control's {control:.2f} ×")
    return _judged(conditions), "; ".join(texts)


def slopes(lines: Lines) -> dict[tuple[int, str], tuple[dict[int, float], float]]:
    """(depth, optimizer) → mean distance by width, and the exponent of the width in it."""
    found: dict[tuple[int, str], dict[int, list[float]]] = {}
    for x in lines:
        if x["kind"] == "distance":
            found.setdefault((x["depth"], x["optimizer"]), {}).setdefault(x["width"], []).append(x["distance"])
    means = {key: {w: statistics.fmean(v) for w, v in by.items()} for key, by in found.items()}
    return {key: (by, slope(list(by), list(by.values()))) for key, by in means.items() if len(by) > 1}


def limit(lines: Lines) -> tuple[str, str]:
    """(e), ours: networks under the optimizers that the limits are derived for approach them with the width."""
    found = {key: power for key, (_, power) in slopes(lines).items() if key[1] != "adam"}
    text = "; ".join(f"{depth} hidden, {name}: width^{power:.2f}" for (depth, name), power in found.items())
    return _judged([power <= FALLS for power in found.values()]), text


CLAIMS: tuple[tuple[str, str, Callable[[Lines], tuple[str, str]]], ...] = (
    ("a", "NTK models underperform finite ones even when feature learning is switched off", underperform),
    ("b", "the cause is their weak optimizer, SGD", optimizer),
    ("c", "an infinite-width limit with Adam-like dynamics erases the gap", erased),
    ("d", "infinite width needs no feature learning: it selects sub-features", selects),
    ("e", "(ours) the limits are what wide networks under their optimizers become", limit),
)


def claim_table(lines: Lines) -> list[list[str]]:
    """Header and one row a claim."""
    rows = [["", "claim", "verdict", "numbers (points of score, ± standard error)"]]
    return rows + [[f"({letter})", text, *judge(lines)] for letter, text, judge in CLAIMS]


def score_table(lines: Lines) -> list[list[str]]:
    """Header and one row a model: mean ± standard deviation over the seeds, and how far learned features moved."""
    every = settings(lines)
    rows = [["model", *(setting.name for setting in every)]]
    for model, title in MODELS.items():
        cells = []
        for setting in every:
            values = list(scores(lines, setting, model).values())
            good = [v for v in values if v is not None]
            if len(good) < len(values) or not good:
                cells.append("diverged" if values else "–")
                continue
            spread = f" ± {100 * statistics.stdev(good):.1f}" if len(good) > 1 else ""
            moved = [
                x["movement"]
                for x in lines
                if x["kind"] == "score"
                and x["model"] == model
                and x.get("movement")
                and (x["task"], x["depth"]) == (setting.task, setting.depth)
            ]
            learned = f" (moved {statistics.fmean(moved):.0%})" if moved else ""
            cells.append(f"{100 * statistics.fmean(good):.1f}{spread}{learned}")
        rows.append([title, *cells])
    return rows


def slope_table(lines: Lines) -> list[list[str]]:
    """Header and one row a depth and optimizer: distance to the limit by width, and the exponent."""
    found = slopes(lines)
    widths = sorted({width for by, _ in found.values() for width in by})
    rows = [["hidden layers", "optimizer", *(f"width {w:,}" for w in widths), "exponent"]]
    for (depth, name), (by, power) in found.items():
        rows.append([str(depth), name, *(f"{by[w]:.3f}" if w in by else "–" for w in widths), f"{power:.2f}"])
    return rows
