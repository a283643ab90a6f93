"""The cache layer of a converted attention: constant size, whatever was generated."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..config import ConversionError
from ..ops.attention import attention
from ..ops.native import stepper
from ..ops.native.step import Step
from ..ops.problem import AttentionState

#: Tokens that can be taken back at least, while a cache records (fewer if it has recorded fewer).
CROP = 256


@dataclass
class History:
    """What taking tokens back needs: the state before them, and their keys and values.

    Sums are not subtracted: a key that raises a feature's running maximum has rescaled everything before it, and what
    underflowed then would be gone. The state is made again from the one before, which gives prefill's numbers.
    """

    state: AttentionState | None
    options: dict[str, Any] = field(default_factory=dict)  # scaling and softcap
    pieces: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # key, value (B, G, T, d), mask (B, T)

    @property
    def length(self) -> int:
        """Tokens that can be taken back."""
        return sum(mask.shape[1] for _, _, mask in self.pieces)

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        key, value, mask = zip(*self.pieces, strict=True)
        return torch.cat(key, dim=2), torch.cat(value, dim=2), torch.cat(mask, dim=1)

    def after(self, tokens: int, feature_map: Any) -> AttentionState | None:
        """The state once the first `tokens` of the recorded ones are in it."""
        if tokens == 0:
            return self.state
        key, value, mask = self._joined()
        key, value, mask = key[:, :, :tokens], value[:, :, :tokens], mask[:, :tokens]
        query = key.repeat_interleave(feature_map.num_heads // feature_map.num_kv_heads, dim=1)  # any will do
        _, state = attention(
            query, key, value, feature_map, key_mask=mask, initial_state=self.state, return_state=True, **self.options
        )
        return state.detach()

    def drop(self, tokens: int, feature_map: Any) -> None:
        """Forgets how to take back the first `tokens` of the recorded ones."""
        self.state = self.after(tokens, feature_map)
        key, value, mask = self._joined()
        self.pieces = [(key[:, :, tokens:], value[:, :, tokens:], mask[:, tokens:])]

    def select(self, rows: Tensor) -> None:
        """Batch rows `rows` (int64), in that order."""
        self.state = None if self.state is None else self.state.select(rows)
        self.pieces = [(k.index_select(0, rows), v.index_select(0, rows), m[rows]) for k, v, m in self.pieces]


def _versions(feature_map: nn.Module) -> tuple[int, ...]:
    """Counts of in-place changes: calibration, training and redraws raise one of them."""
    if feature_map._modules:  # wrapped, as by peft's `modules_to_save`
        tensors = [*feature_map.parameters(), *feature_map.buffers()]
    else:  # the same from its own tables: walking through modules at each token took longer than the token's attention
        tables = (feature_map._parameters, feature_map._buffers)
        tensors = [x for table in tables for x in table.values() if x is not None]
    return tuple(0 if x.is_inference() else x._version for x in tensors)


class DarkCacheLayer(CacheLayerMixin):
    """Holds an `AttentionState` where other layers hold all keys and values.

    `update` hands the new keys and values through; the attention function calls `extend` with them. While single tokens
    come, a `Step` holds the state and changes it in place; `state` is then a copy.
    """

    is_sliding = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._state: AttentionState | None = None
        self._step: Step | None = None
        self.seen = 0  # tokens, padding included: what transformers counts positions by
        self.history: History | None = None
        self.owner: Any = None  # weak reference to the attention module; a copy of the cache keeps it
        self.versions: tuple[int, ...] = ()
        self.awaited = False  # whether a converted module is about to hand over keys and values

    @property
    def state(self) -> AttentionState | None:
        """After the last token; None before the first one."""
        return self._step.state() if self._step is not None else self._state

    @state.setter
    def state(self, state: AttentionState | None) -> None:
        self._state, self._step = state, None

    @property
    def filled(self) -> bool:
        """Whether any token is in."""
        return self._state is not None or self._step is not None

    def bind(self, module: Any) -> DarkCacheLayer:
        """Notes whose state this is.

        Raises:
            ConversionError: it was filled by another model, or the feature map has changed since.
        """
        versions = _versions(module.dark)
        if self.filled:
            if self.owner is None or self.owner() is not module:
                raise ConversionError(
                    f"layer {module.layer_idx} of past_key_values was filled by another converted model: its sums mean "
                    "nothing under this one's features. Start with an empty cache."
                )
            if versions != self.versions:
                raise ConversionError(
                    f"layer {module.layer_idx} of past_key_values was filled before its feature map changed "
                    "(calibrated, trained or redrawn): start with an empty cache."
                )
        self.owner, self.versions = weakref.ref(module), versions
        return self

    def check_past(self, mask: Tensor, new: int) -> None:
        """Compares a mask (B, K), booleans of which the last `new` are of tokens to come, with what was read.

        Raises:
            ConversionError: it hides tokens that are in the sums already, or shows some that are not.
        """
        count = self._step.count if self._step is not None else None if self._state is None else self._state.count
        if count is None or mask.shape[1] != self.seen:  # a mask of the new tokens alone says nothing of others
            return
        said, read = mask[:, :-new].sum(1), count.to(mask.device)
        if bool((said != read).any()):
            row = int((said != read).nonzero()[0])
            raise ConversionError(
                f"attention_mask shows {int(said[row])} tokens of row {row} before this call, and past_key_values has "
                f"read {int(read[row])}: what is in the sums cannot be hidden later. Pass the mask they were read "
                "with, or start with an empty cache."
            )

    def extend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, feature_map: Any, **options: Any
    ) -> Tensor:
        """Attention of new tokens after all before them, (B, H, L, d_v); the state has them afterwards.

        Args:
            query: (B, H, L, d). key, value: (B, G, L, d). mask: (B, L) booleans or None.
            options: scaling, softcap and is_causal of `attention`.
        """
        if (output := self._one_token(query, key, value, mask, feature_map, **options)) is not None:
            return output
        outputs, length = [], key.shape[2]
        # While recording, a long prompt is cut so that only its end has to be kept.
        cuts = [0, length - CROP, length] if self.history and length > CROP else [0, length]
        for start, stop in itertools.pairwise(cuts):
            part = [x[:, :, start:stop] for x in (query, key, value)]
            some = None if mask is None else mask[:, start:stop]
            output, state = attention(
                part[0], part[1], part[2], feature_map, key_mask=some, initial_state=self.state, return_state=True,
                **options,
            )  # fmt: skip
            outputs.append(output)
            if self.history:
                self._record(part[1].detach(), part[2].detach(), some, feature_map, options)
            self.state = state.detach()
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _one_token(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, feature_map: Any, *,
        scaling: float, softcap: float | None = None, is_causal: bool = True,
    ) -> Tensor | None:  # fmt: skip
        """The compiled step, where it can: no gradient, no recording, a real token in every row. Else None."""
        if query.shape[2] != 1 or not is_causal or self.history is not None or torch.is_grad_enabled():
            return None
        if mask is not None and not bool(mask.all()):
            return None
        if self._step is None or not self._step.takes(query, key, scaling, softcap):
            self.state = self.state  # out of the hands of a step for other shapes
            self._step = stepper(self._state, query, key, feature_map, scaling=scaling, softcap=softcap)
            if self._step is None:
                return None
            self._state = None
        return self._step(query, key, value)

    def _record(
        self, key: Tensor, value: Tensor, mask: Tensor | None, feature_map: Any, options: dict[str, Any]
    ) -> None:
        history = self.history
        assert history is not None
        history.options = options
        if key.shape[2] >= CROP:  # alone enough: what came before need not be taken back
            history.state, history.pieces = self.state, []
        real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        history.pieces.append((key, value, real if mask is None else mask))
        if (length := history.length) >= 2 * CROP and len(history.pieces) > 1:
            history.drop(length - CROP, feature_map)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands new keys and values through and counts them.

        Raises:
            ConversionError: softmax attention asks, which would take the new keys for all there are.
        """
        if not self.awaited:
            raise ConversionError(
                f"past_key_values holds the state of a converted model ({self.seen} tokens), and softmax attention "
                "needs their keys and values: start with an empty cache, or go on with the converted model."
            )
        self.awaited = False
        self.is_initialized = True
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False
        if self.history is not None:
            self.history = History(None)

    def offload(self) -> None:
        """A few kilobytes per head: not worth moving."""

    def prefetch(self) -> None:
        """See `offload`."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if (state := self.state) is not None:
            rows = torch.arange(state.count.shape[0], device=state.count.device)
            self._select(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        if (state := self.state) is not None:
            rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
            rows = rows.to(state.count.device)
            self.state = state.select(rows)
            if self.history is not None:
                self.history.select(rows)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether tokens that come from now on can be taken back."""
        return self.history is not None

    def activate_past_recording(self) -> None:
        """From now on tokens can be taken back by `crop`: at least the last `CROP` of those that come."""
        if self.history is None:
            self.history = History(self.state)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` tokens back (transformers counts them negative); padding counts too.

        Afterwards only tokens that come later can be taken back.

        Raises:
            ConversionError: more tokens than were recorded, or none were, or a positive number.
        """
        remove = -tokens_to_remove
        if remove < 0:
            raise ConversionError(f"crop({tokens_to_remove}): give the number of tokens to take back, negative.")
        recorded = 0 if self.history is None else self.history.length
        if remove > recorded:
            raise ConversionError(
                f"crop({tokens_to_remove}): a linear-attention state takes back what it has recorded, {recorded} "
                f"tokens here ({CROP} or more are kept). Call past_key_values.activate_past_recording() before the "
                "tokens come (generate does so for assisted decoding), or compute the shorter prompt again."
            )
        if self.history is None:
            return
        if remove:
            owner: Any = self.owner() if self.owner else None
            if owner is None:
                raise ConversionError(f"crop({tokens_to_remove}): the model that filled this cache is gone.")
            self.state = self.history.after(recorded - remove, owner.dark)
        self.history = History(self.state, self.history.options)
        self.seen -= remove

    @property
    def nbytes(self) -> int:
        """Bytes of the state, without what is recorded for `crop`; 0 before the first token."""
        if self._step is not None:
            return self._step.nbytes
        return 0 if self._state is None else self._state.nbytes


def own_layer(cache: Cache, module: Any) -> DarkCacheLayer:
    """The cache's layer of this attention module as a `DarkCacheLayer`, put in place of an empty standard one.

    Raises:
        ConversionError: that layer already holds keys of the softmax model, or the state of another model.
    """
    while len(cache.layers) <= module.layer_idx:
        cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    layer: Any = cache.layers[module.layer_idx]
    if not isinstance(layer, DarkCacheLayer):
        if layer.get_seq_length() > 0:
            raise ConversionError(
                f"layer {module.layer_idx} of past_key_values holds {layer.get_seq_length()} tokens of softmax "
                "attention: a converted model needs a cache of its own. Start with an empty cache."
            )
        layer = DarkCacheLayer()
        if cache.__dict__.get("records_past"):
            layer.activate_past_recording()
        cache.layers[module.layer_idx] = layer
    layer.bind(module).awaited = True
    return layer


def _note_recording() -> None:
    """Lets a cache remember that it was asked to record.

    `generate` asks before the first token, when the layers that a converted model replaces are still standard ones,
    which keep everything and have nothing to note it in.
    """
    original = Cache.activate_past_recording
    if getattr(original, "by_darkformer", False):
        return

    def activate_past_recording(self: Any) -> None:
        self.records_past = True
        original(self)

    activate_past_recording.by_darkformer = True  # type: ignore[attr-defined]
    activate_past_recording.__doc__ = original.__doc__
    Cache.activate_past_recording = activate_past_recording  # type: ignore[method-assign]


_note_recording()


def cache_bytes(cache: Cache) -> int:
    """Bytes of all layers: states of converted layers, keys and values of the others."""

    def one(layer: Any) -> int:
        if isinstance(layer, DarkCacheLayer):
            return layer.nbytes
        return 0 if getattr(layer, "keys", None) is None else layer.keys.nbytes + layer.values.nbytes

    return sum(map(one, cache.layers))
