"""The cache layer of a converted attention: constant size, whatever was generated."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from ..config import DarkConfig
from ..errors import ConversionError
from ..features.feature_map import LEARNED, FeatureMap
from ..features.tracing import traced
from ..ops.exact import softmax_attention
from ..ops.state import AttentionState
from .added import read
from .calls import AttentionCall
from .fingerprint import digest
from .layers import layer_of, map_of
from .masks import allowed_keys
from .parts import Part, joined, parts_of
from .patches import asked_to_record, patch_caches
from .stream import CROP, Stream

patch_caches(cache_utils)

_INTERRUPTED = (
    "a forward pass was interrupted (Ctrl-C, or an error) before every layer had read them. Start with an empty cache, "
    "or with a copy from before."
)


def _versions(feature_map: FeatureMap) -> tuple[Any, ...]:
    """The configuration and the tensors' version counters: calibration, training and redraws raise one of them."""
    tables = (feature_map._parameters, feature_map._buffers)
    tensors = [x for table in tables for x in table.values() if x is not None]
    return (feature_map.config, *(0 if x.is_inference() else x._version for x in tensors))


def _computed(feature_map: FeatureMap) -> str | None:
    """Digest of the map's values if a parametrization (torch's, or peft's `target_parameters`) computes any of them.

    They may then change with anything, so the numbers count as well as the tensors' versions.
    """
    if not feature_map._modules:
        return None
    # Not `values`, which reads without gradients: torch may keep what it computes first for the whole forward pass.
    tensors = {name: feature_map.learned(name) for name in LEARNED} | {"proposal_root": feature_map.proposal_root}
    return digest({name: x for name, x in tensors.items() if x is not None})


