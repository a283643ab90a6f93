"""Training time as a linear function of what a step moves and multiplies, and how well that holds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from .copies import Totals

#: What time is explained by, beside a constant: the three that the claim compares, and the one `plan` predicts with.
#: There each kind of product has a speed of its own, in which what a fused kernel moves in its buffers is contained,
#: and every kernel costs its launch.
FITS: dict[str, tuple[str, ...]] = {
    "copies": ("copies",),
    "flops": ("flops",),
    "both": ("copies", "flops"),
    "plan": ("moved", "product", "softmax", "linear", "kernels"),
}
CONSTANT = "constant"
#: Relative error from which on it counts linearly; rounds of weighted least squares.
HUBER, ROUNDS = 0.05, 60
#: A median error on held-out shapes above which an estimate is poor, and up to which it is accurate.
POOR, ACCURATE = 0.25, 0.15


class Timing(NamedTuple):
    """What was timed: a step's totals, seconds, whether the shape is held out, whether its attention is softmax."""

    totals: Totals
    seconds: float
    held_out: bool
    softmax: bool


@dataclass(frozen=True)
class Fit:
    """Seconds = Σ coefficient · total + constant.

    Attributes:
        coefficients: seconds a number moved, a FLOP, a kernel; `constant` in seconds.
        r2, r2_held_out: share of the variance of the seconds explained, of fitted and of held-out shapes.
        median_error, worst_error: |predicted / measured - 1| over the held-out shapes.
    """

    coefficients: dict[str, float]
    r2: float
    r2_held_out: float
    median_error: float
    worst_error: float

    def seconds(self, totals: Totals) -> float:
        """Predicted seconds."""
        return predicted(self.coefficients, totals)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def predicted(coefficients: Mapping[str, float], totals: Totals) -> float:
    """Seconds of a step, or of a part of one, that moves and multiplies `totals`."""
    return sum(x * (1.0 if name == CONSTANT else getattr(totals, name)) for name, x in coefficients.items())


def coefficients_of(columns: Sequence[str], rows: Sequence[Timing]) -> dict[str, float]:
    """Coefficients, none of them below zero, that minimise Huber's loss of the relative errors.

    Relative, because a constant fraction is what matters from milliseconds to minutes; Huber's, because whatever else a
    machine does now and then makes a step take several times as long. A cause that comes out below zero saves no time:
    it is left out and the others are fitted again.
    """
    seconds = np.array([row.seconds for row in rows])
    left = [*columns, CONSTANT]
    while True:
        matrix = np.array([[1.0 if name == CONSTANT else getattr(row.totals, name) for name in left] for row in rows])
        relative = matrix / seconds[:, None]
        scale = np.linalg.norm(relative, axis=0)
        scale[scale == 0] = 1.0
        solution = _huber_solution(relative / scale)
        if solution.min() >= 0 or len(left) == 1:
            kept = dict(zip(left, (solution / scale).tolist(), strict=True))
            return {name: kept.get(name, 0.0) for name in (*columns, CONSTANT)}
        left.pop(int(solution.argmin()))


def _huber_solution(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """x of least Huber loss of matrix·x - 1, by weighted least squares again and again."""
    weights = np.ones(len(matrix))
    for _ in range(ROUNDS):
        root = np.sqrt(weights)
        solution = np.linalg.lstsq(matrix * root[:, None], root, rcond=None)[0]
        weights = HUBER / np.maximum(np.abs(matrix @ solution - 1), HUBER)
    return solution


def _r2(measured: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    spread = float(np.square(measured - measured.mean()).sum())
    return 1.0 - float(np.square(measured - expected).sum()) / spread if spread else float("nan")


def fit(columns: Sequence[str], rows: Sequence[Timing]) -> Fit:
    """Fits the rows that are not held out and scores the others."""
    fitted, held_out = ([row for row in rows if row.held_out == flag] for flag in (False, True))
    coefficients = coefficients_of(columns, fitted)

    def both(part: Sequence[Timing]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        measured = np.array([row.seconds for row in part])
        return measured, np.array([predicted(coefficients, row.totals) for row in part])

    measured, expected = both(held_out)
    errors = np.abs(expected / measured - 1).tolist()
    return Fit(coefficients, _r2(*both(fitted)), _r2(measured, expected), statistics.median(errors), max(errors))


def fits(rows: Sequence[Timing]) -> dict[str, Fit]:
    """Every fit. The three of the claim see softmax alone, as the paper's transformers; that of `plan` sees all."""
    softmax = [row for row in rows if row.softmax]
    return {name: fit(columns, rows if name == "plan" else softmax) for name, columns in FITS.items()}


def verdicts(by_name: Mapping[str, Fit]) -> list[list[str]]:
    """Header and one row a claim of the paper's abstract, judged by the held-out shapes."""
    copies, flops = by_name["copies"], by_name["flops"]
    numbers = f"median error {flops.median_error:.1%} by FLOPs, {copies.median_error:.1%} by copies"
    rows = [
        ("FLOPs are a poor estimate of training time", flops.median_error > POOR, numbers),
        (
            "memory copies are a better one",
            copies.median_error < flops.median_error and copies.r2_held_out > flops.r2_held_out,
            f"R² held out {flops.r2_held_out:.3f} by FLOPs, {copies.r2_held_out:.3f} by copies",
        ),
        (
            "copies give training speed from hyper-parameters",
            copies.median_error <= ACCURATE,
            f"median error {copies.median_error:.1%}, worst {copies.worst_error:.1%}",
        ),
    ]
    return [["claim", "verdict", "numbers"], *([a, "holds" if b else "does not hold", c] for a, b, c in rows)]


def roofline(rows: Sequence[Timing], flops_per_second: float, numbers_per_second: float) -> dict[str, float]:
    """Why one estimate or the other holds here: where the machine's limits would put the softmax steps.

    Args:
        flops_per_second, numbers_per_second: the machine's best matrix product, and numbers read plus written.

    Returns:
        `balance`: FLOPs a number moved above which products take longer than copies. `intensity`: the median step's.
        `product_share`, `copy_share`: medians of the share of a step's measured time that its FLOPs would take at the
        best product's speed, and its copies at the memory's.
    """
    softmax = [row for row in rows if row.softmax]
    share = [row.totals.flops / flops_per_second / row.seconds for row in softmax]
    copies = [row.totals.copies / numbers_per_second / row.seconds for row in softmax]
    return {
        "balance": flops_per_second / numbers_per_second,
        "intensity": statistics.median(row.totals.flops / row.totals.copies for row in softmax),
        "product_share": statistics.median(share),
        "copy_share": statistics.median(copies),
    }


def roofline_text(roof: Mapping[str, float]) -> str:
    """The explanation in two sentences."""
    above = roof["intensity"] > roof["balance"]
    return (
        f"The median step does {roof['intensity']:.0f} FLOPs for every number it moves; this machine multiplies "
        f"{roof['balance']:.0f} times for every number its memory moves, so a perfect program would be limited by "
        f"{'products' if above else 'copies'}. Of the measured time products explain {roof['product_share']:.0%} at "
        f"the speed of the best matrix product, copies {roof['copy_share']:.0%} at the bandwidth of the memory."
    )
