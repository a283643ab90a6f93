"""A package that is missing and one that is there but broken are told apart, by the library and by its commands."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hang import HANG_SECONDS

import darkformer
from darkformer import BrokenPackageError, InputError, MissingExtraError
from darkformer.errors import import_problem

LAZY = "Could not import module 'Trainer'. Are this object's requirements defined correctly?"


def caught(module: str) -> Exception:
    """What importing it raises."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return error
    raise AssertionError(f"{module} can be imported")


def lazily(error: Exception) -> Exception:
    """As transformers' lazy modules hand an error on."""
    try:
        raise ModuleNotFoundError(LAZY) from error
    except ModuleNotFoundError as wrapped:
        return wrapped


def said(error: Exception, kind: type[Exception]) -> str:
    problem = import_problem(error, "the test needs", "pip install it")
    assert type(problem) is kind
    return str(problem)


def test_a_missing_package() -> None:
    error = caught("no_such_package.part")
    for seen in (error, lazily(error), lazily(lazily(error))):
        assert (
            said(seen, MissingExtraError) == "the test needs 'no_such_package', which is not installed: pip install it."
        )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_dependency", "ModuleNotFoundError: No module named 'a_dependency'"),
        ("try:\n    import a_dependency\nexcept ImportError:\n    raise RuntimeError('a GPU')", "RuntimeError: a GPU"),
        ("raise ImportError('libx.so: cannot open')", "ImportError: libx.so: cannot open"),
        ("from json import no_such_name", "ImportError: cannot import name 'no_such_name'"),
        ("def check():\n    raise OSError('half a file')\ncheck()", "OSError: half a file"),
    ],
)  # fmt: skip
def test_a_broken_package(source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    error = caught("broken_package")
    for seen in (error, lazily(error)):
        text = said(seen, BrokenPackageError)
        assert "the test needs 'broken_package', which is installed but broken" in text and reason in text


def test_a_name_that_another_version_has() -> None:
    with pytest.raises(ImportError) as raised:
        from json import no_such_name  # type: ignore[attr-defined]  # noqa: F401
    assert "'json', which is installed but broken" in said(raised.value, BrokenPackageError)


@pytest.mark.parametrize(
    "error",
    [InputError("ours"), AttributeError("a mistake of ours"), ImportError("raised by a function"),
     ImportError("cannot import name", name="darkformer.ops")],
)  # fmt: skip
def test_what_no_other_package_explains_stays_as_it_is(error: Exception) -> None:
    assert import_problem(error, "the test needs", "pip install it") is None


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        (["-c", "import darkformer; darkformer.Redraw"], "BrokenPackageError: darkformer.Redraw needs the package"),
        (["-m", "darkformer.cli", "linearize", "x.gguf", "--out", "r"], "error: this command needs the package"),
    ],
    ids=["library", "command"],
)
def test_a_broken_peft(words: list[str], needs: str, tmp_path: Path) -> None:
    """transformers finds that peft is installed, imports it, and hides why that fails."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("import a_dependency_of_peft\n")
    (tmp_path / "peft-99.0.dist-info").mkdir()
    (tmp_path / "peft-99.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 99.0\n")
    path = os.pathsep.join([str(tmp_path), str(Path(darkformer.__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, *words], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True,
        timeout=HANG_SECONDS,
    )  # fmt: skip
    shown = " ".join(run.stderr.split())  # the console wraps its lines
    assert run.returncode == 1 and f"{needs} 'peft', which is installed but broken." in shown
    assert "No module named 'a_dependency_of_peft'" in shown
    assert words[0] == "-c" or "Traceback" not in shown


def test_a_missing_extra_keeps_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "darkformer.train.redraw", raising=False)
    monkeypatch.delitem(sys.modules, "darkformer.hf.convert", raising=False)
    with pytest.raises(MissingExtraError) as raised:
        darkformer.Redraw  # noqa: B018
    assert str(raised.value) == (
        "darkformer.Redraw needs the package 'transformers', which is not installed: "
        "pip install 'darkformer[all]' (or the extra hf or train)."
    )
