"""Reads transformers' mask functions and arguments into what the operator takes: padding, or packed documents.

A converted layer refuses every other pattern, as it must not compute one in place of another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)

from ..errors import ConversionError
from ..features.tracing import traced, transformed

MaskFunction = Callable[..., Any]
#: Overlays that transformers puts on a plain mask in layers that attend within a window or chunk.
LOCAL = {
    "sliding_window_overlay": "window",
    "sliding_window_bidirectional_overlay": "window",
    "chunked_overlay": "chunk",
}
#: The functions that transformers intersects for position_ids that restart (`packed_sequence_compatibility_function`).
PACKED = ("packed_sequence_mask_function", "remap_positions_for_packed_sequence")
UNKNOWN = (
    "the mask is neither causal, nor padding, nor packed documents (a custom mask function or a prefix mask): a "
    "converted layer cannot follow it. Use softmax attention for it: darkformer.revert(model)."
)
ALONE = "Leave attention_mask out and pass use_cache=False, or put each document in a row of its own."


def _cell(function: MaskFunction, name: str) -> Any:
    """The variable `name` that a mask function closed over, None if there is none."""
    free = function.__code__.co_freevars
    return function.__closure__[free.index(name)].cell_contents if name in free and function.__closure__ else None


def _factory(function: MaskFunction) -> str:
    """Name of the transformers function that returned this one."""
    return function.__qualname__.split(".")[0]


def _parts(function: MaskFunction) -> tuple[MaskFunction, ...]:
    """The mask functions whose intersection this one is."""
    return tuple(_cell(function, "mask_functions") or ()) if _factory(function) == "and_masks" else ()


def _innermost(function: MaskFunction) -> MaskFunction:
    """The mask function below the overlays of packed documents, windows and chunks."""
    parts = _parts(function)
    if _is_packed(function):
        return _innermost(_cell(parts[1], "mask_function"))
    return parts[1] if len(parts) == 2 and _factory(parts[0]) in LOCAL else function


def _is_causal(function: MaskFunction) -> bool | None:
    """Whether a mask function is causal (True) or bidirectional (False), under known overlays; None if neither."""
    return {causal_mask_function: True, bidirectional_mask_function: False}.get(_innermost(function))


def _is_packed(function: MaskFunction) -> bool:
    return tuple(map(_factory, _parts(function))) == PACKED


def _sliding(function: MaskFunction) -> str | None:
    """How a mask function limits the distance that a query sees: "window", "chunk" or None."""
    parts = _parts(function)
    if _is_packed(function):
        return _sliding(_cell(parts[1], "mask_function"))
    return LOCAL.get(_factory(parts[0])) if parts else None


def _packed_documents(function: MaskFunction) -> Tensor | None:
    """Numbers (B, L), from 1, of the documents that a packed mask function separates; None if there is only one.

    Raises:
        ConversionError: position_ids jump without restarting: missing tokens, or another document?
    """
    parts = _parts(function)
    numbers, positions = _cell(parts[0], "packed_sequence_mask"), _cell(parts[1], "position_ids")
    borders = numbers.diff(dim=1) != 0
    jumps = borders & (positions[:, 1:] != positions[:, :1])
    if bool(jumps.any()):
        row, token = (int(i) for i in jumps.nonzero()[0])
        raise ConversionError(
            f"position_ids of row {row} go from {int(positions[row, token])} to {int(positions[row, token + 1])} at "
            f"token {token + 1}: neither one document (+1) nor the start of the next ({int(positions[row, 0])}). "
            "Give position_ids that count up and restart, or an attention_mask that says which tokens are padding."
        )
    return numbers + 1 if bool(borders.any()) else None


class AttentionMask:
    """Who sees whom in one forward pass, as `create_causal_mask` and its kin are asked for it.

    It replaces the tensor that transformers passes from the mask function to the attention function. A converted layer
    reads causality, padding and documents from it instead of guessing them from numbers; a layer that stays gets the
    tensor it had before from `dense`. transformers may pass it back in as `attention_mask`.

    Attributes:
        is_causal: whether a query sees no later key; None for a pattern that was not understood.
        padding: (B, K) booleans, True for real tokens; None if all are.
        documents: (B, L) numbers from 1 of packed documents; None without.
        sliding: "window" or "chunk" where transformers limits how far a query sees, else None.
        problem: why a converted layer cannot follow the pattern, None if it can.
    """

    ndim = 4  # by which transformers recognizes a finished mask

    def __init__(self, arguments: dict[str, Any]) -> None:
        if isinstance(offset := arguments["q_offset"], Tensor):  # a static cache's own count, updated in place
            arguments = {**arguments, "q_offset": offset.clone()}
        self._arguments = arguments
        self._dense: dict[str, Tensor | None] = {}
        function, padding = arguments["mask_function"], arguments["attention_mask"]
        self.shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        self.padding: Tensor | None = None
        self.documents: Tensor | None = None
        self.sliding = _sliding(function)
        self.is_causal = _is_causal(function)
        self.problem = UNKNOWN if self.is_causal is None else None
        if self.problem is not None:
            return
        # Without a mask transformers always compares positions. In a trace their values are unknown, and rows are taken
        # to hold one document each.
        if _is_packed(function) and not traced():
            self.documents = _packed_documents(function)
        if padding is not None:
            padding = padding[:, -self.shape[3] :].bool()
            readable = not (transformed() or traced(padding))
            all_real = readable and padding.shape[1] == self.shape[3] and bool(padding.all())
            self.padding = None if all_real else padding

    def filled(self, keys: int) -> int:
        """How many of the cache's `keys` keys hold a token: a static cache returns all that it has room for."""
        end = self._arguments["q_offset"] + self.shape[2] - self._arguments["kv_offset"]
        return keys if traced() or not self.is_causal else min(keys, max(int(end), self.shape[2]))

    def contiguous(self) -> AttentionMask:
        """Itself: `generate` asks for it before it passes a mask on."""
        return self

    def dense(self, implementation: str) -> Tensor | None:
        """The mask that transformers builds for layers with this attention implementation, cached."""
        if implementation not in self._dense:
            self._dense[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self._arguments)
        return self._dense[implementation]


