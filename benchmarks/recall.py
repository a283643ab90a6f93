"""Passkey recall of SmolLM2-135M against distance: softmax, the default form, its exact part alone. No finetuning.

python benchmarks/recall.py --trials 10 --out benchmarks/records/recall.json --plot docs/figures/recall.png
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from darkformer import DarkConfig, calibrate, convert
from darkformer.evaluation.recall import RecallTask, recall
from darkformer.hf.load import demo_model_path, load_model, load_tokenizer
from darkformer.plots import recall_against_distance
from darkformer.records import environment, write_json
from darkformer.train.linearize import calibration_batches, load_context_text

FORMS = {
    "softmax": None,
    "default, both parts": DarkConfig(),
    "default, exact part": DarkConfig(method="local"),
    "window 256, both parts": DarkConfig(window=256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10, help="Numbers asked for at each distance.")
    parser.add_argument("--distances", type=int, nargs="+", default=[16, 32, 48, 64, 128, 256, 512])
    parser.add_argument("--out", type=Path, required=True, help="Where to write the record (JSON).")
    parser.add_argument("--plot", type=Path, required=True, help="Where to draw the figure (PNG).")
    options = parser.parse_args()
    path = str(demo_model_path())
    base, tokenizer = load_model(path), load_tokenizer(path)
    blocks, _ = load_context_text(["pydoc"], (), tokenizer, 512)
    task = RecallTask(tuple(options.distances), options.trials)
    models: dict[str, dict[str, Any]] = {}
    for name, config in FORMS.items():
        model = copy.deepcopy(base)
        if config is not None:
            calibrate(convert(model, config), calibration_batches(blocks))
        points = recall(model, tokenizer, task)
        models[name] = {"window": config and config.window, "config": config and config.to_dict(), "recall": points}
        print(name, [(p["distance"], p["accuracy"]) for p in points], flush=True)
    record = {
        "benchmark": "recall", "model": Path(path).name, "recall_task": asdict(task), "models": models,
        "environment": environment(),
    }  # fmt: skip
    write_json(options.out, record)
    recall_against_distance(models, options.plot)


if __name__ == "__main__":
    main()
