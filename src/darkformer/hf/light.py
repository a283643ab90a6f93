"""The light form of a converted model: only what conversion added, and which weights it belongs to.

One safetensors file of a few megabytes. Loading it runs no code from the folder, and every way in which it can be
wrong (damaged, of another base, of a newer version) is an error instead of a model that is silently different.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .._version import __version__
from ..config import DarkConfig
from ..errors import ConversionError, InputError
from .added import DTYPES, added_values, check_finite, set_added
from .convert import convert_by, revert
from .fingerprint import check_description, describe_base
from .layers import config_of, dark_layers
from .plan import plan_conversion
from .sealed import read_sealed, write_sealed

LIGHT_FILE = "darkformer.safetensors"
#: Version of the file's layout. A reader refuses higher ones, and goes on reading lower ones.
LAYOUT = 1


def save_light(model: PreTrainedModel, folder: str | Path) -> Path:
    """Saves what conversion added (M, Ω, centres, balance, bias, proposal, configuration), not the base model.

    Only a model whose own weights are those it had before `convert` can be saved so: calibrated, or trained with
    `train="geometry"`. Writes `folder/darkformer.safetensors` with the base model's name and the fingerprint of its
    weights, and returns its path.

    Raises:
        ConversionError: the model is not converted, or its own weights have changed since (full fine-tuning, LoRA
            merged or not, another dtype): `model.save_pretrained` saves such a model.
    """
    if not isinstance(model, PreTrainedModel) or next(dark_layers(model), None) is None:
        raise ConversionError(
            f"received {type(model).__name__}, which is no converted transformers model: the light form holds what "
            "darkformer.convert added. An adapter of peft is saved by its own save_pretrained."
        )
    known, now = getattr(model.config, "darkformer_base", None), describe_base(model)
    if known is None or now is None:
        raise ConversionError(
            "it is not known which weights this model was converted from (it was saved by a version without the light "
            "form, or built without weights): use model.save_pretrained(folder), which saves everything."
        )
    if known["fingerprint"] != now["fingerprint"]:
        raise ConversionError(
            f"the model's own weights are no longer those of {known['name']} ({known['dtype']}; now {now['dtype']}), "
            "so the light form would lose what they have become. Save everything with model.save_pretrained(folder), "
            "or keep the base as it is: train='geometry', or LoRA by peft."
        )
    header = {"layout": LAYOUT, "version": __version__, "config": config_of(model).to_dict(), "base": dict(known)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / LIGHT_FILE, "darkformer", header, added_values(model))
    return folder / LIGHT_FILE


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not file.is_file():
        raise InputError(
            f"{file.parent} holds no {LIGHT_FILE}: load_light reads what save_light wrote. "
            "A folder of save_pretrained is loaded by darkformer.load_model."
        )
    return read_sealed(
        file, "darkformer", LAYOUT, fields={"config": dict, "base": dict}, what="light form", writer="save_light"
    )


def _check_base(model: nn.Module, wanted: dict[str, Any]) -> None:
    check_description(wanted, "the light form's header")
    base = describe_base(model)
    if base is None:
        raise InputError("the base model has no weights (meta device): load them first.")
    if base["fingerprint"] == wanted["fingerprint"]:
        return
    dtype = "" if base["dtype"] == wanted["dtype"] else f" and was converted in {wanted['dtype']}"
    raise InputError(
        f"the light form belongs to the weights of {wanted['name']}{dtype}; received {base['name']} in "
        f"{base['dtype']}, whose weights differ (fingerprint {base['fingerprint'][:12]}, not "
        f"{wanted['fingerprint'][:12]}). Load the right base in {wanted['dtype']}; model.to(dtype) afterwards is fine."
    )


def _fill(model: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    added = added_values(model)
    missing, unknown = sorted(set(added) - set(tensors)), sorted(set(tensors) - set(added))
    for problem, names in (("lacks", missing), ("has, beyond what its configuration needs,", unknown)):
        if names:
            raise InputError(f"{file} {problem} {len(names)} tensors ({', '.join(names[:3])}, …): save it again.")
    for name, x in added.items():
        if x.shape != tensors[name].shape:
            raise InputError(f"{file}: {name} is {tuple(tensors[name].shape)}, this model needs {tuple(x.shape)}.")
        if tensors[name].dtype not in DTYPES:
            raise InputError(f"{file}: {name} has dtype {tensors[name].dtype}, this model needs {x.dtype}.")
    check_finite(tensors, file)
    set_added(model, tensors)


def load_light(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Converts a base model, in place, into what `save_light` saved; returns it. Logits are bit-equal.

    Args:
        model: the softmax model, with the very weights that were converted (any hub id, folder or GGUF file of them).
        folder: where `save_light` wrote.

    Raises:
        InputError: the file is missing, damaged or incomplete, or the weights of `model` are others. NonFiniteError: it
            holds NaN or infinity.
        ConfigError: a newer version wrote it. ConversionError: `model` is converted already.
    """
    file = Path(folder) / LIGHT_FILE
    header, tensors = _read(file)
    config = DarkConfig.from_dict(header["config"])
    if next(dark_layers(model), None) is not None:
        raise ConversionError("the model is converted already: load_light takes the softmax model (darkformer.revert).")
    plan = plan_conversion(model, config)
    _check_base(model, header["base"])
    convert_by(model, plan, config, header["base"])
    try:
        _fill(model, tensors, file)
    except BaseException:
        revert(model)
        raise
    return model