@torch.compiler.disable
def dark_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | AttentionMask | None = None,
    **kwargs: Any,
) -> AttentionMask:
    """transformers' mask function of converted models: the pattern it was asked for, whatever that is.

    Raises:
        ConversionError: packed documents whose borders are ambiguous.
    """
    if isinstance(attention_mask, AttentionMask):  # built before the forward pass, as for static caches
        return attention_mask
    return AttentionMask(
        dict(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, **kwargs,
        )
    )  # fmt: skip


def _steps(position_ids: Tensor | None, length: int) -> Tensor | None:
    """(B or 1, L - 1) differences between positions of neighbouring tokens; None without positions or neighbours."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != length or length < 2:
        return None
    return position_ids.diff(dim=1)


def _restarts(position_ids: Tensor | None, mask: Tensor | None, length: int) -> bool:
    """Whether position_ids decrease from one real token to the next."""
    steps = None if position_ids is not None and traced(position_ids) else _steps(position_ids, length)
    if steps is None or not bool((steps < 0).any()):
        return False  # the mask is not read then: under vmap it has a row for each sample
    real = None if mask is None else mask[:, -length:]
    return bool((steps < 0).any() if real is None else ((steps < 0) & real[:, 1:] & real[:, :-1]).any())


def _from_lengths(kwargs: dict[str, Any], batch: int, length: int) -> Tensor | None:
    """Documents (1, L) from `cu_seq_lens_q` and `cu_seq_lens_k`, as flash attention takes them; None without any."""
    lengths = [kwargs[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k") if kwargs.get(name) is not None]
    if not lengths:
        return None
    cuts = lengths[0]
    if len(lengths) == 2 and (type(lengths[1]) is not type(cuts) or not torch.equal(*lengths)):
        raise ConversionError("cu_seq_lens_q and cu_seq_lens_k differ: a converted layer attends to its own row only.")
    cuts = cuts.long()
    if batch != 1 or cuts[0] != 0 or cuts[-1] != length or bool((cuts.diff() <= 0).any()):
        raise ConversionError(
            f"cu_seq_lens_q={cuts.tolist()} for {batch} rows of {length} tokens: it must rise from 0 to the number of "
            "tokens, and all documents must be in one row (batch size 1)."
        )
    return torch.bucketize(torch.arange(length, device=cuts.device), cuts[1:], right=True)[None] + 1


def _check_borders(numbered: Tensor, documents: Tensor | None, position_ids: Tensor | None) -> None:
    """Refuses documents by cu_seq_lens whose positions do not restart with them.

    Rotary embedding is relative for softmax, but not for features: they are drawn once, not rotated with the keys.
    """
    borders = numbered.diff(dim=1) != 0
    restarts = None if documents is None else documents.diff(dim=1) != 0
    if restarts is None and (steps := _steps(position_ids, numbered.shape[1])) is not None:
        restarts = steps != 1
    if bool(borders.any() if restarts is None else (restarts != borders).any()):
        raise ConversionError(
            "cu_seq_lens_q puts borders between documents where position_ids do not restart: features depend on the "
            "positions themselves, so every document must count its own. Pass position_ids that restart at each "
            "border, and no attention_mask (DataCollatorWithFlattening does)."
        )


def read_mask(
    attention_mask: AttentionMask | Tensor | None, kwargs: dict[str, Any], batch: int, length: int, cached: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(padding (B, K) booleans or None, documents (B, L) or None) of one call of a converted layer.

    Args:
        attention_mask: what `dark_mask` returned, or a 4-D mask that transformers passed through.
        kwargs: of the attention function; `position_ids` and `cu_seq_lens_q`, `cu_seq_lens_k` are read.
        cached: whether the call has a cache, which documents cannot have.

    Raises:
        ConversionError: another pattern, documents beside padding or a cache, or borders that contradict each other.
    """
    if isinstance(attention_mask, Tensor):
        raise ConversionError(
            f"an attention mask of shape {tuple(attention_mask.shape)} is not read: a converted layer takes padding "
            "masks (batch, tokens), and packed documents by position_ids that restart or cu_seq_lens_q. "
            "For any other pattern use softmax attention: darkformer.revert(model)."
        )
    if attention_mask is not None and attention_mask.problem is not None:
        raise ConversionError(attention_mask.problem)
    mask, documents = (None, None) if attention_mask is None else (attention_mask.padding, attention_mask.documents)
    numbered = _from_lengths(kwargs, batch, length)
    if numbered is not None:
        _check_borders(numbered, documents, kwargs.get("position_ids"))
        documents = numbered if bool((numbered > 1).any()) else None
    elif documents is None and _restarts(kwargs.get("position_ids"), mask, length):
        raise ConversionError(
            f"position_ids that restart beside a cache or an attention_mask: packed documents need neither. {ALONE}"
        )
    if documents is not None and (cached or mask is not None):
        raise ConversionError(f"packed documents beside a cache or padding: each needs a state of its own. {ALONE}")
    return mask, documents


