"""Fits recover the numbers behind them: time as a linear function, the loss law in tokens and in seconds; verdicts."""

from __future__ import annotations

import pytest

from darkformer import InputError
from darkformer.research.time.analysis import analyse, best_shapes, verdicts
from darkformer.research.time.calibration import Calibration
from darkformer.research.time.copies import Totals, step_operations, totals
from darkformer.research.time.fit import FITS, Timing, fit, fits, roofline, roofline_text
from darkformer.research.time.fit import verdicts as speed_verdicts
from darkformer.research.time.law import LossLaw, Observation, fit_law
from darkformer.research.time.shape import llama_shape
from darkformer.research.time.study import FITTED, HELD_OUT, PAIR, Run, Study, laptop_study

LAW = LossLaw(1.7, 60.0, 120.0, 0.33, 0.37)


def timed(by_copies: float, by_flops: float) -> list[Timing]:
    """Steps of many shapes on a machine with these seconds a number and a FLOP; three wider ones are held out."""
    rows = []
    for hidden in (64, 96, 128, 192, 512, 640, 768):
        for layers, size in ((2, (1, 512)), (5, (2, 128))):
            result = totals(step_operations(llama_shape(layers, hidden, vocabulary=512, head_dim=32), *size))
            rows.append(Timing(result, by_copies * result.copies + by_flops * result.flops + 1e-3, hidden > 500, True))
    return rows


def calibration(seconds_a_number: float) -> Calibration:
    """A machine that only copies."""
    speed = {**dict.fromkeys(FITS["plan"], 0.0), "moved": seconds_a_number, "constant": 0.0}
    return Calibration({}, {}, {"float32": speed}, {})


def test_fits_recover_the_machine() -> None:
    rows = timed(2e-9, 3e-11)
    both = fit(FITS["both"], rows)
    assert both.coefficients == pytest.approx({"copies": 2e-9, "flops": 3e-11, "constant": 1e-3}, rel=1e-6)
    assert both.worst_error < 1e-6 and both.r2_held_out > 0.999999
    # On a machine limited by its memory, FLOPs mislead where widths differ; on one limited by products, copies do.
    memory, products = fits(timed(2e-9, 0.0)), fits(timed(0.0, 3e-11))
    assert memory["copies"].worst_error < 1e-6 < 0.1 < memory["flops"].median_error
    assert products["flops"].worst_error < 1e-6 < 0.1 < products["copies"].median_error
    assert [row[1] for row in speed_verdicts(memory)[2:]] == ["holds", "holds"]
    assert [row[1] for row in speed_verdicts(products)[1:]] == ["does not hold"] * 3


def test_a_step_that_was_disturbed_does_not_bend_the_fit() -> None:
    rows = timed(2e-9, 3e-11)
    rows[3] = rows[3]._replace(seconds=9 * rows[3].seconds)
    both = fit(FITS["both"], rows)
    assert both.coefficients["copies"] == pytest.approx(2e-9, rel=0.05)
    assert both.coefficients["flops"] == pytest.approx(3e-11, rel=0.05) and both.worst_error < 0.05


def test_no_cause_saves_time() -> None:
    rows = [Timing(Totals(x, 0, y, 0, 0, 0), x - 0.01 * y, False, True) for x, y in ((1, 9), (2, 8), (3, 1), (4, 9))]
    result = fit(FITS["both"], [*rows, rows[0]._replace(held_out=True)])
    assert min(result.coefficients.values()) >= 0 and result.coefficients["flops"] == 0


def test_the_roofline_says_which_side() -> None:
    rows = timed(2e-9, 3e-11)
    result = roofline(rows, flops_per_second=1e11, numbers_per_second=1e9)
    assert result["balance"] == 100 and 0 < result["copy_share"] < 1 and 0 < result["product_share"] < 1
    assert "limited by copies" in roofline_text(result)
    assert "limited by products" in roofline_text(roofline(rows, 1e9, 1e11))


def observations(noise: float = 0.0) -> list[Observation]:
    sizes, lengths = (3e5, 6e5, 1.2e6, 2.5e6, 5e6), (2e5, 5e5, 1.3e6)
    return [
        Observation(n, d, LAW.loss(n, d) * (1 + noise * (-1) ** (i + j)))
        for i, n in enumerate(sizes)
        for j, d in enumerate(lengths)
    ]


