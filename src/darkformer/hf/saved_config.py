"""`config.json` of a converted model: what makes programs without darkformer refuse it, and how it is read back.

The weights of a converted model fit the model that it was converted from, so a program that knows only that model would
load them and compute softmax attention. Three entries of the file prevent it:

- `model_type` is `darkformer`. The Auto classes of transformers, vLLM and others do not know it;
- `architectures` are those of the model with `Darkformer` in front;
- `transformers_weights` has a sentence where transformers expects the name of a file. A model class that is called
  directly (`LlamaForCausalLM.from_pretrained`) takes any model type, but refuses the sentence, and shows it.

The model's own entries stay recoverable: `darkformer_model_type` is its `model_type`, and `architectures` are its own
once `Darkformer` is removed. In memory a config is that of the model itself: `hf.patches` applies `as_saved` where a
config is written and `as_loaded` where it is read. Folders of version 0.1.0 have none of the three, and load as before.

Configs with code of their own (`auto_map`) keep their model type, by which that code is looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError

MODEL_TYPE = "darkformer"
#: The model's own `model_type`, in the file.
OWN_MODEL_TYPE = "darkformer_model_type"
#: In front of the names of architectures, in the file.
PREFIX = "Darkformer"
#: What transformers shows of a folder that it cannot load.
NEEDS = "this model needs darkformer. Install it (pip install 'darkformer[hf]') and `import darkformer` before loading"


def is_converted(config: Mapping[str, Any]) -> bool:
    """Whether a config as plain values, or one inside it, is that of a converted model."""
    return "darkformer" in config or any(isinstance(x, Mapping) and is_converted(x) for x in config.values())


def as_saved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a converted model's `config.json`, from its config as plain values."""
    saved = {**config, "transformers_weights": NEEDS}
    if "auto_map" not in config:
        names = config.get("architectures") or []
        saved |= {
            "model_type": MODEL_TYPE,
            OWN_MODEL_TYPE: config["model_type"],
            "architectures": [f"{PREFIX}{name}" for name in names],
        }
    return saved


def as_loaded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `as_saved`; any other config stays as it is."""
    loaded = dict(config)
    if loaded.get("transformers_weights") == NEEDS:
        del loaded["transformers_weights"]
    if OWN_MODEL_TYPE in loaded:
        loaded["model_type"] = loaded.pop(OWN_MODEL_TYPE)
        loaded["architectures"] = [name.removeprefix(PREFIX) for name in loaded.get("architectures") or []] or None
    return loaded


def register(configuration_auto: Any) -> None:
    """Registers `MODEL_TYPE` with transformers' `AutoConfig`, which then returns the model's own config."""
    if MODEL_TYPE in configuration_auto.CONFIG_MAPPING:
        return

    class DarkformerConfig(configuration_auto.PreTrainedConfig):
        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            own = as_loaded(config_dict)
            kind = own.get("model_type")
            if kind == MODEL_TYPE or kind not in configuration_auto.CONFIG_MAPPING:
                raise InputError(
                    f"config.json says {OWN_MODEL_TYPE} = {config_dict.get(OWN_MODEL_TYPE)!r}: it must name a model "
                    "type that the installed transformers knows. Upgrade transformers, or save the model again."
                )
            return configuration_auto.CONFIG_MAPPING[kind].from_dict(own, **kwargs)

    configuration_auto.AutoConfig.register(MODEL_TYPE, DarkformerConfig)
