"""Everything that darkformer changes in transformers, and why no documented hook does instead.

- `PreTrainedModel.post_init`: a converted model is of its own class (`LlamaForCausalLM`, …), so that everything that
  transformers and others do by class or model type goes on to work. Its feature maps must exist before the weights are
  read; `post_init` runs "at the end of each model initialization".
- `PreTrainedModel._finalize_model_loading`: refuses a checkpoint that lacks tensors which conversion added.
  transformers would only warn. And one whose feature maps hold NaN.
- `PreTrainedModel._initialize_weights`: families' `_init_weights` do not know feature maps, and would leave them as the
  memory was where a model is built on the meta device, or where a checkpoint has tensors of other sizes.
- `PreTrainedConfig.to_json_file`: the file says that the model needs darkformer, see `hf.saved_config`.
  `model.save_pretrained`, `push_to_hub` and `Trainer` end there, and none of them has a hook.
- `PreTrainedConfig.get_config_dict`: takes that back for classes that are called directly
  (`LlamaForCausalLM.from_pretrained`). The Auto classes need no patch: the file's model type is registered with
  `AutoConfig`.
- `Cache.activate_past_recording`: remembers the request on the cache. `generate` makes it before the first token, when
  the layers are still standard ones; those of a converted model take their place later. Applied by `hf.cache`.

The attention and the mask function are not patches: `hf.interface` registers them with `AttentionInterface` and
`AttentionMaskInterface`. Models without a `darkformer` entry in their config run the originals.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError
from .saved_config import as_loaded, as_saved, is_converted, register


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replaces a method of a class by `make(method)`, unless that was done before or there is no such method.

    `make` gets the plain function, of a class method too.
    """
    method = vars(owner).get(name)
    kind = type(method) if isinstance(method, staticmethod | classmethod) else None
    original: Any = method.__func__ if isinstance(method, staticmethod | classmethod) else method
    if original is None or getattr(original, "by_darkformer", False):
        return
    wrapper: Any = functools.wraps(original)(make(original))
    wrapper.by_darkformer = True
    setattr(owner, name, wrapper if kind is None else kind(wrapper))


def _attaching(original: Any) -> Any:
    """`post_init` that first attaches the feature maps which the config describes."""

    def post_init(self: Any) -> None:
        if getattr(self.config, "darkformer", None):
            from .added import OFFSETS
            from .convert import attach_saved

            attach_saved(self)
            # Offsets are read in float32 whatever the model's dtype, so that `settle_offsets` need round none.
            self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), OFFSETS}
        original(self)

    return post_init


