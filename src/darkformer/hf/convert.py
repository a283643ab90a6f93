"""Conversion of a model in place, and back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import ConversionError, DarkConfig
from ..features.maps import FeatureMap
from .added import offset_dtype
from .fingerprint import describe_base
from .interface import NAME, Observation, Observer, enter, observed
from .layers import Layer, converted_modules, dark_layers, inner_names, uses_interface
from .trial import (
    Arrival,
    Run,
    difference,
    first_difference,
    has_weights,
    new_cache,
    note_previous,
    quiet,
    read_model,
    run_model,
    run_original,
    tolerance,
    trial_runs,
)

__all__ = ["Plan", "convert", "converted_modules", "dark_layers", "observing", "plan_conversion", "revert"]

_log = logging.getLogger("darkformer")


@dataclass(frozen=True)
class Plan:
    """What `convert` would do to a model.

    Attributes:
        layers: (full name, module, what is known of it) of each attention module that becomes linear.
        left: attention modules that keep what they have, by full name, and why.
        body: the model, or its body without a head, as the trial called it.
        runs: how the trial called it; empty where there was none.
        restless: how far the softmax model's own output in steps lies from that in one piece (relative).
        note: why there was no trial, or None.
    """

    layers: list[tuple[str, Any, Layer]]
    left: dict[str, str] = field(default_factory=dict)
    body: Any = None
    runs: list[Run] = field(default_factory=list)
    restless: float = 0.0
    note: str | None = None

    def __str__(self) -> str:
        """The summary that `convert` logs."""
        lines = [f"{len(self.layers)} attention layers are converted: {_ranges([x.layer for *_, x in self.layers])}."]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"{len(names)} stay as they are ({some}): {reason}")
        return "\n".join(lines + ([self.note] if self.note else []))


def _ranges(numbers: list[int]) -> str:
    """`0-2, 5` for 0, 1, 2, 5."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in parts)


def _refuse(name: str, module: Any, reason: str) -> ConversionError:
    return ConversionError(f"{name} ({type(module).__name__}) {reason}")


def _check_kind(model: PreTrainedModel) -> None:
    """Refuses what no trial needs to show.

    Raises:
        ConversionError: an encoder-decoder, or heads that are split over processes.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConversionError(
            f"{type(model).__name__} is an encoder and a decoder with cross-attention, whose keys come from another "
            "sequence than its queries: a state that runs along one sequence does not apply. Convert decoder-only "
            "models and encoders."
        )
    refuse_tensor_parallel(model)


def refuse_tensor_parallel(model: Any) -> None:
    """Refuses a model whose attention heads are split over processes (`tp_plan`).

    Raises:
        ConversionError: it is.
    """
    if (processes := getattr(model, "tp_size", None) or 1) > 1:
        raise ConversionError(
            f"{type(model).__name__} was loaded with tp_plan, which splits attention heads over {processes} "
            "processes: feature maps are not split. Load it without tp_plan; FSDP, DDP, device_map and offloading work."
        )


def _attention_modules(model: nn.Module) -> dict[str, Any]:
    """By full name: what goes through transformers' interface, or looks like attention of a numbered layer."""

    def is_attention(module: Any) -> bool:
        named = type(module).__name__.endswith(("Attention", "SelfAttention"))
        return uses_interface(module) or (named and hasattr(module, "layer_idx"))

    return {name: module for name, module in model.named_modules() if is_attention(module)}


def plan_conversion(model: PreTrainedModel, config: DarkConfig, example: Mapping[str, Any] | None = None) -> Plan:
    """What `convert` would do, found out by a trial forward pass; the model stays as it is.

    Args:
        example: keyword arguments for the model's forward pass, where a few token ids (`input_ids`) do not do.

    Raises:
        ConversionError: nothing to convert, a layer in `keep_exact` that would not be converted anyway, or attention
            that a converted layer would not follow exactly.
    """
    _check_kind(model)
    modules = _attention_modules(model)
    if not modules:
        raise ConversionError(
            f"{type(model).__name__} has no attention module with a layer index: "
            "only transformers' decoders with attention layers can be converted."
        )
    if not any(map(uses_interface, modules.values())):
        name, module = next(iter(modules.items()))
        raise _refuse(
            name, module,
            "does not use transformers' attention interface, so its attention cannot be replaced. "
            "Models built on that interface (Llama, Gemma, Qwen, …) can.",
        )  # fmt: skip
    looked = has_weights(model)
    plan = _plan_by_trial(model, config, modules, example) if looked else _plan_by_structure(model, config)
    present = sorted({layer.layer for *_, layer in plan.layers})
    if unknown := sorted(set(config.keep_exact) - set(present)):
        raise ConversionError(
            f"keep_exact names layer {', '.join(map(str, unknown))}, which this configuration does not convert: "
            f"choose from {', '.join(map(str, present))}."
        )
    return plan


