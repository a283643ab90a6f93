"""The claims of the paper's captions, each with a verdict that follows from records by a stated rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from . import figure1, figure5
from .curves import Lines, gap_closed, mean_final, points

#: Accuracies closer than this are equal: about 1.5 standard errors of a paired difference on 4,096 tokens.
NOISE = 0.01
#: Exponents up to and from which a cost counts as linear and as quadratic.
LINEAR, QUADRATIC = 1.2, 1.7
UNFINISHED = "not finished"
Records = Mapping[str, Lines]  # figure → its record's lines; figures without a record are missing


class Verdict(NamedTuple):
    """One claim."""

    letter: str
    claim: str
    verdict: str  # reproduced, partly, not reproduced, not finished; "so far: …" while runs of the plan are missing
    numbers: str


def _judged(conditions: list[bool]) -> str:
    if all(conditions):
        return "reproduced"
    return "partly" if any(conditions) else "not reproduced"


def _bases(lines: Lines) -> list[str]:
    return list(dict.fromkeys(line["base"] for line in lines))


def advantage(lines: Lines, base: str, over: str = "performer") -> float | None:
    """Accuracy of DARK minus that of another method after the last step, means over seeds."""
    own, other = mean_final(lines, base, "dark"), mean_final(lines, base, over)
    return None if own is None or other is None else own - other


def _points_text(value: float) -> str:
    return f"{100 * value:+.1f} points"


def gap(records: Records) -> tuple[str, str]:
    """(a): DARK recovers part of the gap everywhere, and more of it from pretrained weights."""
    top, bottom = records.get("2-top", []), records.get("2-bottom", [])
    first = [(base, gap_closed(top, base), advantage(top, base)) for base in _bases(top)]
    second = [(base, gap_closed(bottom, base), advantage(bottom, base)) for base in _bases(bottom)]
    known = [row for row in (*first, *second) if row[1] is not None]
    scratch, tuned = [row[1] for row in first if row[1] is not None], [row[1] for row in second if row[1] is not None]
    text = "; ".join(f"{base}: {share:+.0%} of the gap ({_points_text(gain or 0)})" for base, share, gain in known)
    if not scratch or not tuned:
        return UNFINISHED, text
    gains = [gain is not None and gain > NOISE for _, _, gain in known]
    return _judged([all(gains), any(gains), sum(tuned) / len(tuned) > sum(scratch) / len(scratch)]), text


def over_lfk(records: Records) -> tuple[str, str]:
    """(b): DARK above LFK when finetuning, not below it from scratch."""
    found = []
    for figure in ("2-top", "2-bottom"):
        lines = records.get(figure, [])
        for base in _bases(lines):
            if (gain := advantage(lines, base, "lfk")) is not None:
                found.append((figure, base, gain))
    text = "; ".join(f"{figure} {base}: {_points_text(gain)}" for figure, base, gain in found)
    if {figure for figure, _, _ in found} != {"2-top", "2-bottom"}:
        return UNFINISHED, text
    return _judged([gain > (NOISE if figure == "2-bottom" else -NOISE) for figure, _, gain in found]), text


def stays_ahead(records: Records) -> tuple[str, str]:
    """(c): above Performer at the last step of figure 3, and at every evaluation of its last three quarters."""
    lines, conditions, texts = records.get("3", []), [], []
    for base in _bases(lines):
        last = advantage(lines, base)
        if last is None:
            continue
        own, other = points(lines, base, "dark"), points(lines, base, "performer")
        late = [s for s in own if s in other and 4 * s >= max(own)]
        gains = [own[s][0]["accuracy"] - other[s][0]["accuracy"] for s in late if 0 in own[s] and 0 in other[s]]
        conditions += [last > NOISE, min(gains, default=last) > 0]
        texts.append(f"{base}: {_points_text(last)} after {max(own)} steps")
    return (_judged(conditions) if conditions else UNFINISHED), "; ".join(texts)


def only_qkv(records: Records) -> tuple[str, str]:
    """(d): the advantage over Performer is larger than with every weight trained, at the end no smaller than midway."""
    lines, whole, conditions, texts = records.get("4", []), records.get("2-bottom", []), [], []
    for base in _bases(lines):
        qkv, every = advantage(lines, base), advantage(whole, base)
        if qkv is None or every is None:
            continue
        steps = points(lines, base, "dark")
        other = points(lines, base, "performer")
        middle = sorted(steps)[len(steps) // 2]
        midway = steps[middle][0]["accuracy"] - other[middle][0]["accuracy"]
        conditions += [qkv > every + NOISE, qkv > NOISE and qkv >= midway - NOISE]
        texts.append(
            f"{base}: {_points_text(qkv)} (every weight: {_points_text(every)}; midway {_points_text(midway)})"
        )
    return (_judged(conditions) if conditions else UNFINISHED), "; ".join(texts)


def stability(records: Records) -> tuple[str, str]:
    """(e): DARK without spikes or divergence at all rates but the largest; Performer with more spikes."""
    lines = records.get("5", [])
    rates = figure5.rates(lines)
    if len(rates) < 7 or any(not figure5.runs(lines, m, r) for m in figure5.TWO for r in rates):
        return UNFINISHED, ""
    counts, unstable = {}, {}
    for method in figure5.TWO:
        runs = figure5.runs(lines, method)
        counts[method] = sum(figure5.spikes(run["losses"]) for run in runs)
        unstable[method] = sorted({run["lr"] for run in runs if run["diverged"] or figure5.spikes(run["losses"])})
    text = "; ".join(
        f"{m}: {counts[m]} spikes, unstable at {', '.join(f'{r:g}' for r in unstable[m]) or 'no rate'}" for m in counts
    )
    calm = all(rate == rates[-1] for rate in unstable["dark"])
    return _judged([calm, counts["performer"] > counts["dark"]]), text


def linear_cost(records: Records) -> tuple[str, str]:
    """(f): time and memory of the features grow linearly, softmax's time quadratically."""
    lines = records.get("1", [])
    if not lines:
        return UNFINISHED, ""
    slopes = figure1.fitted(lines)
    own = {path: found for path, found in slopes.items() if path != "sdpa"}
    text = "; ".join(f"{p}: time L^{s['seconds']:.2f}, memory L^{s['scratch_bytes']:.2f}" for p, s in slopes.items())
    return _judged([
        all(found["seconds"] <= LINEAR for found in own.values()), slopes["sdpa"]["seconds"] >= QUADRATIC,
    ]), text  # fmt: skip


