"""Does the diagnosis name the right layers to leave exact? Loss of SmolLM2-135M with those, others, and none.

python benchmarks/keep_exact.py --diagnosis benchmarks/records/smollm2.json --out benchmarks/records/keep-exact.json

The default form, calibrated, no finetuning; held-out text. Compared with the choice of the diagnosis: as many layers
with the least error, and random ones.
"""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path

from darkformer import DarkConfig, calibrate, convert
from darkformer.diagnostics.summary import layer_errors
from darkformer.hf.load import demo_model_path, load_model, load_tokenizer
from darkformer.records import environment, read_json, write_json
from darkformer.train.evaluate import evaluate
from darkformer.train.linearize import calibration_batches, load_context_text


def choices(rows: list[dict], window: str, m: str, count: int, randoms: int) -> dict[str, tuple[int, ...]]:
    """Name → layers left exact."""
    errors = layer_errors(rows, window, m)
    ranked = sorted(errors, key=lambda layer: -errors[layer])
    draw = random.Random(0)
    chosen = {
        "none": (), "greatest error (the diagnosis)": tuple(ranked[:count]), "least error": tuple(ranked[-count:]),
    }  # fmt: skip
    return chosen | {f"random {i + 1}": tuple(draw.sample(ranked, count)) for i in range(randoms)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--diagnosis", type=Path, required=True, help="Record of `darkformer diagnose`.")
    parser.add_argument("--count", type=int, default=3, help="Layers left exact.")
    parser.add_argument("--randoms", type=int, default=3, help="Random choices to compare with.")
    parser.add_argument("--blocks", type=int, default=8, help="Held-out blocks of 512 tokens.")
    parser.add_argument("--out", type=Path, required=True, help="Where to write the record (JSON).")
    options = parser.parse_args()
    diagnosis, path = read_json(options.diagnosis), str(demo_model_path())
    window, m = (str(diagnosis["config"][name]) for name in ("window", "num_features"))
    base = load_model(path)
    blocks, held_out = load_context_text(["pydoc"], (), load_tokenizer(path), 512)
    held_out = held_out[: options.blocks]
    rows = [{"kept": "all (softmax)", "layers": None, **evaluate(base, held_out).to_dict()}]
    for name, layers in choices(diagnosis["rows"], window, m, options.count, options.randoms).items():
        config = DarkConfig(num_features=int(m), window=int(window), keep_exact=tuple(layers))
        model = convert(copy.deepcopy(base), config)
        calibrate(model, calibration_batches(blocks))
        rows.append({"kept": name, "layers": sorted(layers), **evaluate(model, held_out).to_dict()})
        print(rows[-1], flush=True)
    write_json(options.out, {
        "benchmark": "keep_exact", "model": Path(path).name, "blocks": len(held_out), "rows": rows,
        "environment": environment(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
