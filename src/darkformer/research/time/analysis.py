"""What the runs of the study say: the law, its test in tokens and in seconds, and whether wider beats deeper."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .calibration import Calibration
from .copies import step_operations, totals
from .law import LossLaw, Observation, fit_law
from .shape import llama_shape
from .study import DTYPE, FITTED, HEAD_DIM, HELD_OUT, PAIR

Lines = Sequence[Mapping[str, Any]]
#: Relative error of a predicted loss up to which it is accurate: the median of the held-out runs, and the worst.
ACCURATE, WORST = 0.02, 0.05
#: Nats of loss that two seeds of one model differ by: closer losses are equal.
NOISE = 0.01
#: Widths and depths that the best model for a time is chosen from, and those times in seconds.
WIDTHS, DEPTHS, TIMES = (64, 96, 128, 192, 256, 320, 384, 512), (2, 3, 4, 6, 8, 12, 16), (60, 300, 1800)


class Prediction(NamedTuple):
    """A run's loss, and what was expected of it.

    Attributes:
        reached: nats a token. by_tokens: of the law, from its tokens. by_time: from its shape and its seconds alone.
        step, predicted_step: seconds of a step, the median and what the calibration said.
    """

    run: str
    role: str
    parameters: float
    tokens: float
    seconds: float
    reached: float
    by_tokens: float
    by_time: float
    step: float
    predicted_step: float


class PairResult(NamedTuple):
    """A wide and a deep model of one size after one time: mean losses over seeds, expected and reached."""

    pair: str
    wide: str
    deep: str
    predicted: float  # loss of the deep model minus that of the wide one, by the law in time
    reached: float
    seconds: float  # of the wide model over those of the deep one, as measured
    predicted_speed: float  # steps of the wide model for one of the deep one


class Analysis(NamedTuple):
    """Everything that tables and pictures show."""

    law: LossLaw
    predictions: list[Prediction]
    pairs: list[PairResult]
    diverged: list[str]


def _prediction(law: LossLaw, line: Mapping[str, Any]) -> Prediction:
    size, speed = line["parameters"], line["step_tokens"] / line["predicted_step_seconds"]
    return Prediction(
        line["run"], line["role"], size, line["tokens"], line["seconds"], line["loss"],
        law.loss(size, line["tokens"]), law.loss_in_time(size, line["seconds"], speed), line["step_seconds"],
        line["predicted_step_seconds"],
    )  # fmt: skip


def _pair(pair: str, lines: Lines, law: LossLaw) -> PairResult | None:
    wide, deep = ([x for x in lines if x["pair"] == pair and x["deep"] == flag] for flag in (False, True))
    if not wide or len(wide) != len(deep):
        return None

    def mean(rows: Lines, field: str) -> float:
        return statistics.fmean(row[field] for row in rows)

    expected = [law.loss(rows[0]["parameters"], rows[0]["steps"] * rows[0]["step_tokens"]) for rows in (deep, wide)]
    sizes = [f"{rows[0]['hidden']} × {rows[0]['layers']}" for rows in (wide, deep)]
    return PairResult(
        pair=pair,
        wide=sizes[0],
        deep=sizes[1],
        predicted=expected[0] - expected[1],
        reached=mean(deep, "loss") - mean(wide, "loss"),
        seconds=mean(wide, "seconds") / mean(deep, "seconds"),
        predicted_speed=deep[0]["predicted_step_seconds"] / wide[0]["predicted_step_seconds"],
    )


def analyse(lines: Lines) -> Analysis:
    """The law of the fitted runs, and every run beside what is expected of it.

    Raises:
        InputError: too few runs for a law.
    """
    finite = [line for line in lines if line["loss"] is not None]
    fitted = [Observation(x["parameters"], x["tokens"], x["loss"]) for x in finite if x["role"] == FITTED]
    law = fit_law(fitted)
    pairs = [_pair(name, finite, law) for name in dict.fromkeys(x["pair"] for x in finite if x["role"] == PAIR)]
    return Analysis(
        law, [_prediction(law, line) for line in finite], [pair for pair in pairs if pair is not None],
        [line["run"] for line in lines if line["loss"] is None],
    )  # fmt: skip


def errors(predictions: Sequence[Prediction], field: str, role: str = HELD_OUT) -> list[float]:
    """|expected / reached - 1| of the loss, or with `field="step"` of the seconds of a step."""
    rows = [x for x in predictions if not role or x.role == role]
    if field == "step":
        return [abs(x.predicted_step / x.step - 1) for x in rows]
    return [abs(getattr(x, field) / x.reached - 1) for x in rows]


def verdicts(analysis: Analysis) -> list[list[str]]:
    """Header and one row a claim of "Time Matters" that rests on the loss law, judged by rule."""
    rows = []
    by_time, by_tokens = (errors(analysis.predictions, field) for field in ("by_time", "by_tokens"))
    if by_time:
        median = statistics.median(by_time)
        holds = median <= ACCURATE and max(by_time) <= WORST
        numbers = (
            f"{len(by_time)} held-out runs: median error {median:.1%}, worst {max(by_time):.1%} "
            f"(from tokens {statistics.median(by_tokens):.1%})"
        )
        rows.append(("hyper-parameters and time alone give the final loss", holds, numbers))
    if analysis.pairs:
        for claim, field, least in (
            ("analysis predicts that wider is better than deeper", "predicted", 0.0),
            ("wider is better than deeper in the same time", "reached", NOISE),
        ):
            gains = [getattr(pair, field) for pair in analysis.pairs]
            numbers = "; ".join(
                f"{x.wide} against {x.deep}: {gain:+.3f} nats" for x, gain in zip(analysis.pairs, gains, strict=True)
            )
            rows.append((claim, min(gains) > least, numbers))
    table = [[claim, "holds" if holds else "does not hold", numbers] for claim, holds, numbers in rows]
    return [["claim", "verdict", "numbers"], *table]


def best_shapes(
    law: LossLaw, calibration: Calibration, step_tokens: tuple[int, int], vocabulary: int
) -> list[list[str]]:
    """Header and one row a time: the width and depth of least expected loss, chosen analytically.

    Args:
        step_tokens: sequences of a step, and tokens of each.
    """
    rows = [["time", "width × depth", "parameters", "tokens", "expected loss"]]
    for seconds in TIMES:
        options = []
        for hidden in WIDTHS:
            for layers in DEPTHS:
                shape = llama_shape(layers, hidden, vocabulary=vocabulary, head_dim=HEAD_DIM)
                step = calibration.seconds(DTYPE, totals(step_operations(shape, *step_tokens)))
                speed = step_tokens[0] * step_tokens[1] / step
                expected = law.loss_in_time(shape.parameters, seconds, speed)
                options.append((expected, hidden, layers, shape.parameters, seconds * speed))
        expected, hidden, layers, parameters, tokens = min(options)
        rows.append([
            f"{seconds // 60} min", f"{hidden} × {layers}", f"{parameters / 1e6:.1f}M", f"{tokens:,.0f}",
            f"{expected:.3f}",
        ])  # fmt: skip
    return rows
