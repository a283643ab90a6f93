"""Text in, fixed-length token blocks out. Neither a large file nor its tokens need to fit into memory."""

from __future__ import annotations

import codecs
import glob
import hashlib
import importlib.util
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..calibration.rows import prefix_of
from ..errors import InputError, MissingExtraError
from ..reporting import Progress
from .installed_text import docstring_documents, pydoc_documents

#: The text every machine with Python has: the language reference's topics.
PYDOC = "pydoc"
#: Those and the docstrings of the standard library, numpy and torch: several megabytes on every installation.
PYTHON = "python"
#: Every n-th document is held out for validation.
HOLD_OUT_EVERY = 8


#: Files above this many bytes are read piece by piece, whenever their text is needed.
LARGE_FILE = 8 * 2**20
#: Characters that are tokenized at once: a tokenizer takes some 250 bytes a token while it works.
PIECE = 2**20
#: Characters on both sides of a cut that must give the same tokens with and without it, and cuts that are tried.
CUT_CONTEXT, CUTS_TRIED = 256, 32
#: Tokens that are kept in memory; more of them go to a temporary file that is mapped into memory.
TOKENS_IN_MEMORY = 2**23


@dataclass(frozen=True)
class LargeText:
    """Bytes `start` to `stop` of a UTF-8 file, read anew whenever they are needed. Equal texts are equal."""

    digest: str
    path: Path = field(compare=False)
    start: int = field(compare=False)
    stop: int = field(compare=False)

    def chunks(self) -> Iterator[str]:
        """The text in order, in strings of at most `PIECE` characters."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        for data in _byte_chunks(self.path, self.start, self.stop):
            yield decoder.decode(data)

    def divided(self, share: float) -> tuple[LargeText, LargeText]:
        """The first `share` of the bytes, to the end of a character, and the rest."""
        cut = self.start + int((self.stop - self.start) * share)
        with self.path.open("rb") as file:
            file.seek(cut)
            following = file.read(4)
        cut += next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)  # not inside a character
        parts = ((self.start, cut), (cut, self.stop))
        first, rest = (LargeText(f"{self.digest} {a - self.start}-{b - self.start}", self.path, a, b) for a, b in parts)
        return first, rest


#: What text is made of: one document's text, or where it stands.
Document = str | LargeText
_Document = TypeVar("_Document", bound=Document)


def _byte_chunks(path: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Bytes of a file, at most `PIECE` at a time.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            while data := file.read(PIECE if stop is None else min(PIECE, stop - file.tell())):
                yield data
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error


def read_file(path: Path) -> Document:
    """A UTF-8 text file: its text, or for a large one where it stands. All of it is read and checked here.

    Raises:
        InputError: it cannot be read, or is not UTF-8 (names the file, the byte and its offset).
    """
    decoder, digest, size = codecs.getincrementaldecoder("utf-8")(), hashlib.blake2b(), 0
    small: list[str] = []
    blank = True
    pending = b""  # the start of a character whose end is in the next chunk
    for data in itertools.chain(_byte_chunks(path), [b""]):
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: byte 0x{error.object[error.start]:02x} at offset {size - len(pending) + error.start} is not "
                f"UTF-8 ({error.reason}): convert the file first, e.g. iconv -f latin1 -t utf-8 {path.name}."
            ) from error
        pending = decoder.getstate()[0]
        size += len(data)
        digest.update(data)
        blank = blank and not text.strip()
        if size <= LARGE_FILE:
            small.append(text)
        else:
            small.clear()
    if size <= LARGE_FILE or blank:
        return "".join(small)
    return LargeText(digest.hexdigest(), path, 0, size)


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


def _matches(pattern: Path) -> list[str]:
    """What a glob matches. `**` enters every folder once: links that form loops would lead into it again and again."""
    parts = pattern.parts
    if "**" not in parts:
        return glob.glob(str(pattern))
    at = parts.index("**")
    rest = Path(*itertools.dropwhile("**".__eq__, parts[at:]))
    rest = Path("*") if rest == Path() else rest
    found: list[str] = []
    entered: set[str] = set()
    for start in glob.glob(str(Path(*parts[:at]))):
        for folder, inner, _ in os.walk(start, followlinks=True):
            if (real := os.path.realpath(folder)) in entered:
                inner.clear()
                continue
            entered.add(real)
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            found += _matches(Path(glob.escape(folder)) / rest)
    return found


def load_documents(sources: Sequence[str], limit: int = 20_000) -> list[Document]:
    """Documents from text files, globs, `pydoc`, `python`, or a dataset's `NAME` or `NAME:SUBSET` (its column `text`).

    Args:
        limit: rows taken from a streamed dataset.

    Raises:
        InputError: nothing found, unreadable or non-UTF-8 files.
    """
    documents: list[Document] = []
    for source in sources:
        if source == PYDOC:
            documents += pydoc_documents()
            continue
        if source == PYTHON:
            documents += docstring_documents()
            continue
        path = Path(os.path.expanduser(source))
        # A file's own name may hold the characters of a glob.
        matches = [str(path)] if os.path.isfile(path) else sorted(_matches(path))
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if files:
            documents += [read_file(path) for path in files]
        elif matches or any(c in source for c in "*?[") or Path(source).suffix in (".txt", ".md", ".rst", ".py"):
            raise InputError(f"--data {source}: no file matches.")
        else:
            documents += _dataset_documents(source, limit)
    documents = [document for document in documents if isinstance(document, LargeText) or document.strip()]
    if not documents:
        raise InputError(f"--data {' '.join(sources) or '(none)'}: no text found. Give at least one non-empty file.")
    return documents


def load_texts(sources: Sequence[str], limit: int = 20_000) -> list[str]:
    """`load_documents` with every text in memory."""
    documents = load_documents(sources, limit)
    return [x if isinstance(x, str) else "".join(x.chunks()) for x in documents]


def split_documents(documents: Sequence[_Document]) -> tuple[list[_Document], list[_Document]]:
    """Training and validation documents: every `HOLD_OUT_EVERY`-th is held out, never both.

    The same text twice (overlapping globs, aliased topics) counts once, so that it cannot be on both sides.
    A single document is cut: its last tenth is held out.
    """
    documents = list(dict.fromkeys(documents))
    if len(documents) == 1:
        only: Any = documents[0]
        if isinstance(only, LargeText):
            parts: Any = only.divided(0.9)
        else:
            cut = len(only) * 9 // 10
            parts = only[:cut], only[cut:]
        return [parts[0]], [parts[1]]
    every = min(HOLD_OUT_EVERY, len(documents))
    held = range(every - 1, len(documents), every)
    return [d for i, d in enumerate(documents) if i not in held], [documents[i] for i in held]


def _pieces(document: Document, piece: int, ids_of: Callable[[str], list[int]]) -> Iterator[str]:
    """The document's text in strings of about `piece` characters, cut where that changes no token."""
    if isinstance(document, str) and len(document) <= 2 * piece:
        yield document
        return
    rest = ""
    for chunk in [document] if isinstance(document, str) else document.chunks():
        rest += chunk
        start = 0
        while len(rest) - start > 2 * piece:
            stop = _cut(rest, start + piece, start + 2 * piece, ids_of)
            yield rest[start:stop]
            start = stop
        rest = rest[start:]
    yield rest