def _run_as_it_is(
    model: PreTrainedModel, example: Mapping[str, Any] | None
) -> tuple[Any, list[Run], list[torch.Tensor]]:
    """The model, or its body where a head wants more than tokens, runs that it completes, and what they give.

    Raises:
        ConversionError: neither runs.
    """
    first: Exception | None = None
    candidates: tuple[Any, ...] = (model, model.base_model)
    for candidate in candidates:
        for cached in (True, False):
            try:
                runs = trial_runs(candidate, example, cached=cached)
                return candidate, runs, run_original(candidate, runs)
            except Exception as error:
                first = first or error
    raise ConversionError(
        f"{type(model).__name__} does not run on a few tokens ({type(first).__name__}: {first}), so what its attention "
        "receives cannot be looked at. Pass darkformer.convert(model, config, example={…}) with arguments it runs on."
    ) from first


def _plan_by_trial(
    model: PreTrainedModel, config: DarkConfig, modules: dict[str, Any], example: Mapping[str, Any] | None
) -> Plan:
    body, runs, wanted = _run_as_it_is(model, example)
    try:
        trial = read_model(body, runs)
    except ConversionError:
        raise
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} cannot run through another attention function than its own "
            f"({type(error).__name__}: {error}), so its attention cannot be replaced."
        ) from error
    layers, left = _choose(model, config, modules, trial.arrivals)
    for run, found, want in zip(runs, trial.outputs, wanted, strict=True):
        if (gap := difference(found, want, run.real)) > tolerance(model):
            name = first_difference(body, runs, trial) or "a layer"
            raise ConversionError(
                f"{name} of {type(model).__name__} attends in a way that was not understood: on {run.name} exact "
                f"attention in its place changes the output by {gap:.1e} (relative). The model is left as it was."
            )
    with quiet(model):
        gaps = [_streaming_gap(body, run, want) for run, want in zip(runs, wanted, strict=True) if run.cached]
    return Plan(layers, left, body, runs, max(gaps, default=0.0))


def _choose(
    model: PreTrainedModel, config: DarkConfig, modules: dict[str, Any], arrivals: list[Arrival]
) -> tuple[list[tuple[str, Any, Layer]], dict[str, str]]:
    """Layers to convert and those that stay, by what arrived from them."""
    inner = {id(module): (name, short) for name, short, module in inner_names(model)}
    left: dict[str, str] = {}
    layers: list[tuple[str, Any, Layer]] = []
    for arrival in arrivals:
        module = arrival.module
        name, short = inner[id(module)]
        if arrival.local is not None and not config.convert_sliding:
            left[name] = (
                f"attends within a {'sliding window' if arrival.local == 'window' else 'chunk'}, linear already."
            )
            continue
        if reason := _why_not(arrival):
            raise _refuse(name, module, reason)
        own = _number(module)
        slots = tuple(arrival.slots) or (len(layers) if own is None else own,)
        layer = Layer(
            name=short,
            layer=slots[0] if own is None else own,
            slots=slots,
            **arrival.heads._asdict(),
            calls=arrival.calls,
            causal_by_mask=module.config._attn_implementation == "eager",
        )
        if any(tied.startswith(f"{name}.") for tied in _tied(model)):
            raise _refuse(
                name, module,
                "has its weights from another layer (transformers ties them by name): what conversion adds to such a "
                "module cannot be saved and loaded.",
            )  # fmt: skip
        layers.append((name, module, layer))
    seen = {id(arrival.module) for arrival in arrivals}
    for name, module in modules.items():
        if id(module) not in seen:
            left[name] = (
                "not part of the language model's self-attention: a forward pass on text does not call it."
                if uses_interface(module)
                else "does not use transformers' attention interface."
            )
    if not layers:
        if not arrivals:
            raise ConversionError(f"{type(model).__name__} attends nowhere on text: there is nothing to convert.")
        raise ConversionError(
            f"all {len(arrivals)} attention layers of {type(model).__name__} are sliding-window layers, linear "
            "already: set convert_sliding=True to convert them nevertheless."
        )
    return layers, left


def _tied(model: PreTrainedModel) -> set[str]:
    """Names of weights that transformers ties to others, and of those others."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied, *tied.values()}


def _number(module: Any) -> int | None:
    """The module's layer, None where it has none of its own: shared between layers, or not numbered."""
    number = getattr(module, "layer_idx", None)
    return number if isinstance(number, int) and number >= 0 else None


