"""Features against a wider window of as many bytes, by domain and by position, in SmolLM2-135M within budgets.

python benchmarks/equal_bytes.py runs/frontier/budget.json --out benchmarks/records/equal-bytes.json

For each budget of a record of `darkformer budget`: the model as it was chosen and calibrated, and the same exact heads
without features whose windows are wider by as many keys as the bytes pay for, rounded up. Both are scored on the same
blocks of three kinds of text that nothing was chosen or calibrated on; differences are means over blocks, with their
standard errors. Where calibration left no features the two are one model. What stands in the record is kept.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from heads import CONTEXT, DOMAINS
from torch import Tensor

from darkformer.calibration.budget import Choice, kept_bytes
from darkformer.config import DarkConfig, native_dtype
from darkformer.evaluation.budget import calibration
from darkformer.hf.convert import convert, revert
from darkformer.hf.layers import config_of
from darkformer.hf.load import demo_model_path, load_model, load_tokenizer
from darkformer.records import environment, read_json, write_json
from darkformer.train.data import load_documents, token_blocks
from darkformer.train.evaluate import evaluate
from darkformer.train.linearize import calibration_batches, load_context_text

ELEMENT_BYTES = 2


def scores(model: Any, blocks: Tensor) -> dict[str, list[float]]:
    """Losses of each block by stretch of positions, and whole."""
    found: dict[str, list[float]] = {}
    for block in blocks.split(1):
        score = evaluate(model, block, dtype=native_dtype())
        found.setdefault("all", []).append(score.loss)
        for part in score.by_position:
            found.setdefault(f"{part.start}-{part.stop}", []).append(part.loss)
    return found


def wider(model: Any, config: DarkConfig, size: int, length: int) -> DarkConfig:
    """Without features, and every window wider by the same number of keys, the fewest that take `size` bytes."""
    layers = {layer: window for layer, window in config.layer_windows}
    plain = replace(config, method="local", no_features=())
    more, found = 0, plain
    while kept_bytes(model, found, length, ELEMENT_BYTES) < size:
        more += 1
        found = replace(
            plain, window=config.window + more, layer_windows=tuple((n, w + more) for n, w in layers.items())
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("budgets", type=Path, help="budget.json of a run of `darkformer budget` on pydoc.")
    parser.add_argument("--blocks", type=int, default=6, help="Blocks of 2,048 tokens of each kind of text.")
    parser.add_argument("--out", type=Path, required=True, help="The record (JSON); what is there is kept.")
    options = parser.parse_args()
    source = read_json(options.budgets)
    choices = [(x.pop("budget"), Choice.from_dict(x)) for x in source["choices"]]
    model, tokenizer = load_model(str(demo_model_path())), load_tokenizer(str(demo_model_path()))
    blocks, _ = load_context_text(("pydoc",), (), tokenizer, CONTEXT)
    batches = calibration_batches(blocks)
    texts = {
        name: token_blocks(tokenizer, load_documents([pattern]), CONTEXT)[part][: options.blocks]
        for name, (pattern, part) in DOMAINS.items()
    }
    record = read_json(options.out) if options.out.is_file() else {"benchmark": "equal bytes", "budgets": {}}
    for text, choice in choices:
        if text in record["budgets"] or choice.config.method == "exact":
            continue
        convert(model, choice.config)
        calibration(choices, batches, ELEMENT_BYTES)(model)
        config = config_of(model)
        size = kept_bytes(model, config, choice.length, ELEMENT_BYTES)
        heads = model.config.num_hidden_layers * model.config.num_key_value_heads
        left = heads - len(config.no_features) - len(config.keep_exact)
        found: dict[str, Any] = {"config": config.to_dict(), "bytes": size, "heads_with_features": left}
        if left:
            other = wider(model, config, size, choice.length)
            with_features = {name: scores(model, x) for name, x in texts.items()}
            revert(model)
            convert(model, other)
            without = {name: scores(model, x) for name, x in texts.items()}
            found["wider_window"] = other.to_dict()
            found["wider_bytes"] = kept_bytes(model, other, choice.length, ELEMENT_BYTES)
            found["difference"] = {
                name: {
                    part: {"mean": float(d.mean()), "standard_error": float(d.std() / len(d) ** 0.5), "blocks": len(d)}
                    for part in with_features[name]
                    for d in [torch.tensor(with_features[name][part]) - torch.tensor(without[name][part])]
                }
                for name in texts
            }
        revert(model)
        record["budgets"][text] = found
        record["environment"] = environment()
        write_json(options.out, record)
        print(text, left, found.get("difference"), flush=True)


if __name__ == "__main__":
    main()
