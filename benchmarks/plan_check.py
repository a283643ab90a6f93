"""What `darkformer plan` says of three runs of SmolLM2-135M beside the time that they take.

    python benchmarks/plan_check.py --out runs/plan-check

Each run has a folder of its own and is not repeated; it is planned anew each time. The record is
benchmarks/records/plan-check.json. The machine has to be calibrated: `darkformer plan calibrate`.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from darkformer.config import DarkConfig, TrainConfig
from darkformer.console import RichReporter
from darkformer.hf.load import demo_model_path, load_config
from darkformer.records import environment, read_json, write_json
from darkformer.research.time.calibration import load_calibration
from darkformer.research.time.estimate import Estimate, estimate
from darkformer.research.time.settings import PlanTask
from darkformer.research.time.shape import shape_of
from darkformer.train.linearize import linearize

RECORD = Path(__file__).parent / "records" / "plan-check.json"
#: Short and long sequences, with and without a choice of heads, with and without transfer.
TASKS = {
    "short": PlanTask(context="512", tokens="30k", budget="none"),
    "long": PlanTask(context="4k", tokens="80k", transfer_steps=8, budget="none"),
    "budget": PlanTask(context="2k", tokens="20k", budget="10%"),
}
MODEL = "SmolLM2-135M"


class StageClock(RichReporter):
    """A reporter that keeps the seconds of each stage by its title."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Any]:
        started = time.perf_counter()
        with super().stage(title, total) as advance:
            yield advance
        self.seconds[title] = time.perf_counter() - started


def planned(task: PlanTask) -> Estimate:
    """What the machine's calibration says of a run."""
    config = load_config(str(demo_model_path()))
    return estimate(
        shape_of(config, MODEL), task, DarkConfig(), load_calibration(), positions=config.max_position_embeddings,
        name=MODEL,
    )  # fmt: skip


def measured(task: PlanTask, folder: Path) -> dict[str, Any]:
    """The seconds of a run's stages."""
    clock = StageClock()
    linearize(
        str(demo_model_path()), folder, data=["python"], config=DarkConfig(), context=task.sequence,
        budget=task.budget,
        training=TrainConfig(
            steps=task.steps, seq_len=task.sequence, batch_size=1, dtype=task.precision,
            transfer_steps=task.transfer_steps,
        ),
        overwrite=True, reporter=clock,
    )  # fmt: skip
    return {"measured": clock.seconds, "environment": environment()}


def table(record: dict[str, Any]) -> str:
    """Markdown: a row a run, its training and all of its stages, planned and measured."""
    lines = [
        "| run | training, planned | measured | all stages, planned | measured | off by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["runs"]:
        task, cells = row["task"], []
        for part in ("finetune", ""):
            both = [sum(s for title, s in row[of].items() if part in title) for of in ("planned", "measured")]
            cells += [f"{x:.0f} s" for x in both]
        extra = f", budget {task['budget']}" if task["budget"] else ""
        extra += f", {task['transfer_steps']} steps of transfer" if task["transfer_steps"] else ""
        what = f"{task['context']} context, {task['tokens']} tokens{extra}"
        lines.append(f"| {what} | {' | '.join(cells)} | {both[0] / both[1] - 1:+.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/plan-check"), help="Folder of the runs.")
    out = parser.parse_args().out
    rows = []
    for name, task in TASKS.items():
        file, plan = out / f"{name}.json", planned(task)
        if not file.is_file():
            write_json(file, measured(task, out / name))
        kept = read_json(file)
        stages = {stage.title: stage.seconds for stage in plan.stages}
        rows.append({
            "name": name, "task": vars(task), "planned": stages, "planned_memory": plan.memory,
            "measured": {title: kept["measured"][title] for title in stages}, "environment": kept["environment"],
        })  # fmt: skip
    record = {"model": MODEL, "runs": rows, "environment": environment()}
    write_json(RECORD, record)
    print(table(record))


if __name__ == "__main__":
    main()