def _why_not(arrival: Arrival) -> str | None:
    """Why the attention that arrived from a module cannot be replaced, or None."""
    if arrival.unread is not None:
        return arrival.unread
    if arrival.foreign_keys or getattr(arrival.module, "is_kv_shared_layer", False):
        return "takes keys and values from another layer's cache, which converted layers do not keep."
    heads = arrival.heads
    if heads.num_heads % heads.num_kv_heads:
        return f"attends with {heads}: query heads do not divide among the others."
    return None


def _is_sliding(module: Any) -> bool:
    for name in ("is_sliding", "sliding_window"):
        if hasattr(module, name):
            return bool(getattr(module, name))
    types = getattr(module.config, "layer_types", None)
    if types:
        return types[module.layer_idx] == "sliding_attention"
    return getattr(module.config, "sliding_window", None) is not None


def _plan_by_structure(model: PreTrainedModel, config: DarkConfig) -> Plan:
    """Without weights there is no trial: what the configuration and the modules' names say, for what is plain there."""
    left: dict[str, str] = {}
    layers: list[tuple[str, Any, Layer]] = []
    for name, short, module in inner_names(model):
        kind: Any = module
        number = _number(module)
        if not uses_interface(module) or number is None:
            continue
        if getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__:
            left[name] = "cross-attention."
        elif _is_sliding(module) and not config.convert_sliding:
            left[name] = "attends within a sliding window, linear already."
        else:
            heads = kind.config.num_attention_heads
            layer = Layer(
                name=short,
                layer=number,
                slots=(number,),
                num_heads=heads,
                num_kv_heads=getattr(kind.config, "num_key_value_heads", None) or heads,
                head_dim=getattr(kind, "head_dim", None) or kind.config.hidden_size // heads,
            )
            layers.append((name, module, layer))
    if not layers:
        raise ConversionError(
            f"all attention layers of {type(model).__name__} are sliding-window layers, linear already: "
            "set convert_sliding=True to convert them nevertheless."
        )
    return Plan(layers, left, note="There was no trial forward pass: the weights are on the meta device.")


def _attach(model: nn.Module, plan: Plan, config: DarkConfig) -> None:
    """Gives the plan's modules their feature maps; what `revert` goes back to is noted first."""
    note_previous(model)
    for _, module, layer in plan.layers:
        module.__dict__.setdefault("dark_previous", "sdpa")
        _attach_one(module, layer, config)
    for module in [module for _, module, _ in plan.layers]:
        module.config._attn_implementation = NAME
        module.config.darkformer = config.to_dict()
        described = [
            layer.to_dict() for _, other, layer in plan.layers if other.config is module.config
        ]  # fmt: skip
        module.config.darkformer_layers = described


def _device(module: Any) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate's hook brings them for a forward pass."""
    weight = next((x for x in module.parameters() if not x.is_meta), None)
    if weight is not None:
        return weight.device
    hooks = (getattr(m, "_hf_hook", None) for m in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((x for x in devices if x is not None), "cpu"))


def _attach_one(module: Any, layer: Layer, config: DarkConfig) -> None:
    feature_map = FeatureMap(
        config.at_layer(layer.layer),
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        layer=layer.layer,
        dtype=offset_dtype(module),
    )
    building = torch.get_default_device().type == "meta"  # weights will be loaded, and moved with the model's own
    module.dark = feature_map if building else feature_map.to(_device(module))
    module.__dict__["dark_layer"] = replace(layer, exact=feature_map.config.method == "exact")
    module.register_forward_pre_hook(enter, with_kwargs=True)


def _detach(module: Any) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is enter:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    del module.dark, module.__dict__["dark_layer"]


def _warn_of_softcap(model: Any) -> None:
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None:
        warnings.warn(
            f"{type(model).__name__} caps its attention logits at {cap}: the exact window and sinks apply the cap, the "
            "features cannot.",
            UserWarning,
            stacklevel=4,
        )