def _cut(text: str, first: int, last: int, ids_of: Callable[[str], list[int]]) -> int:
    """A place from `first` on to cut the text at: behind a line or before a space, if that changes no token there."""

    def candidates() -> Iterator[int]:
        for i in range(first, last):
            # Blanks before a line's end would become another token at the end of a text.
            if text[i - 1] == "\n" and not text[i].isspace() and not text[i - 2].isspace():
                yield i
        for i in range(first, last):
            if text[i].isspace() and not text[i - 1].isspace():
                yield i

    places = list(itertools.islice(candidates(), CUTS_TRIED))
    for i in places:
        before, after = text[i - CUT_CONTEXT : i], text[i : i + CUT_CONTEXT]
        if ids_of(before + after) == ids_of(before) + ids_of(after):
            return i
    return places[0] if places else first  # some tokenizers put a blank before every text, or there is no space at all


class _Tokens:
    """Tokens in order, in memory while they are few, else in a temporary file."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self.count, self.held = 0, 0
        self.file: IO[bytes] | None = None

    def extend(self, ids: Any) -> None:
        """Adds a sequence of ids, or an array (n,)."""
        self.parts.append(np.asarray(ids, dtype=np.int64))
        self.count += len(ids)
        self.held += len(ids)
        if self.held > TOKENS_IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        try:
            if self.file is None:
                # It has no name and goes with the tensor that is made of it.
                self.file = tempfile.TemporaryFile(prefix="darkformer-")  # noqa: SIM115
            for part in self.parts:
                part.tofile(self.file)
            self.file.flush()
        except OSError as error:
            raise InputError(
                f"{self.count:,} tokens do not fit into {tempfile.gettempdir()} ({error.strerror or error}): "
                "make room, set TMPDIR to another folder, or give less text."
            ) from error
        self.parts.clear()
        self.held = 0

    def tensor(self) -> Tensor:
        """All of them, (count,) int64."""
        if self.file is None:
            return torch.from_numpy(np.concatenate(self.parts)) if self.parts else torch.empty(0, dtype=torch.int64)
        self._spill()
        # Private pages: whoever writes to the tensor changes its own copy.
        return torch.from_numpy(np.memmap(self.file, dtype=np.int64, mode="c", shape=(self.count,)))


def text_size(documents: Iterable[Document]) -> int:
    """What `tokens_of` counts its progress in: characters, for large files bytes."""
    return sum(len(x) if isinstance(x, str) else x.stop - x.start for x in documents)


def tokens_of(
    tokenizer: Any, documents: Sequence[Document], *, piece: int = PIECE, progress: Progress | None = None
) -> Tensor:
    """Tokens of all documents, an end-of-text token after each, (tokens,) int64.

    Long documents are tokenized in pieces, cut at a line's end or a space where the tokens on both sides stay the same.
    Many tokens are mapped from a temporary file, so that a gigabyte of text needs no gigabyte of memory.

    Args:
        piece: characters of a piece.
        progress: called with (characters done, `text_size`).

    Raises:
        InputError: no room for the temporary file.
    """

    def ids_of(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found

    tokens, done, total = _Tokens(), 0, text_size(documents)
    for document in documents:
        for text in _pieces(document, piece, ids_of):
            tokens.extend(ids_of(text))
            done += len(text) if isinstance(document, str) else len(text.encode())
            if progress:
                progress(done, total)
        if tokenizer.eos_token_id is not None:
            tokens.extend([tokenizer.eos_token_id])
    return tokens.tensor()


def blocks_of(
    tokens: Tensor, seq_len: int, prefix: Sequence[int] = (), part: str = "the",
    advice: str = "give more text or a smaller --seq-len",
) -> Tensor:  # fmt: skip
    """Tokens (N,) cut into blocks (…, seq_len) that begin with `prefix`; what does not fill a block is dropped.

    Without a prefix nothing is copied; with one, many tokens are mapped from a temporary file, as in `tokens_of`.

    Args:
        prefix: see `prefix_of`. Whoever uses the model begins with it, so scores and training do.
        part, advice: for the error: which text this is, and what to do where it is too short.

    Raises:
        InputError: less than one block (says how many tokens were found and needed).
    """
    length = seq_len - len(prefix)
    if length < 1:
        raise InputError(f"sequences of {seq_len} tokens: the tokenizer alone begins each with {len(prefix)}.")
    if len(tokens) < length:
        raise InputError(f"{part} text has {len(tokens)} tokens, one sequence needs {length}: {advice}.")
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    if not prefix:
        return rows
    start, blocks = torch.tensor(prefix), _Tokens()
    for some in rows.split(max(1, PIECE // seq_len)):
        blocks.extend(torch.cat([start.expand(len(some), -1), some], dim=1).flatten().numpy())
    return blocks.tensor().view(-1, seq_len)


def token_blocks(
    tokenizer: Any, documents: Sequence[Document], seq_len: int, part: str = "the",
    advice: str = "give more text or a smaller --seq-len",
) -> Tensor:  # fmt: skip
    """`blocks_of` the `tokens_of` some documents, as the tokenizer begins them: (blocks, seq_len) int64."""
    return blocks_of(tokens_of(tokenizer, documents), seq_len, prefix_of(tokenizer), part, advice)
