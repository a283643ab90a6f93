"""Makes `AutoModelForCausalLM.from_pretrained` understand saved converted models once darkformer is imported.

transformers builds a model from its config, then fills in the saved weights. A converted model's config carries a
`darkformer` entry; its feature maps must exist before the weights come. `PreTrainedModel.post_init`, "executed at the
end of each model initialization", is where they are attached. The wrapper goes on when transformers' modelling module
is imported, so that `import darkformer` does not have to import it. A second wrapper refuses a checkpoint without
some of what conversion added: transformers would only warn, and compute with whatever the memory held.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ..errors import InputError

_TARGET = "transformers.modeling_utils"


def _wrap_post_init(modeling_utils: Any) -> None:
    original = modeling_utils.PreTrainedModel.post_init
    if getattr(original, "by_darkformer", False):
        return

    def post_init(self: Any) -> None:
        if getattr(self.config, "darkformer", None):
            from .added import OFFSETS
            from .convert import attach_saved

            attach_saved(self)
            # Offsets are read in float32 whatever the model's dtype, so that `settle_offsets` need round none.
            self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), OFFSETS}
        original(self)

    post_init.by_darkformer = True  # type: ignore[attr-defined]
    post_init.__doc__ = original.__doc__
    modeling_utils.PreTrainedModel.post_init = post_init


def _wrap(modeling_utils: Any) -> None:
    _wrap_post_init(modeling_utils)
    _wrap_finalize(modeling_utils)


def _wrap_finalize(modeling_utils: Any) -> None:
    original = getattr(modeling_utils.PreTrainedModel, "_finalize_model_loading", None)
    if original is None or getattr(original, "by_darkformer", False):
        return

    def finalize(model: Any, load_config: Any, loading_info: Any) -> Any:
        from .added import feature_maps, left_out, settle_offsets
        from .plan import refuse_tensor_parallel

        if next(feature_maps(model), None) is None:  # the config may say it for a part of the model only
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
        ignored = model._keys_to_ignore_on_load_missing
        model._keys_to_ignore_on_load_missing = {*(ignored or ()), *map(re.escape, older)}
        try:
            info = original(model, load_config, loading_info)
        finally:
            model._keys_to_ignore_on_load_missing = ignored
        settle_offsets(model, older, offloaded="disk" in (load_config.device_map or {}).values())
        return info

    finalize.by_darkformer = True  # type: ignore[attr-defined]
    modeling_utils.PreTrainedModel._finalize_model_loading = staticmethod(finalize)


class _Loader(importlib.abc.Loader):
    """Loads as the original loader does, then wraps."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.original.exec_module(module)
        _wrap(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


class _Finder(importlib.abc.MetaPathFinder):
    """Answers for `transformers.modeling_utils` by asking the finders after itself; goes once it was imported."""

    def __init__(self) -> None:
        self.asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TARGET or self.asking:
            return None
        self.asking = True  # the finders after this one are asked through the same door
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Wraps now if transformers is loaded, else when it will be."""
    if _TARGET in sys.modules:
        _wrap(sys.modules[_TARGET])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
