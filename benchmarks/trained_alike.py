"""Models of SmolLM2-135M trained alike: softmax, the exact part alone, features beside it, a budget's exact heads.

python benchmarks/trained_alike.py --steps 60 --work runs/alike --out benchmarks/records/trained-alike.json

Every row is one run of `linearize` on the same text in the same order, with the same steps, rates and distillation, so
rows differ by their attention alone; rows with features begin with the transfer, which the others have nothing for.
Scored are texts that nobody trained on, by position, and numbers recalled. A row that is finished is not run again, one
that was interrupted goes on. Recovery of the far field is (exact part's loss - row's loss) / (exact part's loss -
softmax's loss).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from darkformer import DarkConfig, TrainConfig, load_model
from darkformer.console import RichReporter
from darkformer.evaluation.recall import RecallTask, recall
from darkformer.hf.load import demo_model_path, load_tokenizer
from darkformer.records import environment, read_json, write_json
from darkformer.train.data import load_documents, token_blocks
from darkformer.train.evaluate import evaluate
from darkformer.train.linearize import linearize

RECORDS = Path(__file__).parent / "records"
CONTEXT = 2048
TASK = RecallTask(distances=(512, 1024, 1900), trials=40, numbers=8, batch_size=1)


def configurations(window: int, features: int) -> dict[str, DarkConfig]:
    """By the name of the row. The exact heads and windows of the budget are those of the committed frontier."""
    (budget,) = (row for row in read_json(RECORDS / "frontier-smollm2.json")["rows"] if row["name"] == "budget-10")
    exact = DarkConfig(method="local", window=window)
    return {
        "softmax": DarkConfig(method="exact"),
        "exact part": exact,
        "features": DarkConfig(window=window, num_features=features, drop_features=False),
        "features only": DarkConfig(window=0, sinks=0, num_features=features, drop_features=False),
        "budget 10%": DarkConfig.from_dict(budget["config"]),
    }


def by_text(model: Any, tokenizer: Any, texts: list[Path], context: int, blocks: int, dtype: str) -> dict[str, Any]:
    """Loss and accuracy, in the mean and of each text, by position too."""
    scores = {}
    for text in texts:
        rows = token_blocks(tokenizer, load_documents([str(text)]), context)[:blocks]
        scores[text.stem] = evaluate(model, rows, dtype=dtype).to_dict()
    mean = {name: sum(x[name] for x in scores.values()) / len(scores) for name in ("loss", "accuracy")}
    return {**mean, "texts": scores}


def scored(model: Any, tokenizer: Any, options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """What a trained row is worth: at the context it was trained at, at a longer one, and what it recalls."""
    common = model, tokenizer, options.texts
    return {
        **by_text(*common, CONTEXT, options.blocks, dtype),
        "long": {"context": options.long, **by_text(*common, options.long, 1, dtype)} if options.long else None,
        "recall": recall(model, tokenizer, TASK, dtype=dtype),
    }


def table(record: dict[str, Any]) -> str:
    """The rows as a Markdown table; shares are of the softmax model that was trained alike."""
    rows = record["rows"]
    softmax, exact = rows["softmax"]["trained"], rows.get("exact part", {}).get("trained")
    long = softmax.get("long")
    recalled = f"recalled at {', '.join(str(x['distance']) for x in softmax['recall'])}"
    titles = [
        "trained alike",
        "loss",
        "of softmax's accuracy",
        *([f"at {long['context']:,} tokens"] if long else []),
        *(["recovery of the far field"] if exact else []),
        recalled,
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for name, row in rows.items():
        found = row["trained"]
        cells = [name, f"{found['loss']:.3f}", f"{found['accuracy'] / softmax['accuracy']:.1%}"]
        if long:
            cells.append(f"{found['long']['accuracy'] / long['accuracy']:.1%}")
        if exact:
            share = (exact["loss"] - found["loss"]) / (exact["loss"] - softmax["loss"])
            cells.append("" if name in ("softmax", "exact part") else f"{share:.0%}")
        cells.append(" / ".join(f"{x['accuracy']:.0%}" for x in found["recall"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["softmax", "budget 10%", "exact part", "features"], help="Rows.")
    parser.add_argument("--window", type=int, default=256, help="Window of the rows without a budget.")
    parser.add_argument("--features", type=int, default=128, help="Features m of a head.")
    parser.add_argument("--steps", type=int, default=60, help="Steps of 2,048 tokens.")
    parser.add_argument(
        "--transfer-steps", type=int, default=60, help="Steps of transfer before, of rows with features."
    )
    parser.add_argument("--lr", type=float, default=2e-4, help="Peak learning rate of the model's weights.")
    parser.add_argument("--distill", type=float, default=0.9, help="Weight of the softmax model's distribution.")
    parser.add_argument("--window-dropout", type=float, default=0.5, help="Share of steps with narrower windows.")
    parser.add_argument("--data", nargs="+", default=["python"], help="Text to train on.")
    parser.add_argument(
        "--texts", nargs="+", type=Path, default=sorted(Path("runs/text").glob("*.txt")), help="Scored."
    )
    parser.add_argument("--blocks", type=int, default=4, help="Sequences of each scored text.")
    parser.add_argument(
        "--long", type=int, default=8192, help="Tokens of one longer sequence of each text; 0: none is scored."
    )
    parser.add_argument("--work", type=Path, default=Path("runs/alike"), help="Folder of the runs.")
    parser.add_argument("--out", type=Path, help="Where to write the record (JSON).")
    options = parser.parse_args()
    if not options.texts:
        parser.error("no texts to score: give --texts, or put some into runs/text")
    path, reporter = str(demo_model_path()), RichReporter()
    tokenizer = load_tokenizer(path)
    settings = {k: v for k, v in vars(options).items() if k not in ("work", "out", "rows", "texts")}
    known = configurations(options.window, options.features)
    rows: dict[str, Any] = {}
    for name in options.rows:
        config = known[name]
        learns = config.method == "dark" and not config.no_features
        train = TrainConfig(
            transfer_steps=options.transfer_steps if learns else 0, steps=options.steps, lr=options.lr,
            distill=options.distill, window_dropout=options.window_dropout if learns else 0.0,
        )  # fmt: skip
        folder = options.work / name.replace(" ", "-").replace("%", "")
        run = linearize(
            path, folder, data=options.data, held_out=[str(options.texts[0])], config=config, training=train,
            context=CONTEXT, resume=True, reporter=reporter,
        )  # fmt: skip
        file = folder / "scored.json"
        if not file.is_file():
            model = load_model(str(folder / "model"))
            write_json(file, scored(model, tokenizer, options, train.dtype))
        rows[name] = {
            "config": config.to_dict(), "train": asdict(train), "losses": run["losses"], "seconds": run["seconds"],
            "trained": json.loads(file.read_text()),
        }  # fmt: skip
        if options.out and "softmax" in rows:
            record = {"benchmark": "trained_alike", "settings": settings, "rows": rows, "environment": environment()}
            write_json(options.out, record)
            print(table(record), flush=True)


if __name__ == "__main__":
    main()
