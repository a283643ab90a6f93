"""Caches in files: a long prompt is computed once, and any later process goes on from its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer

from .._version import __version__
from ..config import DarkConfig
from ..errors import ConversionError, InputError
from ..ops.state import AttentionState
from .added import added_values
from .cache import DarkCacheLayer, Stream, has_all_keys
from .fingerprint import digest, digest_own
from .layers import config_of, converted_modules, layer_of, map_of
from .parts import parts_of
from .sealed import read_sealed, write_sealed

#: Version of the file's layout. A reader refuses higher ones.
LAYOUT = 1
FIELDS = [f.name for f in dataclasses.fields(AttentionState)]


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    """What a state depends on. Takes one pass over the weights."""
    modules = converted_modules(model)
    if not modules:
        raise ConversionError(f"{type(model).__name__} is not converted: its cache is transformers' own.")
    weights = digest_own(model)
    if weights is None:
        raise InputError("the model has no weights (meta device), and a cache belongs to the weights that filled it.")
    return {"configuration": config_of(model).to_dict(), "features": digest(added_values(model)), "weights": weights}


def _slots(model: PreTrainedModel) -> dict[int, Any]:
    """Layer of the cache → the converted module that fills it, of those with a state."""
    layers = ((module, layer_of(module)) for module in converted_modules(model))
    return {slot: module for module, layer in layers if not layer.exact for slot in layer.slots}


def cache_of(model: PreTrainedModel, states: Mapping[int, AttentionState], seen: int) -> DynamicCache:
    """A cache whose converted layers hold `states`, by layer of the cache, after `seen` tokens (padding included).

    For programs that keep states themselves, as an exported one does.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for slot, module in _slots(model).items():
        if len(parts := parts_of(layer_of(module), map_of(module))) > 1 or parts[0].feature_map is None:
            raise ConversionError(f"layer {slot} has exact heads or heads of several kinds: one state is not enough.")
        own = DarkCacheLayer().bind(module)
        own.state, own.seen, own.is_initialized = states[slot], seen, True
        cache.layers[slot] = own
    return cache


def _tensors_of(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A layer's entry in the header, and its tensors by name.

    Raises:
        ConversionError: it holds the states of a recurrent mixer.
    """
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        raise ConversionError("the cache holds states of a recurrent mixer (Mamba and its kin), which are not saved.")
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


def save_cache(cache: Cache, model: PreTrainedModel, file: str | Path) -> Path:
    """Saves what the model has read: states of converted layers, keys and values of the others (safetensors).

    Args:
        cache: `past_key_values` of the model's output or of `generate(..., return_dict_in_generate=True)`.
        model: the converted model that filled it; its fingerprint goes into the file.

    Returns:
        The file's path.

    Raises:
        ConversionError: the model is not converted, or another one filled the cache.
    """
    for slot, module in _slots(model).items():
        layer = cache.layers[slot] if slot < len(cache.layers) else None
        if not isinstance(layer, DarkCacheLayer):
            raise ConversionError(f"layer {slot} of the cache holds no state: run the model with it first.")
        layer.bind(module)
    described = [_tensors_of(layer) for layer in cache.layers]
    tensors = {f"layers.{i}.{name}": x for i, (_, of_layer) in enumerate(described) for name, x in of_layer.items()}
    header = {
        "layout": LAYOUT, "version": __version__, "layers": [kind for kind, _ in described], **_identity(model),
    }  # fmt: skip
    file = Path(file)
    write_sealed(file, "darkformer_cache", header, tensors)
    return file


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not file.is_file():
        raise InputError(f"{file}: no such file.")
    return read_sealed(file, "darkformer_cache", LAYOUT, what="cache", writer="darkformer.save_cache")


def load_cache(file: str | Path, model: PreTrainedModel) -> DynamicCache:
    """A cache from `save_cache`, to pass as `past_key_values`.

    Raises:
        InputError: a damaged file, or one of another model, of other draws or of another configuration.
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
        "weights": "its weights are others",
    }
    if reasons := [text for name, text in meaning.items() if header[name] != identity[name]]:
        raise InputError(f"{file}: belongs to another model ({'; '.join(reasons)}): compute the prompt again.")
    device = model.device
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    modules = _slots(model)
    for i, described in enumerate(header["layers"]):
        prefix = f"layers.{i}."
        stored = {name.removeprefix(prefix): x.to(device) for name, x in tensors.items() if name.startswith(prefix)}
        if described["kind"] == "state":
            own = DarkCacheLayer().bind(modules[i])
            own.streams = [Stream() for _ in range(described.get("streams", 1))]
            for prefix, stream in zip(_prefixes(len(own.streams)), own.streams, strict=True):
                if f"{prefix}count" in stored:
                    stream.hold(AttentionState(**{name: stored[f"{prefix}{name}"] for name in FIELDS}))
            for prefix in _prefixes(described.get("exact", 0)):
                own.exact_layers.append(DynamicLayer())
                own.exact_layers[-1].update(stored[f"{prefix}keys"], stored[f"{prefix}values"])
            own.exact_mask = stored.get("real")
            own.seen, own.is_initialized = described["seen"], own.filled
            cache.layers[i] = own
        elif stored:
            layer: Any = cache.layers[i]
            layer.lazy_initialization(stored["keys"], stored["values"])
            layer.keys, layer.values = stored["keys"], stored["values"]
            if described["kind"] == "sliding":
                layer.cumulative_length = described["seen"]
    return cache
