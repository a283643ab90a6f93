"""Text in, fixed-length token blocks out."""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, MissingExtraError
from .docstrings import docstring_documents, pydoc_documents

#: The text every machine with Python has: the language reference's topics.
PYDOC = "pydoc"
#: Those and the docstrings of the standard library, numpy and torch: several megabytes on every installation.
PYTHON = "python"
#: Every n-th document is held out for validation.
HOLD_OUT_EVERY = 8


def read_file(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        InputError: it cannot be read, or is not UTF-8 (names the file, the byte and its offset).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8 ({error.reason}): "
            f"convert the file first, e.g. iconv -f latin1 -t utf-8 {path.name}."
        ) from error


def _dataset_documents(name: str, limit: int) -> list[str]:
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtraError(
            f"--data {name}: no such file, and the package 'datasets' that would look it up as a dataset's name is not "
            "installed: pip install 'darkformer[train]'."
        )
    import datasets

    path, _, subset = name.partition(":")
    try:
        stream = datasets.load_dataset(path, subset or None, split="train", streaming=True)
        rows: list[Any] = list(stream.take(limit))
    except Exception as error:  # datasets raises whatever its many back ends raise
        raise InputError(
            f"--data {name}: matches no file, and as a dataset's name it cannot be loaded "
            f"({type(error).__name__}: {error}). Give text files, globs, '{PYDOC}', '{PYTHON}', or NAME[:SUBSET] of a "
            "dataset."
        ) from error
    if not rows or "text" not in rows[0]:
        raise InputError(
            f"--data {name}: its rows have no 'text' column (columns: {', '.join(rows[0]) if rows else ''})."
        )
    return [row["text"] or "" for row in rows]  # a row may hold None; empty documents are dropped later


def load_documents(sources: Sequence[str], limit: int = 20_000) -> list[str]:
    """Documents from text files, globs, `pydoc`, `python`, or a dataset's `NAME` or `NAME:SUBSET` (its column `text`).

    Args:
        limit: rows taken from a streamed dataset.

    Raises:
        InputError: nothing found, unreadable or non-UTF-8 files.
    """
    documents: list[str] = []
    for source in sources:
        if source == PYDOC:
            documents += pydoc_documents()
            continue
        if source == PYTHON:
            documents += docstring_documents()
            continue
        path = Path(source).expanduser()  # a file's own name may hold the characters of a glob
        matches = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if files:
            documents += [read_file(path) for path in files]
        elif matches or any(c in source for c in "*?[") or Path(source).suffix in (".txt", ".md", ".rst", ".py"):
            raise InputError(f"--data {source}: no file matches.")
        else:
            documents += _dataset_documents(source, limit)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"--data {' '.join(sources) or '(none)'}: no text found. Give at least one non-empty file.")
    return documents


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and validation documents: every `HOLD_OUT_EVERY`-th is held out, never both.

    The same text twice (overlapping globs, aliased topics) counts once, so that it cannot be on both sides.
    A single document is cut: its last tenth is held out.
    """
    documents = list(dict.fromkeys(documents))
    if len(documents) == 1:
        cut = len(documents[0]) * 9 // 10
        return [documents[0][:cut]], [documents[0][cut:]]
    every = min(HOLD_OUT_EVERY, len(documents))
    held = range(every - 1, len(documents), every)
    return [d for i, d in enumerate(documents) if i not in held], [documents[i] for i in held]


def token_blocks(
    tokenizer: Any, documents: Iterable[str], seq_len: int, part: str = "the",
    advice: str = "give more text or a smaller --seq-len",
) -> Tensor:  # fmt: skip
    """Tokens of all documents, an end-of-text token after each, cut into blocks.

    Args:
        part, advice: for the error: which text this is, and what to do where it is too short.

    Returns:
        (blocks, seq_len) int64; the rest that does not fill a block is dropped.

    Raises:
        InputError: less than one block (says how many tokens were found and needed).
    """
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    if len(ids) < seq_len:
        raise InputError(f"{part} text has {len(ids)} tokens, one sequence needs {seq_len}: {advice}.")
    return torch.tensor(ids[: len(ids) // seq_len * seq_len]).view(-1, seq_len)
