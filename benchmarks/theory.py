"""The statements of docs/theory.md in numbers and one picture: formula against what random draws give.

python benchmarks/theory.py --out benchmarks/records/theory.json --plot docs/figures/theory.png

Gaussian data of a few dimensions, fixed seeds, about a minute. The tests of tests/features/ decide whether a
statement holds; this shows it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkformer.diagnostics.bounds import log_lower_bound, log_mean_square, sample_optimal
from darkformer.diagnostics.colder import colder_error
from darkformer.features.proposals import (
    expected_log_moment,
    expected_square,
    log_moment,
    oprf_covariance,
    optimal_covariance,
    theorem32_covariance,
)
from darkformer.features.transforms import symmetric_power
from darkformer.records import environment, read_json, write_json
from darkformer.research.theory_figures import theory_panels

EYE = torch.eye(3, dtype=torch.float64)


class Source:
    """One seeded stream of normal numbers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def spread(low: float, high: float) -> Tensor:
    """A fixed rotated covariance with three eigenvalues from low to high."""
    basis = torch.linalg.qr(Source(7).normal(3, 3))[0]
    return (basis * torch.linspace(low, high, 3, dtype=torch.float64)) @ basis.T


def unbiasedness(runs: int = 2000) -> list[dict[str, float]]:
    """Lemma 2.1: root mean square relative error of m draws, and √((e^L - 1)/m), at one pair with L = 1."""
    source = Source(0)
    z = source.normal(3)
    z = z / z.norm()
    query, key = 0.7 * z, 0.3 * z
    rows = []
    for m in (4, 16, 64, 256, 1024):
        omega = source.normal(runs, m, 3)
        both = (omega @ (query + key) - 0.5 * (query @ query + key @ key)).exp().mean(1)
        relative = both / math.exp(float(query @ key)) - 1
        rows.append({
            "m": m, "measured": float(relative.square().mean().sqrt()), "bias": float(relative.mean()),
            "standard_error": float(relative.std() / runs**0.5), "predicted": math.sqrt((math.e - 1) / m),
        })  # fmt: skip
    return rows


def perturbations(count: int = 100) -> list[dict[str, Any]]:
    """Theorem 3.2: expected second moment at perturbed proposals over that at Σ*, minus 1; two sizes."""
    covariance = spread(0.05, 0.35)
    best = theorem32_covariance(covariance)
    least, root, source = expected_square(best, covariance, covariance), symmetric_power(best, 0.5), Source(1)
    rows = []
    for size in (0.1, 0.3):
        excess = []
        for _ in range(count):
            direction = source.normal(3, 3)
            direction = direction + direction.T
            other = root @ torch.linalg.matrix_exp(size * direction / direction.norm()) @ root
            excess.append(float((expected_square(other, covariance, covariance) - least).expm1()))
        rows.append({"size": size, "excess": sorted(excess)})
    return rows


def importance(pairs: int = 40, draws: int = 200_000) -> list[dict[str, float]]:
    """Proposition 4.1: variances of both estimators of exp(qᵀΣk), measured and in closed form."""
    source, sigma = Source(2), spread(0.5, 1.1)
    query, key = 0.25 * source.normal(pairs, 3), 0.25 * source.normal(pairs, 3)
    root, isotropic = symmetric_power(sigma, 0.5), source.normal(draws, 3)
    log_ratio = 0.5 * isotropic.square().sum(-1) - 0.5 * ((isotropic @ sigma.inverse()) * isotropic).sum(-1)
    log_ratio = log_ratio - 0.5 * torch.linalg.slogdet(sigma).logabsdet
    constant = 0.5 * ((query @ sigma * query) + (key @ sigma * key)).sum(-1)
    expected, z = (query @ sigma * key).sum(-1).exp(), (query + key) @ root
    rows: list[dict[str, float]] = [{} for _ in range(pairs)]
    forms = {"sampled": (isotropic @ root, 0 * log_ratio, EYE), "weighted": (isotropic, log_ratio, sigma.inverse())}
    for name, (omega, weight, proposal) in forms.items():
        values = (omega @ (query + key).T - constant + weight[:, None]).exp() / expected
        predicted = log_moment(proposal, z).exp() - 1
        for row, measured, formula in zip(rows, values.var(0), predicted, strict=True):
            row[f"{name}_measured"], row[f"{name}_predicted"] = float(measured), float(formula)
    return rows


