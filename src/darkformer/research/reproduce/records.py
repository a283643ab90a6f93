"""JSON lines that grow while a run goes on: a process killed in the middle of a line loses that line only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...records import RUN_FILE, read_json, write_text


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a file; none if it does not exist.

    Raises:
        InputError: a line other than the last one is not JSON.
    """
    if not file.is_file():
        return []
    rows, texts = [], file.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(texts):
        if not text:
            continue
        try:
            rows.append(json.loads(text))
        except ValueError as error:
            if number < len(texts) - 1:
                raise InputError(
                    f"{file}, line {number + 1}: not JSON ({error}). Delete the line or the file."
                ) from error
    return rows


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes in one step: the old file or the new one, never half of one."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def recorded(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Name of each finished run → its lines: of the run's own folder, or else of a figure's record.

    So the records alone are enough to go on from: the folders of the runs need not be kept.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((out / "records").glob("figure*.jsonl")):
        for line in read_lines(file):
            if "run" in line:
                found.setdefault(line["run"], []).append(line)
    found = {name: lines for name, lines in found.items() if lines[-1]["kind"] == "run"}
    return found | {file.parent.name: read_lines(file) for file in (out / "stages").glob("*/record.jsonl")}


def unfinished(out: Path, records: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """Figure → bases for which the plan in `out/run.json` has runs that the figure's record lacks."""
    file = out / RUN_FILE
    plan = read_json(file)["settings"] if file.is_file() else {}
    missing: dict[str, list[str]] = {}
    for key in (name.removesuffix(".figure") for name in plan if name.endswith(".figure")):
        figure, base = plan[f"{key}.figure"], plan[f"{key}.base"]
        rates = len(plan[f"{key}.rates"]) if plan[f"{key}.every_rate"] else 1
        wanted = len(plan[f"{key}.methods"]) * len(plan[f"{key}.seeds"]) * rates
        done = {x["run"] for x in records.get(figure, ()) if x["kind"] == "run" and x["base"] == base and not x["grid"]}
        if len(done) < wanted:
            missing.setdefault(figure, []).append(base)
    return missing


def is_writer() -> bool:
    """Whether this process writes files: of several, the first one only."""
    return int(os.environ.get("RANK", 0)) == 0


class Journal:
    """Rows by step, on disk as soon as they are added; a step that is there already is not added again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        rows = read_lines(file)
        self.rows = {row["step"]: row for row in rows}
        if rows and is_writer():
            write_lines(file, rows)  # without the line that a kill cut short

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row with its `step`."""
        if row["step"] in self.rows:
            return
        self.rows[row["step"]] = row
        if is_writer():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")

    def ordered(self) -> list[dict[str, Any]]:
        """Rows by ascending step."""
        return [self.rows[step] for step in sorted(self.rows)]
