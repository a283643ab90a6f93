"""Run folders and JSON records: what ran, with which settings, versions, commit and device."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .errors import DarkformerError, RunFolderError

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
RUN_FILE, RECORD_FILE = "run.json", "record.json"


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


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """A block that takes JSON apart which this library wrote.

    Raises:
        RunFolderError: a field is missing or of another type.
    """
    try:
        yield
    except DarkformerError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{path}: it is not as darkformer wrote it ({type(error).__name__}: {error}). Delete it, and what it holds "
            "is measured again."
        ) from error


def write_kept(path: Path, value: Any) -> None:
    """Writes plain values that a later run takes up again, with their checksum."""
    write_json(path, {"checksum": _checksum(value), "value": value})


def read_kept(path: Path, make: Callable[[Any], Any] = lambda value: value) -> Any:
    """Inverse of `write_kept`: what `make` gives of the value.

    Raises:
        RunFolderError: missing, or anything but what was written; or `make` cannot take the value apart.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("checksum") != _checksum(content.get("value")):
        raise RunFolderError(
            f"{path}: it was altered, or an earlier version of darkformer wrote it. Delete it, and what it holds is "
            "measured again."
        )
    with as_written(path):
        return make(content["value"])


def _checksum(value: Any) -> str:
    """SHA-256 of a value as JSON: the same for what was written and for what is read of it."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


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


def check_file(out: Path) -> None:
    """Refuses an output file that could not be written, before the work rather than after it. Creates nothing.

    Raises:
        RunFolderError: as `check_folder`, or something else than a file is in its place.
    """
    check_folder(out.parent)
    if out.exists() and not out.is_file():
        raise RunFolderError(f"{out} is a folder or a device: give the name of a file (--out).")


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


def finish_run(out: Path, settings: Mapping[str, Any]) -> None:
    """Marks a run as finished, once its record and everything else is written."""
    record = out / RECORD_FILE
    checksum = _checksum(read_json(record)) if record.is_file() else None
    write_json(out / RUN_FILE, {"settings": settings, "finished": True, "record": checksum})


def finished_record(out: Path) -> dict[str, Any] | None:
    """The record of the run that `open_run` found in `out`; None if the run is not finished.

    Raises:
        RunFolderError: run or record is missing, damaged or altered.
    """
    run = _claimed(out)
    if not run["finished"]:
        return None
    record = read_json(out / RECORD_FILE)
    if not isinstance(record, dict) or run.get("record") != _checksum(record):
        raise RunFolderError(
            f"{out / RECORD_FILE}: it was altered after the run, or an earlier version of darkformer made both. "
            "Run again with --overwrite."
        )
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
    for name in (RECORD_FILE, "report.html", "budget.json", "frontier.json", "frontier.png"):
        (out / name).unlink(missing_ok=True)
    for name in ("stages", "checkpoints", "model", "plots", "records", "sensitivity", "frontier", "tables", "text"):
        shutil.rmtree(out / name, ignore_errors=True)
