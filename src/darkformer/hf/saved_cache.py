"""Caches in files: a long prompt is computed once, and any later process goes on from its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from .._version import __version__
from ..config import DarkConfig
from ..errors import ConversionError, InputError, NonFiniteError
from ..features.feature_map import FeatureMap
from ..ops.state import LARGEST_COUNT, AttentionState, check_state, compute_dtype
from .added import added_values
from .cache import DarkCacheLayer, Stream, check_even, has_all_keys
from .fingerprint import digest, digest_own
from .layers import config_of, converted_modules, layer_of, map_of
from .parts import parts_of
from .sealed import read_sealed, write_sealed

#: Version of the file's layout. A reader refuses higher ones. Files with a prompt have the second, others the first.
LAYOUT = 2
FIELDS = [f.name for f in dataclasses.fields(AttentionState)]
#: Relative, of a sum.
_ROUNDING = 1e-3
#: Names of tensors that are keys and values as they came.
_OF_TOKENS = ("recent_key", "recent_value", "sink_key", "sink_value", "keys", "values")
#: Types that autocast, and families that turn keys in float32, leave behind whatever the model's own is.
_ANYWHERE = (torch.float32, torch.bfloat16, torch.float16)


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    """What a state depends on. Takes one pass over the weights.

    Raises:
        ConversionError: no layer of the model keeps a state. InputError: it has no weights.
    """
    if not _slots(model):
        why = "keeps softmax in every head" if converted_modules(model) else "is not converted"
        raise ConversionError(f"{type(model).__name__} {why}: its cache is transformers' own.")
    weights = digest_own(model)
    if weights is None:
        raise InputError("the model has no weights (meta device), and a cache belongs to the weights that filled it.")
    return {"configuration": config_of(model).to_dict(), "features": digest(added_values(model)), "weights": weights}


def _slots(model: PreTrainedModel, *, exact: bool = False) -> dict[int, Any]:
    """Layer of the cache → the converted module that fills it: of those with a state, or (`exact`) of the others."""
    layers = ((module, layer_of(module)) for module in converted_modules(model))
    return {slot: module for module, layer in layers if layer.exact == exact for slot in layer.slots}


def cache_of(model: PreTrainedModel, states: Mapping[int, AttentionState], seen: int) -> DynamicCache:
    """A cache whose converted layers hold `states`, by layer of the cache, after `seen` tokens (padding included).

    For programs that keep states themselves, as an exported one does.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for slot, module in _slots(model).items():
        if len(parts := parts_of(layer_of(module), map_of(module))) > 1 or parts[0].feature_map is None:
            raise ConversionError(f"layer {slot} has exact heads or heads of several kinds: one state is not enough.")
        own = DarkCacheLayer().bind(module)
        own.streams[0].hold(states[slot])
        own.seen, own.is_initialized = seen, True
        cache.layers[slot] = own
    return cache