class Claim(NamedTuple):
    """A sentence of the paper's captions, the figures it rests on, and how it is judged."""

    letter: str
    text: str
    figures: tuple[str, ...]
    judge: Callable[[Records], tuple[str, str]]


BOTH = "DARK narrows the gap between exact and Performer in pretraining and finetuning, more in finetuning"
CLAIMS = (
    Claim("a", BOTH, ("2-top", "2-bottom"), gap),
    Claim("b", "DARK outperforms LFK, especially in finetuning", ("2-top", "2-bottom"), over_lfk),
    Claim("c", "DARK stays ahead of Performer in long finetuning", ("3",), stays_ahead),
    Claim("d", "with only q, k, v trained the advantage is larger and does not shrink", ("2-bottom", "4"), only_qkv),
    Claim("e", "DARK is stable at all but the largest learning rate, Performer spikes", ("5",), stability),
    Claim("f", "the cost is linear in the length", ("1",), linear_cost),
)


def verdicts(records: Mapping[str, Any], missing: Mapping[str, Sequence[str]] | None = None) -> list[Verdict]:
    """A verdict for every claim; those whose runs are not all there say so.

    Args:
        missing: figure → bases with planned runs that the records lack.
    """
    found = []
    for claim in CLAIMS:
        verdict, numbers = claim.judge(records)
        lacking = [f"{figure} {base}" for figure in claim.figures for base in (missing or {}).get(figure, ())]
        if lacking:
            verdict = verdict if verdict == UNFINISHED else f"so far: {verdict}"
            numbers = "; ".join([*([numbers] if numbers else []), f"runs missing: {', '.join(lacking)}"])
        found.append(Verdict(claim.letter, claim.text, verdict, numbers))
    return found


def rows(records: Mapping[str, Any], missing: Mapping[str, Sequence[str]] | None = None) -> list[list[str]]:
    """Header and one row a claim."""
    return [["", "claim", "verdict", "numbers"], *([f"({v[0]})", *v[1:]] for v in verdicts(records, missing))]
