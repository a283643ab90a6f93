"""Text that every installation has: Python's own documentation, and the docstrings of what is installed."""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

#: Packages of this library's core, so that every installation has them.
PACKAGES = ("numpy", "torch")
#: Folders without documentation, or with other people's.
SKIPPED = frozenset({"test", "tests", "testing", "idle_test", "lib2to3", "site-packages", "dist-packages", "_vendor"})
#: Characters below which a docstring is a label, not text.
SHORTEST = 80


def pydoc_documents() -> list[str]:
    """The topics of Python's own documentation (`pydoc_data.topics`), in a fixed order."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def module_docstrings(source: bytes) -> list[str]:
    """Docstrings of at least `SHORTEST` characters of a module, its classes and functions; none if it cannot be parsed.

    >>> module_docstrings(b'def f():\\n    "too short"')
    []
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners)]
    return [text for text in found if text and len(text) >= SHORTEST]


def _sources() -> Iterator[Path]:
    """Python files of the standard library and of `PACKAGES`, in a fixed order."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            roots.append(Path(spec.origin).parent)
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if not SKIPPED.intersection(path.relative_to(root).parts):
                yield path


def docstring_documents() -> list[str]:
    """`pydoc_documents`, and one document a module: its docstrings, each text once. About 9 MB, read in half a minute.

    The text depends on the installed versions: a record that rests on it names them, or the text's fingerprint.
    """
    seen: set[str] = set()
    documents = pydoc_documents()
    for path in _sources():
        fresh = [text for text in module_docstrings(path.read_bytes()) if text not in seen]
        seen.update(fresh)
        if fresh:
            documents.append("\n\n".join(fresh))
    return documents
