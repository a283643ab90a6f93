"""Error of the attention output with no training: every proposal, change of variables, scale, draw and exact part.

python benchmarks/untrained.py MODEL --out benchmarks/records/untrained-NAME.json

Mean over all heads of the relative error at m = 128 on one sequence of 512 tokens; centres, balance and proposals are
closed forms from eight others. A killed run continues with the next layer.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from darkformer import DarkConfig, convert
from darkformer.calibration.moments import HeadProposals, Moments
from darkformer.calibration.probe import Probe
from darkformer.diagnostics.estimators import closed_form_map
from darkformer.diagnostics.run import Collector, rounded
from darkformer.features.feature_map import FeatureMap
from darkformer.hf.interface import observing
from darkformer.hf.load import load_model, load_tokenizer
from darkformer.records import environment, read_json, write_json
from darkformer.train.data import load_documents, token_blocks

PROPOSALS = ("isotropic", "oprf", "optimal")
SCALES = (1.0, 0.7, 0.5, 0.3)
DRAWS = ("iid", "orthogonal", "simplex", "sobol")
#: Window and sinks.
FORMS = {"features": (0, 0), "window": (64, 4)}
FEATURES, TOKENS, MOMENT_BLOCKS = 128, 512, 8


def layer_errors(probe: Probe, moments: dict[str, Moments], layer: int) -> dict[str, list[float]]:
    """ "form/proposal/balanced/draw/scale" → errors of the layer's kv heads."""
    heads, found = probe.q.shape[1] * probe.q.shape[2], {}
    for form, proposal, balanced, draw in itertools.product(FORMS, PROPOSALS, (False, True), DRAWS):
        window, sinks = FORMS[form]
        config = DarkConfig.paper(FEATURES, proposal=proposal, center=balanced, balance=balanced, draw=draw)
        fm = closed_form_map(config, moments[form], layer=layer, heads=heads)
        proposals = HeadProposals(fm, moments[form]) if proposal != "isotropic" else None
        probe.split(DarkConfig(window=window, sinks=sinks))
        for scale in SCALES:
            if proposals is not None:
                proposals.set_(torch.full((fm.num_kv_heads,), scale))
            far = probe.features(fm.parameters_for(torch.float64).scaled(scale))
            none = torch.zeros(fm.num_kv_heads, dtype=torch.float64)
            error = probe.least_error(far) if window else probe.error(far, none)
            found[f"{form}/{proposal}/{'balanced' if balanced else 'raw'}/{draw}/{scale}"] = error.sqrt().tolist()
    probe.split(DarkConfig(window=FORMS["window"][0], sinks=FORMS["window"][1]))
    found["exact part"] = probe.error_exact_part().sqrt().tolist()
    return found


class Runner:
    """Analyses every layer of the probe sequence as it comes by, and writes the record after each."""

    def __init__(self, collected: Collector, record: dict[str, Any], out: Path, bar: Any) -> None:
        self.collected, self.record, self.out, self.bar = collected, record, out, bar

    def __call__(self, fm: FeatureMap, *captured: Any) -> None:
        query, key, value, mask, scaling, _ = captured
        if str(fm.layer) not in self.record["layers"]:
            probe = Probe(
                query, key, value, mask, scaling, config=DarkConfig.paper(1), tokens=TOKENS, dtype=torch.float64
            )
            moments = {"features": self.collected.every[fm.layer], "window": self.collected.far[fm.layer]}
            self.record["layers"][str(fm.layer)] = rounded(layer_errors(probe, moments, fm.layer))
            write_json(self.out, self.record)
        self.bar.update()


@torch.no_grad()
def run(model_name: str, blocks: Tensor, out: Path) -> None:
    """All layers of the model; `out` may hold the first ones already."""
    model = load_model(model_name)
    convert(
        model, DarkConfig(num_features=1, window=FORMS["window"][0], sinks=FORMS["window"][1], convert_sliding=True)
    )
    collected = Collector()
    with observing(model, collected, softmax=True):
        for batch in blocks[:-1].split(2):
            model(batch, use_cache=False)
    record = {
        "benchmark": "untrained", "model": Path(model_name).name, "features": FEATURES, "tokens": TOKENS,
        "forms": FORMS, "environment": environment(), "layers": read_json(out)["layers"] if out.exists() else {},
    }  # fmt: skip
    progress = tqdm(total=len(collected.every), unit="layer")
    with progress as bar, observing(model, Runner(collected, record, out, bar), softmax=True):
        model(blocks[-1:], use_cache=False)
    write_json(out, {**record, "environment": environment()})


def means(record: dict[str, Any]) -> dict[str, float]:
    """Combination → mean error over all heads of all layers."""
    layers = record["layers"].values()
    names = next(iter(layers))
    every = {name: [error for layer in layers for error in layer[name]] for name in names}
    return {name: sum(errors) / len(errors) for name, errors in every.items()}


def _rows(found: list[dict[str, float]], form: str, draw: str) -> Iterator[str]:
    for proposal, side in itertools.product(PROPOSALS, ("raw", "balanced")):
        cells = [f"{f[f'{form}/{proposal}/{side}/{draw}/{s}']:.3f}" for f in found for s in SCALES]
        yield f"| {proposal} | {'centred, balanced' if side == 'balanced' else 'raw'} | {' | '.join(cells)} |"


def tables(records: dict[str, dict[str, Any]]) -> str:
    """Markdown: one table a form at the orthogonal draw, and one of the draws. `records`: model's title → record."""
    found = [means(record) for record in records.values()]
    heads = " | ".join(f"{title}, {s}" for title in records for s in SCALES)
    rule = "|---|---|" + "---|" * (len(SCALES) * len(found))
    parts = []
    for form, title in (("features", "Features alone"), ("window", "Window 64, 4 sinks and features")):
        parts += [f"**{title}**, orthogonal draws", "", f"| proposal | inputs | {heads} |", rule]
        parts += [*_rows(found, form, "orthogonal"), ""]
        if form == "window":
            alone = ", ".join(f"{t} {f['exact part']:.3f}" for t, f in zip(records, found, strict=True))
            parts += [f"Window and sinks without features: {alone}.", ""]
    parts += ["**Draws**, isotropic, centred and balanced, scale 0.5", ""]
    columns = [(t, form) for t in records for form in FORMS]
    parts += ["| draw | " + " | ".join(f"{t}, {'alone' if f == 'features' else 'window'}" for t, f in columns) + " |"]
    parts += ["|---|" + "---|" * len(columns)]
    for draw in DRAWS:
        cells = [f"{f[f'{form}/isotropic/balanced/{draw}/0.5']:.3f}" for f in found for form in FORMS]
        parts += [f"| {draw} | {' | '.join(cells)} |"]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hub id, folder or .gguf file of a decoder.")
    parser.add_argument("--out", type=Path, required=True, help="Where to write the record (JSON).")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    run(options.model, token_blocks(tokenizer, load_documents(("pydoc",)), TOKENS)[: MOMENT_BLOCKS + 1], options.out)


if __name__ == "__main__":
    main()