def _initializing(original: Any) -> Any:
    """`_initialize_weights`, of one module, that knows feature maps."""

    def initialize(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(self.config, "darkformer", None) and not getattr(module, "_is_hf_initialized", False):
            from ..features.feature_map import FeatureMap
            from .added import initialize_

            if isinstance(module, FeatureMap):
                initialize_(module)
        original(self, module, *args, **kwargs)

    return initialize


def _checking(original: Any) -> Any:
    """`_finalize_model_loading` that refuses incomplete or diverged checkpoints of converted models."""

    def finalize(model: Any, load_config: Any, loading_info: Any) -> Any:
        from .added import check_finite, feature_maps, left_out, settle_offsets
        from .plan import refuse_tensor_parallel

        if next(feature_maps(model), None) is None:  # the config may have the entry for a part of the model only
            if added := sorted(name for name in loading_info.unexpected_keys if ".dark." in name):
                raise InputError(
                    f"{load_config.pretrained_model_name_or_path} is a converted model ({added[0]} and "
                    f"{len(added) - 1} more tensors of it), and the config it was given does not say darkformer, so "
                    "that softmax attention would be computed with its weights: leave `config` out."
                )
            return original(model, load_config, loading_info)
        refuse_tensor_parallel(model)
        older = left_out(model, loading_info.missing_keys)
        missing = sorted(name for name in loading_info.missing_keys - older if ".dark." in name)
        if missing:
            raise InputError(
                f"{load_config.pretrained_model_name_or_path} lacks {len(missing)} tensors of what conversion added "
                f"({', '.join(missing[:3])}, …), though its config.json says darkformer: save the model again. "
                "To convert softmax weights, load them with their own config and call darkformer.convert."
            )
        maps = tuple(f"{name}." for name, _ in feature_maps(model))
        if unknown := sorted(name for name in loading_info.unexpected_keys if name.startswith(maps)):
            raise InputError(
                f"{load_config.pretrained_model_name_or_path} has {len(unknown)} tensors of feature maps that its "
                f"config.json does not describe ({', '.join(unknown[:3])}, …): one of the two was altered."
            )
        attention = tuple(f"{name.rpartition('.')[0]}." for name, _ in feature_maps(model))
        optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
        needed = (name for name in loading_info.missing_keys - older if name.startswith(attention))
        if missing := sorted(name for name in needed if not any(x.search(name) for x in optional)):
            raise InputError(
                f"{load_config.pretrained_model_name_or_path} lacks {len(missing)} tensors of converted layers "
                f"({', '.join(missing[:3])}): its config.json is that of another model ({type(model).__name__})."
            )
        ignored = model._keys_to_ignore_on_load_missing
        model._keys_to_ignore_on_load_missing = {*(ignored or ()), *map(re.escape, older)}
        try:
            info = original(model, load_config, loading_info)
        finally:
            model._keys_to_ignore_on_load_missing = ignored
        settle_offsets(model, older, offloaded="disk" in (load_config.device_map or {}).values())
        # Those on the meta device are in files, which accelerate's hooks read later.
        tensors = {f"{name}.{own}": x for name, fm in feature_maps(model) for own, x in fm.state_dict().items()}
        present = {name: x for name, x in tensors.items() if not x.is_meta}
        check_finite(present, load_config.pretrained_model_name_or_path)
        return info

    return finalize


def patch_models(modeling_utils: Any) -> None:
    """Patches `PreTrainedModel`, so that saved converted models load."""
    _wrap(modeling_utils.PreTrainedModel, "post_init", _attaching)
    _wrap(modeling_utils.PreTrainedModel, "_initialize_weights", _initializing)
    _wrap(modeling_utils.PreTrainedModel, "_finalize_model_loading", _checking)


def _writing(original: Any) -> Any:
    """`to_json_file` that writes a converted model's config so that programs without darkformer refuse it."""

    def to_json_file(self: Any, json_file_path: Any, use_diff: bool = True) -> None:
        config = json.loads(self.to_json_string(use_diff=use_diff))
        if not is_converted(config):
            original(self, json_file_path, use_diff=use_diff)
            return
        text = json.dumps(as_saved(config), indent=2, sort_keys=True)  # as transformers writes it
        Path(json_file_path).write_text(f"{text}\n", encoding="utf-8")

    return to_json_file


def patch_configs(configuration_utils: Any) -> None:
    """Patches `PreTrainedConfig`, so that folders of converted models load with darkformer and not without."""
    base = configuration_utils.PreTrainedConfig

    def reading(original: Any) -> Any:
        def get_config_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
            config, rest = original(cls, *args, **kwargs)
            # `AutoConfig` asks the base class, and looks up the model type that the file has.
            return (config if cls is base else as_loaded(config)), rest

        return get_config_dict

    _wrap(base, "to_json_file", _writing)
    _wrap(base, "get_config_dict", reading)


def patch_caches(cache_utils: Any) -> None:
    """Patches `Cache`, so that `asked_to_record` can answer."""

    def remembering(original: Any) -> Any:
        def activate_past_recording(self: Any) -> None:
            self.record_past = True  # the name that transformers' own recording layers use
            original(self)

        return activate_past_recording

    _wrap(cache_utils.Cache, "activate_past_recording", remembering)


def asked_to_record(cache: Any) -> bool:
    """Whether `activate_past_recording` was called on this cache."""
    return getattr(cache, "record_past", False)


#: What is done to each module of transformers that is imported.
_TARGETS: dict[str, Callable[[Any], None]] = {
    "transformers.modeling_utils": patch_models,
    "transformers.configuration_utils": patch_configs,
    "transformers.models.auto.configuration_auto": register,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Patches one module right after its import, and is removed then."""

    def __init__(self, target: str) -> None:
        self.target = target

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.target:
            return None
        others = (getattr(x, "find_spec", None) for x in sys.meta_path if not isinstance(x, _Finder))
        spec = next((spec for find in others if find and (spec := find(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _TARGETS[name](module)
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Patches what of transformers is imported now, and the rest once it is: `import darkformer` need not import it."""
    waiting = {finder.target for finder in sys.meta_path if isinstance(finder, _Finder)}
    for name, patch in _TARGETS.items():
        if name in sys.modules:
            patch(sys.modules[name])
        elif name not in waiting:
            sys.meta_path.insert(0, _Finder(name))
