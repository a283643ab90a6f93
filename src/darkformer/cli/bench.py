"""The verb `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..console import RichReporter
from .terminal import console


def bench(
    out: Annotated[Path, typer.Option("--out", help="Folder of the record and the plots.")] = Path("runs/bench"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Under a minute: only where the crossover is on this machine.")
    ] = False,
    threads: Annotated[int, typer.Option("--threads", help="Threads; 0 leaves torch's own choice.", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the record in the folder.")] = False,
) -> None:
    """Measure this machine, then every attention path on it: speed-up, crossover, share of what is possible.

    Ctrl-C stops; running it again continues with the next point.
    """
    import torch

    from ..plots import speed_up_against_length, time_against_length
    from ..research.bench import Bench, full_plan, quick_plan
    from ..research.bench_targets import targets_markdown

    if threads:
        torch.set_num_threads(threads)
    record = Bench(quick_plan() if quick else full_plan(), out, RichReporter(), overwrite=overwrite).run()
    print_bench(record, console)
    time_against_length(record, out / "time.png")
    speed_up_against_length(record, out / "speedup.png")
    console.print(f"Record: {out / 'record.json'}   plots: {out / 'time.png'}, {out / 'speedup.png'}")
    if not quick:
        (out / "targets.md").write_text(targets_markdown(record), encoding="utf-8")
        console.print(f"Each target beside its value: {out / 'targets.md'}")


def print_bench(record: dict[str, Any], console: Console) -> None:
    """The record as tables: limits, points with their speed-up over softmax, crossovers, decode, end to end."""
    from ..cost import times_as_fast
    from ..research.bench import families

    machine = record["limits"]
    console.print(
        f"This machine, {record['environment']['threads']} threads: "
        f"GEMM {machine['gemm_flops']['float32'] / 1e9:.0f} / {machine['gemm_flops']['bfloat16'] / 1e9:.0f} GFLOP/s "
        f"(float32 / bfloat16), exp {machine['exps_per_second'] / 1e9:.1f} G/s, "
        f"memory {machine['bytes_per_second'] / 1e9:.0f} GB/s"
    )
    for shape, dtype, direction, rows in families(record["points"]):
        title = f"{shape.name}, window {shape.window}: {direction}, {dtype}"
        table = Table("path", title=title, title_justify="left")
        for name in ("tokens", "ms", "IQR", "× softmax", "of bound", "MB"):
            table.add_column(name, justify="right")
        softmax = {row["length"]: row for row in rows if row["path"] == "sdpa"}
        for row in sorted(rows, key=lambda row: row["length"]):
            against = softmax.get(row["length"])
            ratio = float("nan") if against is None else times_as_fast(row, against)
            memory = row["peak_scratch_bytes"]
            table.add_row(
                row["path"], str(row["length"]), f"{1e3 * row['median']:.2f}", f"{1e3 * row['iqr']:.2f}",
                f"{ratio:.2f}", f"{row['fraction_of_bound']:.2f}", "–" if memory is None else f"{memory / 2**20:.0f}",
            )  # fmt: skip
        console.print(table)
    for row in record["crossover"]:
        where = "not reached" if row["tokens"] is None else f"{row['tokens']:.0f} tokens"
        shape = row["shape"]
        console.print(
            f"crossover with softmax: {where} ({row['path']}, {shape['name']}, W {shape['window']}, {row['dtype']}, "
            f"{row['direction']})",
            markup=False,
        )
    for row in record["decode"]:
        console.print(f"decode after {row['length']} tokens: {row['path']} {1e6 * row['median']:.0f} µs a token")
    for row in record["model"]:
        console.print(f"{row['task']}, {row['tokens']} tokens: {row['model']} {row['median']:.3f} s", markup=False)
