"""The table of every causal language model in docs/families.md: `python tests/hf/sweep_table.py --write`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # this checkout, whichever one is installed

import torch
import transformers

from hf.sweep import describe, sweep
from hf.tiny_models import MODEL_TYPES, label

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
MARK = "<!-- sweep -->"


def read_table() -> tuple[str, dict[str, str]]:
    """The committed table: the version of transformers it was made with, and class → outcome."""
    _, shown, _ = PAGE.read_text(encoding="utf-8").split(MARK)
    (version,) = re.findall(r"transformers (\d[\w.]*\w)", shown.splitlines()[1])
    rows = re.findall(r"^\| (?!outcome)(\S.*?) \| \d+ \| (.*) \|$", shown, flags=re.M)
    return version, {name: outcome for outcome, names in rows for name in re.findall(r"`(.+?)`", names)}


def make_table() -> str:
    """The outcome of every class, those with one outcome in one row, the largest rows first."""
    rows: dict[str, set[str]] = {}
    for model_type in MODEL_TYPES:
        rows.setdefault(describe(model_type, sweep(model_type)), set()).add(label(model_type))
    order = ["works", "refused", "does not work yet", "not run"]
    ranked = sorted(rows, key=lambda row: (order.index(row.split(":")[0]), -len(rows[row]), row))
    kinds = {kind: sum(len(rows[row]) for row in rows if row.split(":")[0] == kind) for kind in order}
    count = ", ".join(f"{number} {kind}" for kind, number in kinds.items() if number)
    lines = [f"transformers {transformers.__version__}, {len(MODEL_TYPES)} model types, by class: {count}.", ""]
    lines += ["| outcome | number | classes |", "|---|---:|---|"]
    lines += [f"| {row} | {len(rows[row])} | {' '.join(f'`{name}`' for name in sorted(rows[row]))} |" for row in ranked]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/families.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = make_table()
    if arguments.write:
        before, _, after = PAGE.read_text(encoding="utf-8").split(MARK)
        PAGE.write_text(f"{before}{MARK}\n{table}\n{MARK}{after}", encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()
