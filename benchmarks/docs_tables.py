"""Fills the tables of README.md and docs/ from the committed records: `make tables`.

A table lies between two comments that name it, `<!-- frontier -->`. The first may list the columns to show, by their
titles: `<!-- frontier: of softmax; MB at 8k -->`. tests/test_docs.py fails while a page differs from the records.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from darkformer.diagnostics.report import comparison
from darkformer.evaluation.frontier_report import frontier_markdown, frontier_notes
from darkformer.research.bench_targets import measurements_markdown
from darkformer.research.infinite_width.report import TABLES as WIDTH_TABLES
from darkformer.research.infinite_width.report import record_file
from darkformer.research.reproduce.records import read_lines
from darkformer.research.reproduce.session import table_markdown
from darkformer.research.time.analysis import analyse
from darkformer.research.time.report import study_tables
from darkformer.research.time.study import read_study

ROOT = Path(__file__).parents[1]
#: Of `darkformer reproduce width`.
WIDTH = ROOT / "docs" / "reproduction" / "width"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read(name: str) -> dict[str, Any]:
    """One record of benchmarks/records."""
    return json.loads((ROOT / "benchmarks" / "records" / f"{name}.json").read_text(encoding="utf-8"))


def script(name: str) -> dict[str, Any]:
    """The names of another script of this folder, which may import its neighbours."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return runpy.run_path(f"{folder}/{name}.py")
    finally:
        sys.path.remove(folder)


def frontier(record_name: str, columns: list[str]) -> str:
    record = read(record_name)
    table = frontier_markdown(record, columns or None)
    return "\n".join([table, "", *(f"- {note}" for note in frontier_notes(record))])


def diagnosed(_: list[str]) -> str:
    return comparison({"SmolLM2-135M": read("diagnosis-smollm2"), "Gemma 3 270M": read("diagnosis-gemma3")})


def untrained(_: list[str]) -> str:
    return script("untrained")["tables"]({"SmolLM2": read("untrained-smollm2"), "Gemma 3": read("untrained-gemma3")})


def generation(_: list[str]) -> str:
    return script("generation")["table"](read("generation"))


def rankings(_: list[str]) -> str:
    return script("rankings")["table"](read("rankings"))


def trained_alike(name: str, _: list[str]) -> str:
    return script("trained_alike")["table"](read(name))


def drift(_: list[str]) -> str:
    record = read("drift")
    paths = {"native": "`native`, whole", "step": "single steps", "chunked": "`chunked`, whole"}
    lines = [
        f"| {record['tokens']:,} tokens: relative error of the last output | constant stream | random stream |",
        "|---|---:|---:|",
        *(
            f"| {title} | {record['run']['constant'][path]:.1e} | {record['run']['random'][path]:.1e} |"
            for path, title in paths.items()
        ),
        "",
        f"| {record['simulated_tokens']:,} tokens, simulated: error of a total | rounded to nearest | as it is done |",
        "|---|---:|---:|",
    ]
    errors = {(x["tokens_a_join"], x["constant"], x["dithered"]): x["error"] for x in record["simulated"]}
    for size, how in ((1, "a token a time"), (64, "a chunk a time")):
        for constant, stream in ((True, "constant"), (False, "random")):
            plain, done = (errors[size, constant, dithered] for dithered in (False, True))
            lines.append(f"| {how}, {stream} | {plain:.1e} | {done:.1e} |")
    return "\n".join(lines)


def study(name: str, _: list[str]) -> str:
    lines, calibration = read_study(STUDY)
    return table_markdown(study_tables(analyse(lines), lines, calibration)[name])


def infinite_width(name: str, _: list[str]) -> str:
    picture = "![scores, and distance to the limit against width](reproduction/width/plots/width.png)\n\n"
    table = table_markdown(WIDTH_TABLES[name](read_lines(record_file(WIDTH))))
    return picture + table if name == "width-claims" else table


TABLES: dict[str, Callable[[list[str]], str]] = {
    "frontier": partial(frontier, "frontier-smollm2"),
    "frontier-gemma3": partial(frontier, "frontier-gemma3"),
    "diagnosed": diagnosed,
    "untrained": untrained,
    "generation": generation,
    "rankings": rankings,
    "trained-alike": partial(trained_alike, "trained-alike"),
    "trained-alike-gemma3": partial(trained_alike, "trained-alike-gemma3"),
    "far-rank": lambda _: script("far_rank")["table"](read("far-rank")),
    "drift": drift,
    "serving": lambda _: script("serving")["table"](read("serving")),
    "representations": lambda _: script("representations")["table"](read("representations")),
    "bench": lambda _: measurements_markdown(read("bench")),
    "bench-amx": lambda _: measurements_markdown(read("bench-amx")),
    "bench-avx2": lambda _: measurements_markdown(read("bench-avx2")),
}
#: Tables of records that take a quiet machine hours: pages have their places, filled once the records are committed.
STUDY, PLANS = ROOT / "docs" / "reproduction" / "time", ROOT / "benchmarks" / "records" / "plan-check.json"
if (STUDY / "records" / "time.jsonl").is_file():
    TABLES |= {
        f"time-{name}": partial(study, f"time-{name}")
        for name in ("claims", "speed", "law", "predictions", "pairs", "best")
    }
if PLANS.is_file():
    TABLES["plan-check"] = lambda _: script("plan_check")["table"](read("plan-check"))
if record_file(WIDTH).is_file():
    TABLES |= {name: partial(infinite_width, name) for name in WIDTH_TABLES}
SECTION = re.compile(rf"<!-- ({'|'.join(TABLES)})(?:: ([^>]*?))? -->\n(?:.*?\n)??<!-- \1 -->", flags=re.S)


def filled(text: str) -> str:
    """A page with every table as the records have it."""

    def fill(section: re.Match[str]) -> str:
        name, columns = section[1], section[2]
        opening = section[0].partition("\n")[0]
        return f"{opening}\n\n{TABLES[name](columns.split('; ') if columns else []).strip()}\n\n<!-- {name} -->"

    return SECTION.sub(fill, text)


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"filled {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
