"""What a recipe brings: its model beside softmax, the exact part alone and features beside it, all trained alike.

python benchmarks/trained_alike.py recipes/smollm2-135m.yaml --out benchmarks/records/trained-alike.json

Every row is one run of `linearize` on the recipe's text in the same order, with its steps, rates and distillation, so
rows differ by their attention alone; rows with features begin with the transfer, which the others have nothing for.
Scored are texts that nobody trained on, by position, and numbers recalled. A row that is finished is not run again, one
that was interrupted goes on, and rows of the record that are not asked for stay as they are. Recovery of the far field
is (exact part's loss - row's loss) / (exact part's loss - softmax's loss).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from darkformer import DarkConfig, TrainConfig, load_model
from darkformer.config import CONTEXT
from darkformer.console import RichReporter
from darkformer.evaluation.recall import RecallTask, recall
from darkformer.hf.load import load_tokenizer
from darkformer.plots import loss_by_position
from darkformer.records import read_json, write_json
from darkformer.research.reproduce.bases import model_folder
from darkformer.train.data import load_documents, token_blocks
from darkformer.train.evaluate import evaluate
from darkformer.train.linearize import linearize

#: Where the models of recipes are found without a hub: names of packages that carry them.
PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2", "google/gemma-3-270m": "gemma3-270m"}
TASK = RecallTask(distances=(512, 1024, 1900), trials=40, numbers=8, batch_size=1)


class Row(NamedTuple):
    """What a row of the table converts to.

    Attributes:
        trained: with everything of the recipe. learns: after a transfer, and with narrower windows in between.
    """

    config: DarkConfig
    budget: str | None = None
    trained: bool = True
    learns: bool = False


def rows_of(recipe: dict[str, Any], window: int, features: int) -> dict[str, Row]:
    """By the name of the row."""
    dark = DarkConfig(window=window, num_features=features, drop_features=False)
    return {
        "softmax": Row(DarkConfig(method="exact")),
        "softmax untrained": Row(DarkConfig(method="exact"), trained=False),
        "recipe": Row(DarkConfig(**recipe["config"]), recipe["budget"]),
        "recipe with features": Row(dark, recipe["budget"], learns=True),
        "exact part": Row(DarkConfig(method="local", window=window)),
        "features": Row(dark, learns=True),
        "features only": Row(replace(dark, window=0, sinks=0), learns=True),
    }


def by_text(model: Any, tokenizer: Any, texts: list[Path], context: int, blocks: int, dtype: str) -> dict[str, Any]:
    """Loss and accuracy, in the mean and of each text, by position too."""
    scores = {}
    for text in texts:
        rows = token_blocks(tokenizer, load_documents([str(text)]), context)[:blocks]
        scores[text.stem] = evaluate(model, rows, dtype=dtype).to_dict()
    mean = {name: sum(x[name] for x in scores.values()) / len(scores) for name in ("loss", "accuracy")}
    return {**mean, "texts": scores}


def scored(model: Any, tokenizer: Any, options: argparse.Namespace, context: int, dtype: str) -> dict[str, Any]:
    """What a row is worth: at the context it was trained at, at a longer one, and what it recalls."""
    common = model, tokenizer, options.texts
    return {
        **by_text(*common, context, options.blocks, dtype),
        "long": {"context": options.long, **by_text(*common, options.long, 1, dtype)} if options.long else None,
        "recall": recall(model, tokenizer, TASK, dtype=dtype),
    }


def softmax_of(rows: dict[str, Any], long: bool = False) -> tuple[dict[str, Any] | None, str]:
    """What rows are compared with, in longer sequences too: softmax's score, trained alike if it is there."""
    for name in ("softmax", "softmax untrained"):
        if name in rows and (found := rows[name]["trained"]["long"] if long else rows[name]["trained"]):
            return found, name
    return None, ""