def _tensors_of(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A layer's entry in the header, and its tensors by name.

    Raises:
        ConversionError: it holds the states of a recurrent mixer.
    """
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        raise ConversionError("the cache holds states of a recurrent mixer (Mamba and its kin), which are not saved.")
    if not hasattr(layer, "get_seq_length"):
        return {"kind": "softmax", "seen": 0}, {}  # it keeps nothing: its attention reads another layer's keys, or none
    if isinstance(layer, DarkCacheLayer):
        tensors = {
            f"{prefix}{name}": getattr(stream.state, name)
            for prefix, stream in zip(_prefixes(len(layer.streams)), layer.streams, strict=True)
            if stream.filled
            for name in FIELDS
        }
        exact = layer.exact_layers if layer.filled else []
        for prefix, kept in zip(_prefixes(len(exact)), exact, strict=True):
            keys, values = _keys_and_values(kept)
            tensors |= {f"{prefix}keys": keys, f"{prefix}values": values}
        if layer.exact_mask is not None and layer.filled:
            tensors["real"] = layer.exact_mask
        return {"kind": "state", "seen": layer.seen, "streams": len(layer.streams), "exact": len(exact)}, tensors
    seen = int(layer.get_seq_length())
    if layer.is_sliding:
        if isinstance(layer, StaticLayer):
            raise ConversionError("a static cache of sliding-window layers is not saved: use a dynamic one.")
        tensors = {} if seen == 0 else {"keys": layer.keys, "values": layer.values}
        return {"kind": "sliding", "seen": seen}, tensors
    tensors = {} if seen == 0 else dict(zip(("keys", "values"), _keys_and_values(layer), strict=True))
    return {"kind": "softmax", "seen": seen}, tensors


def _keys_and_values(layer: Any) -> tuple[Tensor, Tensor]:
    """All keys and values (B, G, T, d) of a layer that keeps softmax.

    Raises:
        ConversionError: it keeps them in another form.
    """
    if not has_all_keys(layer):
        raise ConversionError(f"a cache of {type(layer).__name__} is not saved: use a dynamic or a static one.")
    length = int(layer.get_seq_length())  # a static layer has room for more than it has read
    return layer.keys[:, :, :length], layer.values[:, :, :length]


def _prefixes(streams: int) -> list[str]:
    """Prefixes of the names of each stream's tensors; the first has none, as in files of one stream."""
    return ["", *(f"stream{i}." for i in range(1, streams))][:streams]


@dataclasses.dataclass(frozen=True, eq=False)  # two tensors are not simply equal or not
class Prompt:
    """What a cache has read, where its file says so.

    Attributes:
        tokens: (L,) int64, the ids that it has read.
        text: that they are the beginning of.
        role: of the chat message that the text is; empty for plain text.
    """

    tokens: Tensor
    text: str
    role: str = ""


def save_cache(cache: Cache, model: PreTrainedModel, file: str | Path, *, prompt: Prompt | None = None) -> Path:
    """Saves what the model has read: states of converted layers, keys and values of the others (safetensors).

    Args:
        cache: `past_key_values` of the model's output or of `generate(..., return_dict_in_generate=True)`.
        model: the converted model that filled it; its fingerprint goes into the file.
        prompt: what it has read, if the file is to say so.

    Returns:
        The file's path.

    Raises:
        ConversionError: the model is not converted, another one filled the cache, or a forward pass was interrupted.
    """
    for slot, module in _slots(model).items():
        layer = cache.layers[slot] if slot < len(cache.layers) else None
        if not isinstance(layer, DarkCacheLayer):
            raise ConversionError(f"layer {slot} of the cache holds no state: run the model with it first.")
        layer.bind(module).check_whole()
        check_even(cache, layer, 0, module.config)
    described = [_tensors_of(layer) for layer in cache.layers]
    tensors = {f"layers.{i}.{name}": x for i, (_, of_layer) in enumerate(described) for name, x in of_layer.items()}
    header = {
        "layout": 1, "version": __version__, "layers": [kind for kind, _ in described], **_identity(model),
    }  # fmt: skip
    if prompt is not None:
        header |= {"layout": LAYOUT, "text": prompt.text, "role": prompt.role}
        tensors["tokens"] = prompt.tokens
    file = Path(file)
    write_sealed(file, "darkformer_cache", header, tensors)
    return file


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not file.is_file():
        raise InputError(f"{file}: no such file.")
    fields = {"configuration": dict, "features": str, "weights": str, "layers": list}
    return read_sealed(file, "darkformer_cache", LAYOUT, fields=fields, what="cache", writer="darkformer.save_cache")


def _number(described: Any, name: str, default: int | None = None) -> int:
    """A number of tokens or tensors in a layer's entry of the header."""
    value = described.get(name, default) if isinstance(described, dict) else None
    if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
        raise InputError(f"its header says {name} = {value!r}.")
    return value


def _take(stored: dict[str, Tensor], name: str) -> Tensor:
    """Removes a tensor from those that nobody has asked for yet."""
    if name not in stored:
        raise InputError(f"{name} is missing.")
    return stored.pop(name)


def _state(stored: dict[str, Tensor], prefix: str, fm: FeatureMap, seen: int, batch: int) -> AttentionState:
    """A state that `fm` can have left behind after `seen` tokens, padding included, of `batch` rows."""
    state = AttentionState(**{name: _take(stored, f"{prefix}{name}") for name in FIELDS})
    config = fm.config
    value_dim = state.recent_value.shape[-1] if state.recent_value.dim() else 0
    for name, tokens in (("recent", config.window), ("sink", config.sinks)):  # before memory is taken for as many
        for kind, n in (("key", fm.head_dim), ("value", value_dim)):
            shape = getattr(state, f"{name}_{kind}").shape
            if shape != (batch, fm.num_kv_heads, tokens, n):
                raise InputError(f"{prefix}{name}_{kind} has shape {tuple(shape)}.")
    key, value = (state.recent_key.new_empty(batch, fm.num_kv_heads, 0, n) for n in (fm.head_dim, value_dim))
    expected = AttentionState.expanded(config, key, value, batch=batch, compute=compute_dtype(key))
    for name in FIELDS:
        if (x := getattr(state, name)).dtype != getattr(expected, name).dtype:
            raise InputError(f"{prefix}{name} has dtype {x.dtype}.")
    check_state(state, expected)
    far = (state.count - config.window - config.sinks).clamp(min=0)[:, None, None]
    # No key adds more than 1 to a scaled sum.
    possible = (state.feature_sum >= 0) & (state.feature_sum <= far * (1 + _ROUNDING))
    if bool((state.count > seen).any()) or not bool(possible.all()):
        raise InputError(f"its sums or counts are not those of {seen} tokens.")
    return state


def _kept(
    stored: dict[str, Tensor], prefix: str, batch: int, least: int, most: int, shape: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, T, d) of softmax attention, T from `least` to `most`.

    Args:
        shape: (G, d) of the keys, where it is known.
    """
    keys, values = _take(stored, f"{prefix}keys"), _take(stored, f"{prefix}values")
    for name, x in (("keys", keys), ("values", values)):
        if x.dim() != 4 or x.shape[0] != batch or not least <= x.shape[2] <= most or x.shape[:3] != keys.shape[:3]:
            raise InputError(f"{prefix}{name} has shape {tuple(x.shape)}, after {most} tokens of {batch} rows.")
        if x is keys and shape not in (None, (x.shape[1], x.shape[3])):
            raise InputError(
                f"{prefix}{name} has shape {tuple(x.shape)}, for {shape[0]} heads of dimension {shape[1]}."
            )
        if x.dtype != keys.dtype:
            raise InputError(f"{prefix}{name} has dtype {x.dtype}.")
        if not bool(x.isfinite().all()):
            raise NonFiniteError(f"{prefix}{name} holds NaN or infinity.")
    return keys, values


def _fill(own: DarkCacheLayer, module: Any, described: Any, stored: dict[str, Tensor], batch: int) -> None:
    """Puts what was read into a new layer of a converted module."""
    layer, seen = layer_of(module), _number(described, "seen")
    parts = parts_of(layer, map_of(module)) * layer.calls
    maps = [part.feature_map for part in parts if part.feature_map is not None]
    exact = [part for part in parts if part.feature_map is None]
    if (_number(described, "streams", 1), _number(described, "exact", 0)) != (len(maps), len(exact)):
        raise InputError(f"it needs {len(maps)} states and {len(exact)} sets of exact heads.")
    states = [_state(stored, prefix, fm, seen, batch) for prefix, fm in zip(_prefixes(len(maps)), maps, strict=True)]
    counts = [state.count for state in states]
    if "real" in stored:
        own.exact_mask = _take(stored, "real")
        if own.exact_mask.dtype != torch.bool or own.exact_mask.shape != (batch, seen):
            raise InputError(f"real is {own.exact_mask.dtype} of shape {tuple(own.exact_mask.shape)}.")
        counts.append(own.exact_mask.sum(1))
    if not all(torch.equal(x, counts[0]) for x in counts):
        raise InputError("its heads have read different numbers of tokens.")
    own.streams = [Stream() for _ in states]
    for stream, state in zip(own.streams, states, strict=True):
        stream.hold(state)
    for prefix, part in zip(_prefixes(len(exact)), exact, strict=True):
        keys, values = _kept(stored, prefix, batch, seen, seen, (len(part.heads), layer.head_dim))
        own.exact_layers.append(DynamicLayer())
        own.exact_layers[-1].update(keys, values)
    own.seen, own.is_initialized = seen, True


def _layer(
    module: Any, empty: Any, described: Any, stored: dict[str, Tensor], batch: int, shape: tuple[int, int] | None
) -> Any:
    """A layer of the cache with what was stored for it; of `stored` remains what does not belong to it.

    Whoever wrote a file could compute its checksum too, and compiled code will read as much memory as the layer needs:
    nothing in it is taken as right.

    Args:
        module: the converted module that fills the layer; None for others.
        empty: the layer in a new cache. shape: (heads, dimension) of its keys, where it is known.
    """
    seen, kind = _number(described, "seen"), described.get("kind")
    sliding = isinstance(empty, DynamicSlidingWindowLayer)
    if kind not in (("state",) if module is not None else ("softmax", "sliding") if sliding else ("softmax",)):
        raise InputError(f"its kind is {kind!r}.")
    if module is not None:
        own = DarkCacheLayer().bind(module)
        if seen:
            _fill(own, module, described, stored, batch)
        return own
    if kind == "softmax" and sliding:
        empty = DynamicLayer()  # a cache that was made without the model's config keeps all keys
    if seen:
        needed = min(seen, empty.sliding_window - 1) if kind == "sliding" else seen
        keys, values = _kept(stored, "", batch, needed, seen, shape)
        first = keys.shape[2] - needed  # a recording layer keeps more than its window
        empty.lazy_initialization(keys, values)
        empty.keys, empty.values = keys[:, :, first:], values[:, :, first:]
        if kind == "sliding":
            empty.cumulative_length = seen
    return empty


def _prompt(header: dict[str, Any], tensors: dict[str, Tensor], seen: int, batch: int) -> Prompt | None:
    """Removes the prompt from what was read of a file, if it has one: the `seen` tokens of its only row."""
    if "tokens" not in tensors:
        return None
    tokens = tensors.pop("tokens")
    if tokens.dtype != torch.int64 or tokens.shape != (seen,) or batch != 1:
        raise InputError(
            f"tokens is {tokens.dtype} of shape {tuple(tokens.shape)}, after {seen} tokens of {batch} rows."
        )
    if not isinstance(header.get("text"), str) or not isinstance(header.get("role"), str):
        raise InputError("its header lacks the text of its tokens.")
    return Prompt(tokens, header["text"], header["role"])


def load_cache(file: str | Path, model: PreTrainedModel) -> DynamicCache:
    """A cache from `save_cache`, to pass as `past_key_values`.

    Raises:
        InputError: a damaged file, or one of another model, of other draws or of another configuration, or with tensors
            that this model's layers cannot have left behind. NonFiniteError: it holds NaN or infinity.
        ConfigError: a newer version wrote it. ConversionError: the model is not converted.
    """
    return load_with_prompt(file, model)[0]


def load_with_prompt(file: str | Path, model: PreTrainedModel) -> tuple[DynamicCache, Prompt | None]:
    """`load_cache`, and what the cache has read if the file says so.

    Raises:
        InputError: a damaged file, or one of another model, of other draws or of another configuration, or with tensors
            that this model's layers cannot have left behind. NonFiniteError: it holds NaN or infinity.
        ConfigError: a newer version wrote it. ConversionError: the model is not converted.
    """
    file = Path(file)
    header, tensors = _read(file)
    identity = _identity(model)
    # A file of an earlier version lacks the fields that were added later, which have their defaults.
    header["configuration"] = DarkConfig.from_dict(header["configuration"]).to_dict()
    there, here = header["configuration"], identity["configuration"]
    fields = ", ".join(f"{k}: {there[k]!r} there, {here[k]!r} here" for k in here if there[k] != here[k])
    meaning = {
        "configuration": f"its configuration is another one, {fields}",
        "features": "its draws or what calibration and training made of its features are others",
        "weights": "its weights are others, or the same in another dtype",
    }
    if reasons := [text for name, text in meaning.items() if header[name] != identity[name]]:
        raise InputError(f"{file}: belongs to another model ({'; '.join(reasons)}): compute the prompt again.")
    cache, modules = DynamicCache(config=model.config.get_text_config(decoder=True)), _slots(model)
    softmax = {slot: layer_of(module) for slot, module in _slots(model, exact=True).items()}
    shapes = {slot: (layer.num_kv_heads, layer.head_dim) for slot, layer in softmax.items()}
    described = header["layers"]
    if not max(modules) < len(described) <= len(cache.layers):
        raise InputError(f"{file}: holds {len(described)} layers, the model's cache has {len(cache.layers)}.")
    batch = next((len(x) for name, x in tensors.items() if name.endswith(".count") and x.dim() == 1), 0)
    for i in range(len(described)):
        prefix = f"layers.{i}."
        names = [name for name in tensors if name.startswith(prefix)]
        stored = {name.removeprefix(prefix): tensors.pop(name).to(model.device) for name in names}
        try:
            for name, x in stored.items():
                if name.endswith(_OF_TOKENS) and x.dtype not in (model.dtype, *_ANYWHERE):
                    raise InputError(f"{name} has dtype {x.dtype}, in a model of {model.dtype}.")
            cache.layers[i] = _layer(modules.get(i), cache.layers[i], described[i], stored, batch, shapes.get(i))
            if stored:
                raise InputError(f"{', '.join(sorted(stored)[:3])} belong to no layer of its kind.")
        except InputError as error:
            raise type(error)(f"{file}: layer {i} is not one that save_cache wrote for this model: {error}") from error
    states = [layer.state for layer in cache.layers if isinstance(layer, DarkCacheLayer)]
    counts = [state.count for state in states if state is not None]
    read = {x["seen"] for x in described} - {0}  # layers that keep nothing have read 0
    if len(read) > 1 or not all(torch.equal(x, counts[0]) for x in counts):
        raise InputError(f"{file}: its layers have read different numbers of tokens ({sorted(read)}).")
    try:
        prompt = _prompt(header, tensors, _number(described[min(modules)], "seen"), batch)
    except InputError as error:
        raise InputError(f"{file}: its prompt is not one that save_cache wrote: {error}") from error
    if tensors:
        raise InputError(f"{file}: {', '.join(sorted(tensors)[:3])} belong to no layer.")
    return cache, prompt