def moments() -> list[dict[str, Any]]:
    """E[L] of every Gaussian proposal for z with one eigenvalue 2λ and two of 0.1 (the paper's exists for λ < ½)."""
    rows = []
    for value in torch.linspace(0.02, 2.0, 60, dtype=torch.float64):
        total = torch.diag(torch.stack([2 * value, value.new_tensor(0.1), value.new_tensor(0.1)]))
        proposals = {"isotropic": EYE, "oprf": oprf_covariance(total), "optimal": optimal_covariance(total)}
        if value < 0.5:
            proposals["theorem32"] = theorem32_covariance(0.5 * total)
        found = {name: float(expected_log_moment(sigma, total)) for name, sigma in proposals.items()}
        rows.append({"lambda": float(value), **found})
    return rows


def equivalence(draws: int = 40_000, points: int = 12) -> list[dict[str, float]]:
    """Expected squared error times m over the lower bound: two representations, sampled optimally and naively."""
    source, rows = Source(3), []
    for scale in (0.2, 0.35, 0.5, 0.65):
        x = scale * source.normal(points, 3)
        bound, kernel = float(log_lower_bound(x, x).exp()), (x @ x.T).exp()
        row: dict[str, float] = {"scale": scale}
        for optimal in (True, False):
            omega = sample_optimal(x, draws, source.generator) if optimal else source.normal(draws, 3)
            log_square = log_mean_square(omega, x)
            growth = x.square().sum(-1)
            weight = (growth.logsumexp(0) - math.log(points) - log_square).exp() if optimal else torch.ones(draws)
            features = (omega @ x.T - 0.5 * growth).exp()
            row.update(_ratio("positive", optimal, features, weight, kernel, bound))
            omega, phase = source.normal(draws, 3), 2 * math.pi * torch.rand(draws, 1, generator=source.generator)
            features = (0.5 * growth).exp() * math.sqrt(2) * (omega @ x.T + phase).cos()
            squares = features.square().mean(1)
            weight = growth.exp().mean() / squares if optimal else torch.ones(draws)
            if optimal:  # draws of p·E φ² by resampling draws of p
                chosen = torch.multinomial(squares, draws, replacement=True, generator=source.generator)
                features, weight = features[chosen], weight[chosen]
            row.update(_ratio("trigonometric", optimal, features, weight, kernel, bound))
        rows.append(row)
    return rows


def _ratio(
    name: str, optimal: bool, features: Tensor, weight: Tensor, kernel: Tensor, bound: float
) -> dict[str, float]:
    estimates = weight[:, None, None] * features[:, :, None] * features[:, None, :]
    errors = (estimates - kernel).square().mean((1, 2)) / bound
    label = f"{name}_{'optimal' if optimal else 'naive'}"
    return {label: float(errors.mean()), f"{label}_standard_error": float(errors.std() / len(errors) ** 0.5)}


def colder(num_features: int = 64, keys: int = 1000, trials: int = 30) -> list[dict[str, float | None]]:
    """Squared error of the output against the geometry's scale: measured, and both predictions (None: infinite)."""
    source = Source(4)
    shape = torch.tensor([0.6, 0.45, 0.3, 0.15], dtype=torch.float64).sqrt()
    query, scales = 0.55 * source.normal(100, 4), (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    predicted = colder_error(query, torch.diag(shape.square()), scales)
    squares, size = torch.zeros(len(scales), trials, dtype=torch.float64), torch.zeros(trials, dtype=torch.float64)
    for trial in range(trials):
        key, value, omega = source.normal(keys, 4) * shape, source.normal(keys, 16), source.normal(num_features, 4)
        exact = (query @ key.T).softmax(-1) @ value
        size[trial] = exact.square().sum()
        for i, s in enumerate(scales):
            log_query, log_key = (s * x @ omega.T - 0.5 * s**2 * x.square().sum(-1)[:, None] for x in (query, key))
            weights = log_query.exp() @ log_key.exp().T
            squares[i, trial] = (weights @ value / weights.sum(-1, keepdim=True) - exact).square().sum()
    relative = squares / size.mean()
    return [
        {
            "scale": s, "measured": float(relative[i].mean()), "standard_error": float(relative[i].std() / trials**0.5),
            "bias": float(predicted.bias[i]), "typical": float(predicted.total(num_features)[i]),
            "first_order": first if math.isfinite(first := float(predicted.upper(num_features)[i])) else None,
        }
        for i, s in enumerate(scales)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="Where to write the record (JSON).")
    parser.add_argument("--plot", type=Path, required=True, help="Where to draw the figure (PNG).")
    options = parser.parse_args()
    record = {"benchmark": "theory"}
    for statement in (unbiasedness, perturbations, importance, moments, equivalence, colder):
        record[statement.__name__] = statement()
        print(statement.__name__, flush=True)
    write_json(options.out, {**record, "environment": environment()})
    theory_panels(read_json(options.out), options.plot)


if __name__ == "__main__":
    main()