def table(record: dict[str, Any]) -> str:
    """The rows as a Markdown table; shares are of the softmax model that was trained alike, if there is one."""
    rows = record["rows"]
    (softmax, name), exact = softmax_of(rows), rows.get("exact part", {}).get("trained")
    if softmax is None:
        return ""
    long, of = softmax_of(rows, long=True)
    recalled = f"recalled at {', '.join(str(x['distance']) for x in softmax['recall'])}"
    titles = [
        "trained alike",
        "loss",
        "of softmax's accuracy" if name == "softmax" else f"of {name}",
        *([f"at {long['context']:,} tokens, of {of}"] if long else []),
        *(["recovery of the far field"] if exact else []),
        recalled,
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for name, row in rows.items():
        found = row["trained"]
        cells = [name, f"{found['loss']:.3f}", f"{found['accuracy'] / softmax['accuracy']:.1%}"]
        if long:
            cells.append(f"{found['long']['accuracy'] / long['accuracy']:.1%}" if found["long"] else "")
        if exact:
            share = (exact["loss"] - found["loss"]) / (exact["loss"] - softmax["loss"])
            cells.append("" if name.startswith("softmax") or name == "exact part" else f"{share:.0%}")
        cells.append(" / ".join(f"{x['accuracy']:.0%}" for x in found["recall"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def above(found: dict[str, Any], softmax: dict[str, Any]) -> list[dict[str, Any]]:
    """Loss above softmax's by position, in the mean of the texts."""
    pairs = [(found["texts"][name]["by_position"], x["by_position"]) for name, x in softmax["texts"].items()]
    return [
        {**bucket, "loss": fmean(own[i]["loss"] - theirs[i]["loss"] for own, theirs in pairs)}
        for i, bucket in enumerate(pairs[0][0])
    ]


def draw(record: dict[str, Any], path: Path) -> None:
    """A line a row, and another for longer sequences."""
    rows = {name: row["trained"] for name, row in record["rows"].items()}
    (softmax, name), (long, of) = softmax_of(record["rows"]), softmax_of(record["rows"], long=True)
    rows.pop(name, None)
    if softmax is None or not rows:
        return
    curves = {row: above(found, softmax) for row, found in rows.items()}
    for row, found in rows.items():
        if long and found["long"] and row != of:
            curves[f"{row}, {long['context']:,} tokens, above {of}"] = above(found["long"], long)
    loss_by_position(curves, path, f"loss above {name}'s, nats a token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="Recipe of `darkformer linearize` with a budget.")
    parser.add_argument("--rows", nargs="+", help="Rows; by default all but `features only`.")
    parser.add_argument("--window", type=int, default=256, help="Window of the rows without a budget.")
    parser.add_argument("--features", type=int, default=128, help="Features m of a head.")
    parser.add_argument(
        "--transfer-steps", type=int, default=60, help="Steps of transfer before, of rows with features."
    )
    parser.add_argument("--window-dropout", type=float, default=0.5, help="Share of their steps with narrower windows.")
    parser.add_argument(
        "--texts", nargs="+", type=Path, default=sorted(Path("runs/text").glob("*.txt")),
        help="Scored; benchmarks/frontier_text.py writes those of the record.",
    )  # fmt: skip
    parser.add_argument("--blocks", type=int, default=4, help="Sequences of each scored text.")
    parser.add_argument(
        "--long", type=int, default=8192, help="Tokens of one longer sequence of each text; 0: none is scored."
    )
    parser.add_argument("--work", type=Path, help="Folder of the runs; by default runs/alike/RECIPE.")
    parser.add_argument("--out", type=Path, help="The record (JSON); other rows in it are kept.")
    parser.add_argument("--plot", type=Path, help="Where to draw it: loss above softmax's by position.")
    options = parser.parse_args()
    if not options.texts:
        parser.error("no texts to score: give --texts, or put some into runs/text")
    recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
    known, context = rows_of(recipe, options.window, options.features), recipe.get("context", CONTEXT)
    names = options.rows or [name for name in known if name != "features only"]
    if unknown := set(names) - set(known):
        parser.error(f"no row {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    work, reporter = options.work or Path("runs/alike") / options.recipe.stem, RichReporter()
    source = model_folder(PACKAGED.get(recipe["model"], recipe["model"]), work)
    tokenizer = load_tokenizer(source)
    settings = {name: getattr(options, name) for name in ("window", "features", "transfer_steps", "window_dropout")}
    settings |= {"recipe": recipe, "blocks": options.blocks, "long": options.long}
    record = {"benchmark": "trained_alike", "model": recipe["model"], "rows": {}}
    if options.out and options.out.is_file():
        record |= read_json(options.out)
    if record["model"] != recipe["model"]:
        parser.error(f"{options.out} has rows of {record['model']}: give another --out")
    rows = record["rows"]
    for name in names:
        row = known[name]
        training = TrainConfig(**recipe["train"])
        if not row.trained:
            training = replace(training, steps=0)
        if row.learns:
            learning = {"transfer_steps": options.transfer_steps, "window_dropout": options.window_dropout}
            training = replace(training, **learning)
        folder = work / name.replace(" ", "-")
        run = linearize(
            source, folder, data=recipe["data"], held_out=[str(options.texts[0])], config=row.config, training=training,
            context=context, budget=row.budget, resume=True, reporter=reporter,
        )  # fmt: skip
        file = folder / "scored.json"
        if not file.is_file() or read_json(file)["settings"] != settings:
            found = scored(load_model(str(folder / "model")), tokenizer, options, context, training.dtype)
            write_json(file, {"settings": settings, "trained": found})
        rows[name] = {
            "config": run["converted_config"], "train": asdict(training), "losses": run["losses"],
            "seconds": run["seconds"], "kept_bytes": run["kept_bytes"], **read_json(file),
            "environment": run["environment"],
        }  # fmt: skip
        if options.out:
            write_json(options.out, record)
        print(table(record), flush=True)
        if options.plot:
            draw(record, options.plot)


if __name__ == "__main__":
    main()