def test_the_law_is_recovered() -> None:
    result = fit_law(observations())
    for n, d in ((4e5, 3e5), (2e7, 1e7)):  # inside, and far outside
        assert result.loss(n, d) == pytest.approx(LAW.loss(n, d), rel=2e-3)
    assert result.alpha == pytest.approx(LAW.alpha, abs=0.02) and result.beta == pytest.approx(LAW.beta, abs=0.02)
    noisy = fit_law(observations(0.003))
    assert noisy.loss(1e6, 1e6) == pytest.approx(LAW.loss(1e6, 1e6), rel=5e-3)
    # One bad run does not bend it.
    spoilt = observations()
    spoilt[7] = spoilt[7]._replace(loss=1.3 * spoilt[7].loss)
    assert fit_law(spoilt).loss(1e6, 4e5) == pytest.approx(LAW.loss(1e6, 4e5), rel=0.02)


def test_the_law_in_time() -> None:
    assert LAW.loss_in_time(1e6, seconds=50.0, tokens_per_second=2e4) == LAW.loss(1e6, 1e6)
    assert LAW.loss_in_time(1e6, 60.0, 2e4) < LAW.loss_in_time(1e6, 50.0, 2e4) < LAW.loss_in_time(1e6, 50.0, 1e4)


@pytest.mark.parametrize("rows", [observations()[:5], [x._replace(tokens=1e5) for x in observations()]])
def test_too_few_runs_for_a_law(rows: list[Observation]) -> None:
    with pytest.raises(InputError, match="two sizes and two lengths"):
        fit_law(rows)


def lines(wide_gain: float, slower: float = 1.0) -> list[dict]:
    """A study whose runs follow `LAW`, the pairs' wide models being better by `wide_gain` nats.

    Args:
        slower: factor of the seconds that held-out runs take beyond what was predicted.
    """
    study, rows = laptop_study(), []
    for run in study.runs:
        size = study.shape(run).parameters
        steps, step = run.tokens // study.step_tokens, size * 1e-7
        gain = wide_gain if run.role == PAIR and not run.deep else 0.0
        rows.append({
            "run": run.name, **vars(run), "parameters": size, "steps": steps, "tokens": run.tokens,
            "step_tokens": study.step_tokens, "predicted_step_seconds": step, "step_seconds": step,
            "seconds": run.tokens / study.step_tokens * step * (slower if run.role == HELD_OUT else 1.0),
            "loss": LAW.loss(size, run.tokens) - gain,
        })  # fmt: skip
    return rows


def test_verdicts_of_the_study() -> None:
    result = analyse(lines(0.05))
    assert len(result.pairs) == 3 and all(pair.reached == pytest.approx(0.05, abs=0.02) for pair in result.pairs)
    assert verdicts(result)[1][1] == verdicts(result)[3][1] == "holds"
    assert verdicts(analyse(lines(-0.05)))[3][1] == "does not hold"
    # Runs that take three times what was predicted have their loss predicted from too many tokens.
    assert verdicts(analyse(lines(0.05, slower=3.0)))[1][1] == "does not hold"


def test_runs_that_are_missing_or_diverged_are_left_out() -> None:
    rows = lines(0.05)
    rows[0]["loss"] = None
    partial = [row for row in rows if row["role"] == FITTED]
    result = analyse(partial)
    assert result.diverged == [rows[0]["run"]] and len(result.predictions) == len(partial) - 1
    assert not result.pairs and len(verdicts(result)) == 1  # nothing to judge yet


def test_a_machine_that_only_copies_prefers_what_copies_least() -> None:
    small = best_shapes(LAW, calibration(1e-6), (4, 256), 1024)
    large = best_shapes(LAW, calibration(1e-9), (4, 256), 1024)
    sizes = [[float(row[2].removesuffix("M")) for row in rows[1:]] for rows in (small, large)]
    assert all(a == sorted(a) for a in sizes)  # more time, more parameters
    assert all(a <= b for a, b in zip(*sizes, strict=True)) and sizes[0] != sizes[1]


def test_the_plan_of_the_study() -> None:
    study = laptop_study()
    assert 24 <= len(study.runs) <= 40 and len({run.name for run in study.runs}) == len(study.runs)
    sizes = [study.shape(run).parameters for run in study.runs]
    assert min(sizes) > 0.25e6 and max(sizes) < 6.5e6
    for pair in {run.pair for run in study.runs} - {""}:
        deep, wide = (
            {study.shape(x).parameters for x in study.runs if x.pair == pair and x.deep == flag}
            for flag in (True, False)
        )
        assert max(wide) / min(deep) == pytest.approx(1, abs=0.1)
    short = study.shortened(20)
    assert max(run.tokens for run in short.runs) == 20 * study.step_tokens
    assert len({run.tokens for run in short.runs if run.role == FITTED}) >= 2


def test_a_run_says_what_it_is() -> None:
    assert Run(64, 2, 1000, FITTED).name == "fit.1000.64x2.seed0"
    assert Study((Run(64, 2, 1000, FITTED),)).settings()["runs"][0]["hidden"] == 64
