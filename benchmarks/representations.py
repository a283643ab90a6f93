"""Four representations of exp(xᵀy) on every head of SmolLM2-135M, each drawn from its own best distribution.

python benchmarks/representations.py --out benchmarks/records/representations.json

x and y are one set of 128 points of a head: queries and keys behind the sinks, centred and balanced, in equal numbers,
so that the best policy's error is the same for every representation. Squared errors of single draws, a mean over all
pairs of points, over the lower bound. Some minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from darkformer import DarkConfig, convert
from darkformer.calibration.moments import Moments, head_rows
from darkformer.calibration.probe import Probe
from darkformer.diagnostics.estimators import closed_form_map
from darkformer.diagnostics.run import Collector, rounded
from darkformer.features.feature_map import FeatureMap
from darkformer.hf.interface import observing
from darkformer.hf.load import demo_model_path, load_model, load_tokenizer
from darkformer.records import environment, read_json, write_json
from darkformer.research.representations import REPRESENTATIONS, error_over_bound
from darkformer.train.data import load_documents, token_blocks

#: Scales of queries and keys. At 1 a kernel's mean square is nothing beside its best second moment.
SCALES = (0.2, 0.3, 0.5, 1.0)
TOKENS, SINKS, POINTS, DRAWS = 512, 4, 128, 2000


def points_of(fm: FeatureMap, moments: Moments, captured: tuple[Any, ...]) -> Tensor:
    """Queries and keys of every kv head, centred and balanced, (G, POINTS, d)."""
    probe = Probe(*captured, config=DarkConfig.paper(1), tokens=TOKENS, dtype=torch.float64)
    own = closed_form_map(
        DarkConfig.paper(1, center=True, balance=True), moments, layer=fm.layer, heads=captured[0].shape[1]
    )
    generator, halves = torch.Generator().manual_seed(fm.layer), []
    for x in probe.mapped(own.parameters_for(torch.float64)):
        rows = head_rows(x, probe.real & (probe.position >= SINKS))
        halves.append(rows[:, torch.randperm(rows.shape[1], generator=generator)[: POINTS // 2]])
    return torch.cat(halves, 1)


def measured(layer: int, points: Tensor) -> list[dict[str, Any]]:
    """One row a head and scale."""
    rows = []
    for head, x in enumerate(points):
        for scale in SCALES:
            row: dict[str, Any] = {"layer": layer, "head": head, "scale": scale}
            for name in REPRESENTATIONS:
                for way in ("optimal", "naive"):
                    generator = torch.Generator().manual_seed(1000 * layer + head)
                    found = error_over_bound(
                        name, scale * x, optimal=way == "optimal", draws=DRAWS, generator=generator
                    )
                    row[f"{name}_{way}"] = found._asdict()
            rows.append(row)
    return rows


def table(record: dict[str, Any]) -> str:
    """Markdown: a row a scale and representation."""
    lines = [
        "| scale | representation | best draws, mean over heads | heads whose own interval has 1 | N(0, I), median |",
        "|---:|---|---:|---:|---:|",
    ]
    for scale in record["scales"]:
        rows = [row for row in record["rows"] if row["scale"] == scale]
        for name in REPRESENTATIONS:
            best, naive = ([row[f"{name}_{way}"] for row in rows] for way in ("optimal", "naive"))
            held = fmean(abs(x["ratio"] - 1) <= 1.96 * x["standard_error"] for x in best)
            error = sum(x["standard_error"] ** 2 for x in best) ** 0.5 / len(best)
            lines.append(
                f"| {scale:g} | {name} | {fmean(x['ratio'] for x in best):.4f} ± {1.96 * error:.4f} | {held:.0%} | "
                f"{median(x['ratio'] for x in naive):.3g} |"
            )
    warm = [row for row in record["rows"] if row["scale"] == max(record["scales"])]
    rare = sum(row["positive_optimal"]["ratio"] < 0.01 for row in warm)
    note = f"In {rare} of {len(warm)} heads at scale {max(record['scales']):g} one point carries the kernel"
    return "\n".join(
        [*lines, "", f"{note}, and none of {record['draws']:,} draws of the positive features is another's."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="Where to write the record (JSON).")
    options = parser.parse_args()
    path = str(demo_model_path())
    model, tokenizer = load_model(path), load_tokenizer(path)
    blocks = token_blocks(tokenizer, load_documents(["pydoc"]), TOKENS)[:9]
    convert(model, DarkConfig(num_features=1, sinks=SINKS))
    collected, points = Collector(), {}
    with observing(model, collected, softmax=True):
        for batch in blocks[:-1].split(2):
            model(batch, use_cache=False)

    def keep(fm: FeatureMap, *captured: Any) -> None:
        points[fm.layer] = points_of(fm, collected.far[fm.layer], captured[:-1])

    with observing(model, keep, softmax=True):
        model(blocks[-1:], use_cache=False)
    rows = [row for layer in tqdm(sorted(points), desc="layers") for row in measured(layer, points[layer])]
    record = {
        "benchmark": "representations",
        "model": Path(path).name,
        "scales": list(SCALES),
        "points": POINTS,
        "draws": DRAWS,
        "rows": rounded(rows),
        "environment": environment(),
    }
    write_json(options.out, record)
    print(table(read_json(options.out)))


if __name__ == "__main__":
    main()
