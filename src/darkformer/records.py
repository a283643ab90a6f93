"""Run folders and JSON records: what ran, with which settings, versions, commit and device."""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .errors import RunFolderError

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
RUN_FILE = "run.json"


def _commit() -> str | None:
    """The source tree's commit, with `+changes` if files differ from it; None outside a git checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", str(Path(__file__).resolve())) is None:
        return None  # installed inside somebody else's repository
    commit = git("rev-parse", "--short=12", "HEAD")
    return None if commit is None else commit + ("+changes" if git("status", "--porcelain", "-uno") else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _peak_memory() -> int | None:
    """Resident high-water mark of this process; None where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment() -> dict[str, Any]:
    """Versions, commit, device, date and the process's peak memory so far, for a record."""
    versions = {"darkformer": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "versions": versions,
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": _peak_memory(),
    }


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def write_text(path: Path, text: str) -> None:
    """Writes in one step: a killed run leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _part(path)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Inverse of `write_json`.

    Raises:
        RunFolderError: missing, damaged, or altered into something that is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}): missing, cut short or altered. "
            "Run again with --overwrite, or into another folder (--out)."
        ) from error


def check_folder(out: Path) -> None:
    """Refuses an output folder that could not be written, before the work rather than after it. Creates nothing.

    Raises:
        RunFolderError: a file in its place or above it, no permission, or a name that the file system does not take.
    """
    for folder in (out, *out.parents):
        try:
            kind = folder.stat().st_mode
        except FileNotFoundError:
            if folder.is_symlink():
                raise RunFolderError(f"{out}: {folder} is a link to a place that is not there.") from None
            continue
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{out}: no such folder can be there: {getattr(error, 'strerror', error)}.") from error
        if not stat.S_ISDIR(kind):
            raise RunFolderError(f"{out}: {folder} is a file, not a folder.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RunFolderError(f"{out}: no permission to write into {folder}.")
        return


def _claimed(out: Path) -> dict[str, Any]:
    """What `open_run` and the end of a run wrote.

    Raises:
        RunFolderError: the file is damaged or altered.
    """
    run = read_json(out / RUN_FILE)
    if not (isinstance(run, dict) and isinstance(run.get("settings"), dict) and isinstance(run.get("finished"), bool)):
        raise RunFolderError(
            f"{out / RUN_FILE}: it lacks `settings` or `finished`: it was altered. Run again with --overwrite, "
            "or into another folder (--out)."
        )
    return run


def finished_record(out: Path, fields: Collection[str]) -> dict[str, Any] | None:
    """The record of the run that `open_run` found in `out`; None if the run is not finished.

    Args:
        fields: what the record must have.

    Raises:
        RunFolderError: run or record is missing, damaged or altered.
    """
    if not _claimed(out)["finished"]:
        return None
    record = read_json(out / "record.json")
    if not isinstance(record, dict) or (missing := [name for name in fields if name not in record]):
        lacks = f"it lacks {', '.join(missing)}" if isinstance(record, dict) else "it is no record"
        raise RunFolderError(f"{out / 'record.json'}: {lacks}: it was altered. Run again with --overwrite.")
    return record


def open_run(out: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Claims `out` for a run with `settings`.

    Returns:
        True if a run with the same settings is there and continues.

    Raises:
        RunFolderError: the folder holds something else and neither flag says what to do with it, or it cannot be
            written.
    """
    check_folder(out)
    settings = json.loads(json.dumps(settings))
    run_file = out / RUN_FILE
    part = _part(run_file)  # of a run that was killed while it claimed the folder
    if not out.exists() or all(x == part for x in out.iterdir()):
        write_json(run_file, {"settings": settings, "finished": False})
        return False
    if not run_file.is_file():
        raise RunFolderError(f"{out} is not empty and holds no run of darkformer: choose another folder with --out.")
    if overwrite:
        _clear(out)
        write_json(run_file, {"settings": settings, "finished": False})
        return False
    if not resume:
        raise RunFolderError(f"{out} holds a run: --resume continues it, --overwrite deletes it, --out avoids it.")
    before = _claimed(out)["settings"]
    changed = [k for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
    if changed:
        rows = ", ".join(f"{k}: {before.get(k)!r} there, {settings.get(k)!r} now" for k in changed)
        raise RunFolderError(f"{out} holds a run with other settings ({rows}): repeat them, or use --overwrite.")
    return True


def _clear(out: Path) -> None:
    """Deletes what runs of this library write, and nothing else; not `RUN_FILE`, which shows that they wrote it."""
    for name in ("record.json", "report.html", "budget.json", "frontier.json", "frontier.png"):
        (out / name).unlink(missing_ok=True)
    for name in ("stages", "checkpoints", "model", "plots", "records", "sensitivity", "frontier", "tables", "text"):
        shutil.rmtree(out / name, ignore_errors=True)
