"""Caches in files: a long prompt is computed once, and any later process goes on from its state."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer

from .._version import __version__
from ..config import DarkConfig
from ..errors import ConversionError, InputError
from ..ops.state import AttentionState
from .added import added_values
from .cache import DarkCacheLayer, Stream, whole
from .fingerprint import digest, digest_own
from .layers import config_of, converted_modules, layer_of, map_of
from .parts import parts_of
from .sealed import checksum, read_sealed, write_sealed

#: Version of the file's layout. A reader refuses higher ones.
LAYOUT = 1
FIELDS = [f.name for f in dataclasses.fields(AttentionState)]


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    """What a state depends on: one pass over the weights."""
    modules = converted_modules(model)
    if not modules:
        raise ConversionError(f"{type(model).__name__} is not converted: its cache is transformers' own.")
    weights = digest_own(model)
    if weights is None:
        raise InputError("the model's weights are out of reach (meta device), and a cache belongs to its weights.")
    return {"configuration": config_of(model).to_dict(), "features": digest(added_values(model)), "weights": weights}


def _slots(model: PreTrainedModel) -> dict[int, Any]:
    """Converted modules with a state, by the layers of the cache that they fill."""
    layers = ((module, layer_of(module)) for module in converted_modules(model))
    return {slot: module for module, layer in layers if not layer.exact for slot in layer.slots}


def cache_of(model: PreTrainedModel, states: Mapping[int, AttentionState], seen: int) -> DynamicCache:
    """A cache whose converted layers hold `states`, by layer of the cache, after `seen` tokens (padding included).

    For programs that keep states themselves, as an exported one does.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for slot, module in _slots(model).items():
        if len(parts := parts_of(layer_of(module), map_of(module))) > 1 or parts[0].feature_map is None:
            raise ConversionError(f"layer {slot} has exact heads or heads of several kinds: one state does not do.")
        own = DarkCacheLayer().bind(module)
        own.state, own.seen, own.is_initialized = states[slot], seen, True
        cache.layers[slot] = own
    return cache


def _tensors_of(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a layer is, and its tensors by name.

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
        exact = layer.kept if layer.filled else []
        for prefix, kept in zip(_prefixes(len(exact)), exact, strict=True):
            keys, values = _keys_and_values(kept)
            tensors |= {f"{prefix}keys": keys, f"{prefix}values": values}
        if layer.real is not None and layer.filled:
            tensors["real"] = layer.real
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
    if not whole(layer):
        raise ConversionError(f"a cache of {type(layer).__name__} is not saved: use a dynamic or a static one.")
    length = int(layer.get_seq_length())  # a static layer has room for more than it has read
    return layer.keys[:, :, :length], layer.values[:, :, :length]


def _prefixes(streams: int) -> list[str]:
    """What stands before the names of each stream's tensors; nothing for the first, as in files of one stream."""
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
    tensors = {f"layers.{i}.{name}": x for i, (_, given) in enumerate(described) for name, x in given.items()}
    header = {
        "layout": LAYOUT, "version": __version__, "layers": [kind for kind, _ in described], **_identity(model),
    }  # fmt: skip
    file = Path(file)
    write_sealed(file, "darkformer_cache", header, tensors)
    return file


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not file.is_file():
        raise InputError(f"{file}: no such file.")
    try:
        metadata, tensors = read_sealed(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read ({error}): it is damaged, or no safetensors file.") from error
    if "darkformer_cache" not in metadata:
        raise InputError(f"{file}: holds no cache; darkformer.save_cache writes one.")
    header = json.loads(metadata["darkformer_cache"])
    if header["layout"] > LAYOUT:
        raise InputError(f"{file}: written by darkformer {header['version']}, newer than {__version__}: upgrade.")
    if checksum(header, tensors) != metadata.get("checksum"):
        raise InputError(f"{file}: its checksum does not fit its content: it is damaged; save the cache again.")
    return header, tensors


def load_cache(file: str | Path, model: PreTrainedModel) -> DynamicCache:
    """A cache from `save_cache`, to pass as `past_key_values`.

    Raises:
        InputError: a damaged file, or one of another model, of other draws or of another configuration.
        ConfigError: a newer version wrote it. ConversionError: the model is not converted.
    """
    file = Path(file)
    header, tensors = _read(file)
    identity = _identity(model)
    # What an earlier version wrote lacks the fields that came later: they have their defaults.
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
        given = {name: tensors[f"layers.{i}.{name}"].to(device) for name in _names(tensors, i)}
        if described["kind"] == "state":
            own = DarkCacheLayer().bind(modules[i])
            own.streams = [Stream() for _ in range(described.get("streams", 1))]
            for prefix, stream in zip(_prefixes(len(own.streams)), own.streams, strict=True):
                if f"{prefix}count" in given:
                    stream.hold(AttentionState(**{name: given[f"{prefix}{name}"] for name in FIELDS}))
            for prefix in _prefixes(described.get("exact", 0)):
                own.kept.append(DynamicLayer())
                own.kept[-1].update(given[f"{prefix}keys"], given[f"{prefix}values"])
            own.real = given.get("real")
            own.seen, own.is_initialized = described["seen"], own.filled
            cache.layers[i] = own
        elif given:
            layer: Any = cache.layers[i]
            layer.lazy_initialization(given["keys"], given["values"])
            layer.keys, layer.values = given["keys"], given["values"]
            if described["kind"] == "sliding":
                layer.cumulative_length = described["seen"]
    return cache


def _names(tensors: dict[str, Tensor], layer: int) -> list[str]:
    prefix = f"layers.{layer}."
    return [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