def check_stays(attention_mask: Tensor | None, kwargs: dict[str, Any], batch: int, length: int) -> None:
    """Refuses documents that a sliding-window layer with torch's attention would mix, as it reads its mask only.

    Raises:
        ConversionError: `cu_seq_lens_q` without the position_ids that transformers builds that mask from.
    """
    numbered = _from_lengths(kwargs, batch, length)
    if numbered is None or bool((numbered == 1).all()):
        return
    steps = _steps(kwargs.get("position_ids"), length)
    if attention_mask is None or steps is None or not torch.equal(steps != 1, numbered.diff(dim=1) != 0):
        raise ConversionError(
            "cu_seq_lens_q without position_ids that restart: the sliding-window layers that stay would mix the "
            "documents. Pass position_ids that restart as well (DataCollatorWithFlattening does); encoders with such "
            "layers take one document a row."
        )


def allowed_keys(
    mask: Tensor | None, documents: Tensor | None, length: int, keys: int, is_causal: bool, device: torch.device
) -> Tensor | None:
    """(B or 1, L, K) booleans: which of `keys` keys exact attention may see; the last `length` are the queries' own."""
    if mask is None and documents is None and (length in (1, keys) or not is_causal):
        return None
    allowed = torch.ones(1, length, keys, dtype=torch.bool, device=device)
    if is_causal:
        allowed = allowed.tril(keys - length)
    if documents is not None:
        allowed = allowed & (documents[:, :, None] == documents[:, None])
    return allowed if mask is None else allowed & mask[:, None, :]
