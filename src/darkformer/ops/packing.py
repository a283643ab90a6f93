"""Packed documents: several in one row become rows of their own, so that every backend starts each from nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..features.tracing import traced


class Documents(NamedTuple):
    """D documents of like length: where their tokens stand among the B·L tokens of the packed rows."""

    place: Tensor  # (D, longest) int64 into the flattened (B·L); 0 where there is no token
    valid: Tensor  # (D, longest) bool


def check_documents(documents: Tensor, batch: int, length: int) -> None:
    """Refuses numbers that do not say which tokens belong together.

    Raises:
        InputError: another shape, not integers, or a number that falls along a row; or a trace, as how many documents
            there are, and how long, is known by looking only.
    """
    if documents.shape != (batch, length):
        raise InputError(f"documents {tuple(documents.shape)}: must be (batch, tokens) = {(batch, length)}.")
    if documents.dtype.is_floating_point or documents.dtype == torch.bool:
        raise InputError(f"documents has dtype {documents.dtype}: give integers, one number a document.")
    if traced(documents):
        raise InputError("packed documents cannot be traced or exported: give each document a row, padded by key_mask.")
    if bool((documents.diff(dim=1) < 0).any()):
        raise InputError(
            "documents falls along a row: the tokens of a document must stand together, in rising order of its number."
        )


def unpack(documents: Tensor) -> Iterator[Documents]:
    """Groups documents (B, L) by length, powers of two apart: at most half of what is computed is padding."""
    batch, length = documents.shape
    device = documents.device
    first = torch.ones(batch, length, dtype=torch.bool, device=device)
    first[:, 1:] = documents.diff(dim=1) != 0
    starts = first.flatten().nonzero().squeeze(1)
    lengths = torch.cat([starts, starts.new_tensor([batch * length])]).diff()
    sizes = torch.ceil(torch.log2(lengths.double())).long()
    for size in sizes.unique().tolist():
        start, count = starts[sizes == size], lengths[sizes == size]
        slot = torch.arange(int(count.max()), device=device)
        valid = slot < count[:, None]
        yield Documents(torch.where(valid, start[:, None] + slot, 0), valid)


def separately(
    solve: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    documents: Tensor,
) -> Tensor:
    """Attention of every document by itself, (B, H, L, d_v).

    Args:
        solve: (query, key, value, key_mask) of documents as batch rows → their output (D, H, longest, d_v).
        query, key, value: (B, H or G, L, d). key_mask: (B, L) or None.
        documents: (B, L), numbers that rise along a row.
    """
    batch, length = documents.shape
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # (B·L, H or G, d)
    real = torch.ones_like(documents, dtype=torch.bool) if key_mask is None else key_mask.bool()
    outputs, places = [], []
    for place, valid in unpack(documents):
        rows = tuple(x[place].transpose(1, 2) for x in flat)  # (D, H or G, longest, d)
        output = solve(rows[0], rows[1], rows[2], valid & real.flatten()[place])
        outputs.append(output.transpose(1, 2)[valid])
        places.append(place[valid])
    back = torch.argsort(torch.cat(places))  # every token stands in exactly one document
    return torch.cat(outputs)[back].unflatten(0, (batch, length)).transpose(1, 2)