class DarkCacheLayer(CacheLayerMixin):
    """Holds sums of constant size where other layers hold all keys and values; of exact heads it holds those too.

    The attention function calls `extend` with new keys and values. For each attention in a forward pass of the module
    (one, but for differential attention) there is one `Stream` for each part of its heads with constant state, and, if
    some heads keep softmax, a layer of transformers' own with the keys and values of these heads alone.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keys = self.values = torch.empty(0)  # models ask other layers whether they hold any
        self.streams = [Stream()]
        self.exact_layers: list[Any] = []  # keys and values of exact heads, one for each attention of a forward pass
        self.exact_mask: Tensor | None = None  # (B, seen) booleans, True for real tokens of `exact_layers`; None: all
        self.template: Any = DynamicLayer()  # an empty layer of the kind that the cache was made with
        self.seen = 0  # tokens, padding included: what transformers counts positions by
        self.reading = False  # a forward pass of the owner has begun to read tokens and has not come to its end
        self.inherited: tuple[Tensor, Tensor] | None = None  # keys and values to read before the first token
        self.owner: Any = None  # weak reference to the attention module that filled it
        self.versions: tuple[Any, ...] = ()  # `_versions` of the feature map that filled it
        self.computed: str | None = None  # `_computed` of that map
        self.identity: tuple[str | None, str, DarkConfig] | None = None  # `identity_of` the owner of the original

    @property
    def state(self) -> AttentionState | None:
        """Of the first stream, after the last token; None before the first one."""
        return self.streams[0].state

    @property
    def filled(self) -> bool:
        """Whether any token is in."""
        return self.streams[0].filled

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has no reference to a module, but the module's identity."""
        module = self.owner() if self.owner is not None else None
        identity = self.identity
        if module is not None and self.filled:
            identity = identity_of(module, map_of(module), self.computed)
        return {**self.__dict__, "owner": None, "identity": identity}

    def bind(self, module: Any, feature_map: Any = None) -> DarkCacheLayer:
        """Makes the module the owner of this state.

        Raises:
            ConversionError: it was filled by another model, or the feature map has changed since.
        """
        feature_map = map_of(module) if feature_map is None else feature_map
        versions, computed = _versions(feature_map), _computed(feature_map)
        if self.filled:
            name = f"layer {feature_map.layer} of past_key_values"
            if self.owner is None and self.identity is not None:
                same = self.identity == identity_of(module, feature_map, computed)
            else:
                same = self.owner is not None and self.owner() is module
                if same and (versions, computed) != (self.versions, self.computed):
                    raise ConversionError(
                        f"{name} was filled before its feature map changed (calibrated, trained or redrawn): start "
                        "with an empty cache."
                    )
            if not same:
                raise ConversionError(
                    f"{name} was filled by another converted model: its sums mean nothing under this one's features. "
                    "Start with an empty cache."
                )
        self.owner, self.versions, self.computed, self.identity = weakref.ref(module), versions, computed, None
        return self

    def check_whole(self) -> None:
        """Refuses a layer whose heads may stand at different tokens.

        Raises:
            ConversionError: the last forward pass of its module did not come to its end.
        """
        if self.reading:
            raise ConversionError(f"a layer of past_key_values has read a part of the last tokens: {_INTERRUPTED}")

    def check_past(self, mask: Tensor, new: int) -> None:
        """Compares a mask (B, K), booleans of which the last `new` are of tokens to come, with what was read.

        Raises:
            ConversionError: it hides tokens that are in the sums already, or shows some that are not.
        """
        count = self.streams[0].count
        if traced(mask) or count is None or mask.shape[1] != self.seen + new:
            return  # a mask of the new tokens alone
        shown, read = mask[:, : mask.shape[1] - new].sum(1), count.to(mask.device)
        if bool((shown != read).any()):
            row = int((shown != read).nonzero()[0])
            raise ConversionError(
                f"attention_mask shows {int(shown[row])} tokens of row {row} before this call, and past_key_values has "
                f"read {int(read[row])}: what is in the sums cannot be hidden later. Pass the mask they were read "
                "with, or start with an empty cache."
            )

    def extend(
        self, turn: int, calls: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        parts: tuple[Part, ...], **options: Any,
    ) -> Tensor:  # fmt: skip
        """Attention of new tokens after all before them, (B, H, L, d_v).

        Args:
            turn: which attention of the module's forward pass this is, from 0. calls: how many there are.
            query: (B, H, L, d). key, value: (B, G, L, d).
            mask: (B, K) booleans, the new tokens last, or None.
            parts: of the module's heads.
            options: scaling, softcap and is_causal of `attention`.

        Raises:
            ConversionError: see `check_past` and `check_whole`.
        """
        new = key.shape[2]
        if turn == 0:
            self.check_whole()
            if self.inherited is not None and self.seen > self.inherited[0].shape[2]:
                self.inherited = None  # every stream has read them in the forward pass before
            if mask is not None:
                self.check_past(mask, new)
            self.reading = True
        constant = [part for part in parts if part.feature_map is not None]
        exact = next((part for part in parts if part.feature_map is None), None)
        while len(self.streams) < (turn + 1) * len(constant):
            self.streams.append(Stream(records=self.is_croppable))
        streams = self.streams[turn * len(constant) :][: len(constant)]
        if self.inherited is not None and not streams[0].filled:
            keys, values = self.inherited
            before = keys.shape[2]
            read = mask[:, :before] if mask is not None and mask.shape[1] == before + new else None
            if turn == 0:
                self.seen = 0
                self._count(before, None if exact is None else read)
            for part, stream in zip(constant, streams, strict=True):
                stream.absorb(part.of_keys(keys), part.of_keys(values), read, part.feature_map, **options)
            if exact is not None:
                self._store_exact(turn, exact.of_keys(keys), exact.of_keys(values).to(keys.dtype))
        mask = None if mask is None else mask[:, -new:]
        if turn == 0:
            self._count(new, None if exact is None else mask)
        outputs = [
            stream.extend(
                part.of_queries(query), part.of_keys(key), part.of_keys(value), mask, part.feature_map, **options
            )
            for part, stream in zip(constant, streams, strict=True)
        ]
        if exact is not None:
            keys, values = self._store_exact(turn, exact.of_keys(key), exact.of_keys(value))
            allowed = allowed_keys(self.exact_mask, None, new, self.seen, options["is_causal"], query.device)
            outputs.append(softmax_attention(exact.of_queries(query), keys, values, allowed=allowed, **options))
            layer = self.exact_layers[turn]
            if layer.keys.requires_grad or layer.values.requires_grad:
                # Gradients stop at the end of a call, as in a state: a graph over all calls would grow with each.
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        self.reading = turn + 1 < calls
        return joined(parts, outputs)

    def _store_exact(self, turn: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values (B, G of the exact heads, T, d); returns all there are so far."""
        if turn == len(self.exact_layers):
            self.exact_layers.append(copy.deepcopy(self.template))
        keys, values = self.exact_layers[turn].update(key, value)
        length = self.exact_layers[turn].get_seq_length()  # a static layer returns all that it has room for
        return (keys, values) if keys.shape[2] == length else (keys[:, :, :length], values[:, :, :length])

    def _count(self, new: int, mask: Tensor | None) -> None:
        """Counts `new` tokens; `mask` (B, new) says for exact heads which of them are real, None that all are."""
        if mask is not None and self.exact_mask is None and not traced(mask) and bool(mask.all()):
            mask = None
        known = mask if mask is not None else self.exact_mask
        if known is not None:
            rows = known.shape[0]
            before = known.new_ones(rows, self.seen) if self.exact_mask is None else self.exact_mask
            self.exact_mask = torch.cat([before, known.new_ones(rows, new) if mask is None else mask], dim=1)
        self.is_initialized = True
        self.seen += new

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Only softmax attention comes here; a converted module's forward pass has a `CallCache`.

        Raises:
            ConversionError: always: it would take the new keys for all there are.
        """
        raise ConversionError(
            f"past_key_values holds the state of a converted model ({self.seen} tokens), and softmax attention "
            "needs their keys and values: start with an empty cache, or go on with the converted model."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.streams = [Stream(records=self.is_croppable)]
        self.seen, self.is_initialized, self.reading = 0, False, False
        self.inherited = self.exact_mask = None
        for layer in self.exact_layers:
            layer.reset()

    def offload(self) -> None:
        """Moves the keys and values of exact heads alone: a state is a few kilobytes a head."""
        for layer in self.exact_layers:
            layer.offload()

    def prefetch(self) -> None:
        """See `offload`."""
        for layer in self.exact_layers:
            layer.prefetch()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if (count := self.streams[0].count) is not None:
            self._select(torch.arange(count.shape[0], device=count.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        for stream in self.streams:
            stream.select(rows)
        if self.exact_mask is not None:
            self.exact_mask = self.exact_mask[rows.to(self.exact_mask.device)]
        for layer in self.exact_layers:
            layer.reorder_cache(rows)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether tokens that come from now on can be taken back."""
        return self.streams[0].history is not None

    def activate_past_recording(self) -> None:
        """From now on tokens can be taken back by `crop`: at least the last `CROP` of those that come."""
        for stream in self.streams:
            stream.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` tokens back, padding included (transformers passes a negative number).

        Afterwards only tokens that come later can be taken back.

        Raises:
            ConversionError: more tokens than were recorded, or none were, or a positive number.
        """
        remove = -tokens_to_remove
        if remove < 0:
            raise ConversionError(f"crop({tokens_to_remove}): give the number of tokens to take back, negative.")
        history = self.streams[0].history
        recorded = 0 if history is None else history.length
        if remove > recorded:
            raise ConversionError(
                f"crop({tokens_to_remove}): a linear-attention state takes back what it has recorded, {recorded} "
                f"tokens here ({CROP} or more are kept). Call past_key_values.activate_past_recording() before the "
                "tokens come (generate does so for assisted decoding), or compute the shorter prompt again."
            )
        if history is None:
            return
        owner: Any = self.owner() if self.owner else None
        if remove and owner is None:
            raise ConversionError(f"crop({tokens_to_remove}): the model that filled this cache is gone.")
        fixed = next((x for x in self.exact_layers if not (x.is_croppable and has_all_keys(x))), None)
        if remove and fixed is not None:
            raise ConversionError(
                f"crop({tokens_to_remove}): exact heads keep their keys in a {type(fixed).__name__}, which takes none "
                "back. Use a dynamic cache."
            )
        maps: list[Any] = [None]
        if owner is not None:
            maps = [x.feature_map for x in parts_of(layer_of(owner), map_of(owner)) if x.feature_map is not None]
        for i, stream in enumerate(self.streams):
            stream.take_back(remove, maps[i % len(maps)] if remove else None)
        for layer in self.exact_layers:
            layer.crop(-remove)
        self.seen -= remove
        self.exact_mask = None if self.exact_mask is None else self.exact_mask[:, : self.seen]

    @property
    def nbytes(self) -> int:
        """Bytes of the states and of exact heads' keys and values, without what is recorded for `crop`."""
        exact = (x for layer in self.exact_layers for x in (layer.keys, layer.values) if x is not None)
        return sum(stream.nbytes for stream in self.streams) + sum(x.nbytes for x in exact)


class DarkHybridLayer(DarkCacheLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """For a module that runs attention and a recurrent mixer side by side (Falcon-H1): our sums, the mixer's states."""

    is_compileable = False

    def __init__(self, mixer: LinearAttentionLayer) -> None:
        DarkCacheLayer.__init__(self)
        self.__dict__ |= {name: x for name, x in mixer.__dict__.items() if name in vars(LinearAttentionLayer())}

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if kwargs:  # the mixer's, by name
            LinearAttentionLayer.lazy_initialization(self, **kwargs)
        else:
            DarkCacheLayer.lazy_initialization(self, *args)

    def reset(self) -> None:
        DarkCacheLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def _select(self, rows: Tensor) -> None:
        DarkCacheLayer._select(self, rows)
        indices: Any = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        LinearAttentionLayer.reorder_cache(self, indices)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return DarkCacheLayer.is_croppable.fget(self) and LinearAttentionLayer.is_croppable.fget(self)  # type: ignore

    def activate_past_recording(self) -> None:
        DarkCacheLayer.activate_past_recording(self)
        LinearAttentionLayer.activate_past_recording(self)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        DarkCacheLayer.crop(self, tokens_to_remove)


def identity_of(module: Any, feature_map: FeatureMap, computed: str | None) -> tuple[str | None, str, DarkConfig]:
    """What a module's state depends on, comparable across processes: base weights, features, configuration.

    Args:
        computed: see `_computed`; peft's parametrizations exist within a forward pass alone.
    """
    base = getattr(module.config, "darkformer_base", None) or {}
    if computed is None:
        path = next(name for name, x in module.named_modules() if x is feature_map)  # "dark", or inside peft's wrapper
        computed = digest(feature_map.values(lambda name: read(module, f"{path}.{name}")))
    return base.get("fingerprint"), computed, feature_map.config


def has_all_keys(layer: Any) -> bool:
    """Whether a layer has all the keys it has read in one tensor: quantized and sliding ones do not."""
    length = int(layer.get_seq_length()) if layer.is_initialized else 0
    return length == 0 or (layer.keys.dim() == 4 and layer.keys.shape[2] >= length)


def _template(layer: Any) -> Any:
    """An empty layer for the keys and values of some heads, of the kind that a cache's layer is."""
    sliding = getattr(layer, "is_sliding", False)
    if not (layer.is_initialized or sliding or isinstance(layer, LinearAttentionLayer)):
        return layer  # quantized ones have settings of their own
    limit = None if sliding else getattr(layer, "max_cache_len", None)
    return DynamicLayer() if limit is None else StaticLayer(max_cache_len=limit)


def _keys_of(layer: Any, slot: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values (B, G, T, d) of a layer that softmax attention or a prefix of prefix tuning has filled.

    Raises:
        ConversionError: not all of them are there any more.
    """
    length = int(layer.get_seq_length()) if layer.is_initialized else 0
    if not length:
        return None
    if not has_all_keys(layer):
        raise ConversionError(
            f"layer {slot} of past_key_values, a {type(layer).__name__}, has read {length} tokens and does not have "
            "all of their keys as they came: a converted layer needs them. Start with an empty cache."
        )
    return layer.keys[:, :, :length], layer.values[:, :, :length]


def own_layer(call: AttentionCall, module: Any, feature_map: Any) -> DarkCacheLayer:
    """The cache's layer of this call; an ordinary one is replaced by a `DarkCacheLayer` first.

    Raises:
        ConversionError: the module did not update the cache, so its keys are another layer's.
    """
    if call.cache is None or call.slot is None:
        raise ConversionError(
            f"layer {feature_map.layer} takes keys and values that it did not put into the cache, another layer's: "
            "converted layers keep sums, which nobody can read keys from."
        )
    cache, slot = call.cache, call.slot
    while len(cache.layers) <= slot:
        cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    layer: Any = cache.layers[slot]
    if not isinstance(layer, DarkCacheLayer):
        mixer = isinstance(layer, LinearAttentionLayer)
        own = DarkHybridLayer(layer) if mixer else DarkCacheLayer()
        own.template = _template(layer)
        if asked_to_record(cache):
            own.activate_past_recording()
        if (keys := _keys_of(layer, slot)) is not None:
            if layer_of(module).calls > 1:
                raise ConversionError(
                    f"layer {slot} of past_key_values holds keys and values that differential attention splits before "
                    "it attends: a converted layer cannot read them. Start with an empty cache."
                )
            own.inherited, own.seen = keys, keys[0].shape[2]
        cache.layers[slot] = layer = own
    return layer.bind(module, feature_map)


def check_even(cache: Cache, layer: DarkCacheLayer, new: int, config: Any) -> None:
    """Compares the number of tokens that `layer` has read with the other layers'.

    The first converted layer is compared with all that read the same text, the others with the first.

    Args:
        layer: of this cache, before it reads `new` tokens, which the layers that ran before it have read already.
        config: of its module; it names the layers that converted modules fill, those included that keep softmax.

    Raises:
        ConversionError: an interrupted forward pass has left them uneven.
    """
    layers: Any = cache.layers
    first = next(x for x in layers if isinstance(x, DarkCacheLayer))
    others = [first]
    if layer is first:
        slots = {slot for described in config.darkformer_layers for slot in described["slots"]}
        others = [x for i, x in enumerate(layers) if i in slots or getattr(x, "is_sliding", False)]
    for other in others:
        if (seen := other.get_seq_length()) - layer.seen not in (0, new):
            raise ConversionError(
                f"layers of past_key_values have read different numbers of tokens ({layer.seen} and {int(seen)}): "
                f"{_INTERRUPTED}"
            )


def cache_bytes(cache: Cache) -> int:
    """Bytes of all layers: states of converted layers, keys and values of the others."""
    total = 0
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if isinstance(layer, DarkCacheLayer):
            total += layer.nbytes
        elif getattr(layer, "keys", None) is not None:
            total += layer.keys.nbytes + layer.values.nbytes
    return total