def convert(model: PreTrainedModel, config: DarkConfig, *, example: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Replaces the model's softmax attention by `config`'s, in place, and returns the model.

    Works on any decoder or encoder that calls transformers' attention interface. A trial forward pass on a dozen tokens
    shows which modules attend, with how many heads, under which mask and into which layer of the cache; where exact
    attention in their place would not give the original's output, nothing is changed. Layers that already attend
    through a sliding window stay as they are unless `config.convert_sliding`; towers of other modalities and
    cross-attention always do. What was converted and what was left, and why, goes to the log of `darkformer` (INFO).
    The weights are not touched; `calibrate` and `finetune` come next.

    Args:
        example: keyword arguments for the model's forward pass, where a few token ids (`input_ids`) do not do.

    Raises:
        ConversionError: not a transformers model, converted already, nothing in it can be converted, or its attention
            is not followed exactly.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(f"received {type(model).__name__}: convert takes a transformers PreTrainedModel.")
    if next(dark_layers(model), None) is not None:
        raise ConversionError(
            f"{type(model).__name__} is converted already: call darkformer.revert(model) before converting it again."
        )
    plan = plan_conversion(model, config, example)
    convert_by(model, plan, config, describe_base(model))
    return model


def convert_by(model: PreTrainedModel, plan: Plan, config: DarkConfig, base: dict[str, Any] | None) -> None:
    """`convert` by a plan, for a model whose base is known: `base` is what `describe_base` says of it.

    Raises:
        ConversionError: the converted model does not give in steps what it gives in one piece.
    """
    _attach(model, plan, config)
    _warn_of_softcap(model)
    model.config.darkformer_base = base
    try:
        if config.method != "exact":  # which keeps the cache that the model had
            _check_streaming(model, plan)
    except BaseException:
        revert(model)
        raise
    _log.info("%s: %s", type(model).__name__, plan)


def _streaming_gap(body: Any, run: Run, in_steps: torch.Tensor) -> float:
    """How far a run's output, in its passes, lies from that of the same tokens in one piece (relative)."""
    joined: dict[str, Any] = {
        name: torch.cat([one[name] for one in run.passes], dim=1)
        for name in ("input_ids", "position_ids")
        if name in run.passes[0]
    }
    at_once = run_model(body, Run("", [{**run.passes[-1], **joined}], None, cached=False))
    return difference(in_steps, at_once, run.real)


def _check_streaming(model: PreTrainedModel, plan: Plan) -> None:
    """Compares a prompt and a step with the same tokens in one piece, after conversion.

    Some models differ by themselves: those that quantize by what is in the batch.
    """
    for run in plan.runs:
        if not run.cached:
            continue
        with quiet(model):
            gap = _streaming_gap(plan.body, run, run_model(plan.body, run, new_cache(model)))
        if gap > max(tolerance(model), 5 * plan.restless):
            raise ConversionError(
                f"{type(model).__name__} gives other numbers in steps than in one piece once it is converted (relative "
                f"difference {gap:.1e}): its layers keep something of the past that converted layers do not follow."
            )


def attach_saved(model: PreTrainedModel) -> None:
    """Gives a model under construction the feature maps its config speaks of; their weights are loaded afterwards."""
    config = DarkConfig.from_dict(dict(model.config.darkformer))
    described = getattr(model.config, "darkformer_layers", None)
    if described is None:  # saved by 0.1.0
        plan = _plan_by_structure(model, config)
    else:
        by_name = {layer.name: layer for layer in map(Layer.from_dict, described)}
        plan = Plan([(name, m, by_name[short]) for name, short, m in inner_names(model) if short in by_name])
    waiting = [(name, module, layer) for name, module, layer in plan.layers if "dark" not in module._modules]
    if waiting:
        _attach(model, Plan(waiting), config)


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Softmax attention again, in place: without training, bit-identical to the model before `convert`.

    Raises:
        ConversionError: the model is not converted.
    """
    converted = converted_modules(model)
    if not converted:
        raise ConversionError(f"{type(model).__name__} is not converted: there is nothing to revert.")
    for module in converted:
        _detach(module)
        module.config._attn_implementation = module.__dict__.get("dark_previous", "sdpa")
        for name in ("darkformer", "darkformer_layers"):
            module.config.__dict__.pop(name, None)
    for module in model.modules():
        module.__dict__.pop("dark_previous", None)
    if hasattr(model.config, "darkformer_base"):
        del model.config.darkformer_base
    return model


@contextmanager
def observing(model: nn.Module, observer: Observer, *, softmax: bool = True) -> Iterator[None]:
    """Within the block every converted layer's q, k, v and output are shown to `observer`, without gradients.

    Only what the same thread runs is shown.

    Args:
        softmax: the model computes softmax attention meanwhile. False: what it is converted to.

    Raises:
        ConversionError: no layer is converted, or an adapter of peft has wrapped the feature maps.
    """
    modules = converted_modules(model)
    if not modules:
        raise ConversionError(
            f"{type(model).__name__} has no converted attention layer to observe: convert it first, and calibrate it "
            "before an adapter of peft takes over its feature maps."
        )
    layers = frozenset(id(module.dark) for module in modules)
    with observed(Observation(observer, layers, softmax)), torch.no_grad():
        yield
