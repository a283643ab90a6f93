"""Whether the header of a GGUF file can be true: `gguf` counts to whatever number it finds there."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from ..errors import InputError

#: Bytes of a value by the number of its type; strings and arrays have lengths of their own.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
#: Arrays within arrays; files of models have none.
_DEEPEST = 4
#: Fields, tensors, and elements of all arrays, each of which `gguf` makes an object of. Models have 10 to 100 fields,
#: some thousand tensors, and four times their vocabulary in arrays.
_MOST_ENTRIES, _MOST_ELEMENTS = 1 << 16, 1 << 23


class _Header:
    """Walks over the fields of a header without keeping them."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.offset, self.elements = content, 8, 0
        # The reader takes files of the other byte order, whose version has its low bytes where ours has the high ones.
        self.order = ">" if struct.unpack_from("<I", content, 4)[0] & 0xFFFF == 0 else "<"

    def number(self, kind: str) -> int:
        """The next integer, by struct's letter."""
        value: int = struct.unpack_from(self.order + kind, self.content, self.offset)[0]
        self.offset += struct.calcsize(kind)
        return value

    def take(self, count: int, size: int) -> None:
        """Goes past `count` things of at least `size` bytes each, which must be there."""
        if count * size > len(self.content) - self.offset:
            raise ValueError(f"{count} of {size} bytes each, of which it has {len(self.content) - self.offset} left")
        self.offset += count * size

    def value(self, kind: int, depth: int = 0) -> None:
        """Goes past a value."""
        if kind == _STRING:
            self.take(self.number("Q"), 1)
        elif kind != _ARRAY:
            if kind not in _SIZES:
                raise ValueError(f"values of type {kind}")
            self.take(1, _SIZES[kind])
        elif depth == _DEEPEST:
            raise ValueError(f"arrays {depth} levels deep")
        else:
            inner, count = self.number("I"), self.number("Q")
            self.elements += count
            if self.elements > _MOST_ELEMENTS:
                raise ValueError(f"arrays of {self.elements} elements")
            if inner in _SIZES:
                self.take(count, _SIZES[inner])
                return
            for _ in range(count):
                self.value(inner, depth + 1)


def check_header(file: Path) -> None:
    """Refuses a GGUF file that says it holds more than fits into it, or than any model has.

    Other damage is left to the reader.

    Raises:
        InputError: it does, or cannot be read.
    """
    try:
        stream = file.open("rb")
    except OSError as error:
        raise InputError(f"{file}: cannot be loaded: {error.strerror}.") from error
    with stream:
        if file.stat().st_size < 24 or stream.read(4) != b"GGUF":
            return
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _Header(content)
            try:
                tensors, fields = header.number("Q"), header.number("Q")
                if max(tensors, fields) > _MOST_ENTRIES:
                    raise ValueError(f"{tensors} tensors and {fields} fields")
                for _ in range(fields):
                    header.value(_STRING)
                    header.value(header.number("I"))
            except (ValueError, struct.error) as error:
                raise InputError(f"{file}: cannot be loaded: its header is damaged or altered: {error}.") from error
