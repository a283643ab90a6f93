"""What `convert` would do to a model: which attention modules become linear, which stay, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..config import DarkConfig
from ..cost import check_memory, layer_bytes
from ..errors import ConversionError
from .interface import NAME
from .layers import Layer, inner_names, uses_interface
from .trial import (
    AttendingModule,
    Run,
    first_difference,
    has_weights,
    new_cache,
    quiet,
    read_model,
    relative_error,
    run_model,
    run_original,
    tolerance,
    trial_runs,
)

#: Why layers stay whose softmax is limited already, by `AttentionMask.sliding`.
SLIDING = {
    "window": "attends within a sliding window, linear already.", "chunk": "attends within a chunk, linear already.",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What `convert` would do to a model.

    Attributes:
        layers: (full name, module, its `Layer`) of each attention module that becomes linear.
        left: full name → why the module keeps the attention it has.
        body: the model, or its body without a head, as the trial called it.
        runs: how the trial called it; empty where there was none.
        note: why there was no trial, or None.
    """

    layers: list[tuple[str, Any, Layer]]
    left: dict[str, str] = field(default_factory=dict)
    body: Any = None
    runs: list[Run] = field(default_factory=list)
    note: str | None = None

    def __str__(self) -> str:
        """The summary that `convert` logs."""
        lines = [f"{len(self.layers)} attention layers are converted: {_ranges([x.layer for *_, x in self.layers])}."]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"{len(names)} stay as they are ({listed}): {reason}")
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
    """Refuses models that cannot be converted whatever a trial would show.

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
    for module in model.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation == NAME and uses_interface(module):
            raise ConversionError(
                f"{type(model).__name__} shares its config object with a model that was converted: build each model "
                "from a copy of its own (copy.deepcopy(config))."
            )


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
    """Full name → module: those that call transformers' interface, or look like attention of a numbered layer."""

    def is_attention(module: Any) -> bool:
        named = type(module).__name__.endswith(("Attention", "SelfAttention"))
        return uses_interface(module) or (named and hasattr(module, "layer_idx"))

    return {name: module for name, module in model.named_modules() if is_attention(module)}


def plan_conversion(model: PreTrainedModel, config: DarkConfig, example: Mapping[str, Any] | None = None) -> Plan:
    """What `convert` would do, by a trial forward pass; the model stays as it is.

    Args:
        example: keyword arguments for the model's forward pass, if it needs more than a few token ids (`input_ids`).

    Raises:
        ConversionError: nothing to convert, a layer in `keep_exact` that would not be converted anyway, or attention
            that a converted layer would not follow exactly. ConfigError: more features or a larger window than
            fit into memory.
    """
    _check_kind(model)
    modules = _attention_modules(model)
    if not modules:
        raise ConversionError(
            f"{type(model).__name__} has no attention module with a layer index: "
            "only transformers' models with attention layers can be converted."
        )
    if not any(map(uses_interface, modules.values())):
        name, module = next(iter(modules.items()))
        raise _refuse(
            name, module,
            "does not use transformers' attention interface, so its attention cannot be replaced. "
            "Models built on that interface (Llama, Gemma, Qwen, …) can.",
        )  # fmt: skip
    plan = _plan_by_trial(model, config, modules, example) if has_weights(model) else plan_by_structure(model, config)
    layers = [layer for *_, layer in plan.layers]
    check_names(config, layers, plan.left)
    if has_weights(model):  # others may be meant for another machine
        check_fits(config, layers)
    return plan


def check_fits(config: DarkConfig, layers: Iterable[Layer]) -> None:
    """Refuses a configuration whose projections and states, of one sequence, this machine cannot hold.

    Raises:
        ConfigError: it cannot.
    """
    size = 0
    for layer in layers:
        shape = {"num_kv_heads": layer.num_kv_heads, "head_dim": layer.head_dim}
        size += layer_bytes(config, layer.layer, 1, **shape)
        size += (
            4 * len(config.head_kinds(layer.layer, layer.num_kv_heads).features) * config.feature_count * layer.head_dim
        )
    windows = max((config.window, *dict(config.layer_windows).values()))
    check_memory(size, f"num_features={config.num_features}, window={windows}, sinks={config.sinks} in every layer")


def check_names(config: DarkConfig, layers: Iterable[Layer], left: Mapping[str, str] | None = None) -> None:
    """Refuses options that name layers or heads which the configuration does not convert.

    Args:
        layers: those that it converts.
        left: name → why another attention module stays.

    Raises:
        ConversionError: a layer that is not converted, or whose softmax is limited to a window. ConfigError: a head
            that a layer does not have.
    """
    known = {layer.layer: layer for layer in layers}
    sliding = sorted(name for name, reason in (left or {}).items() if reason in SLIDING.values())
    for field_name in ("keep_exact", "no_features", "layer_windows"):
        if unknown := sorted(config.layers_named(field_name) - set(known)):
            stay = f" ({len(sliding)} layers attend within a window already and stay as they are)" if sliding else ""
            raise ConversionError(
                f"{field_name} names layer {', '.join(map(str, unknown))}, which this configuration does not convert"
                f"{stay}: choose from {_ranges(list(known))}."
            )
    for number in sorted(config.layers_named("keep_exact")):
        if known[number].sliding:
            raise ConversionError(
                f"keep_exact names layer {number}, whose softmax is limited to a window: there is no far field to "
                "keep. Leave convert_sliding off, and it stays as it is."
            )
    for layer in known.values():
        config.head_kinds(layer.layer, layer.num_kv_heads)


def _run_as_it_is(
    model: PreTrainedModel, example: Mapping[str, Any] | None
) -> tuple[Any, list[Run], list[torch.Tensor]]:
    """The model, or its body where a head wants more than tokens, runs that it completes, and what they give.

    Raises:
        ConversionError: neither runs.
    """
    if example is not None and any(isinstance(value, Cache) for value in example.values()):
        raise ConversionError("example holds a cache, which each run of the trial would fill: leave it out.")
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
    body, runs, originals = _run_as_it_is(model, example)
    try:
        trial = read_model(body, runs)
    except ConversionError:
        raise
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} cannot run through another attention function than its own "
            f"({type(error).__name__}: {error}), so its attention cannot be replaced."
        ) from error
    attending = trial.modules
    if example is not None:
        attending = _of_text(model, attending)
    layers, left = _choose(model, config, modules, attending)
    for run, output, original in zip(runs, trial.outputs, originals, strict=True):
        if (change := relative_error(output, original, run.real)) > tolerance(model):
            name = first_difference(body, runs, trial) or "a layer"
            raise ConversionError(
                f"{name} of {type(model).__name__} attends in a way that was not understood: on {run.name} exact "
                f"attention in its place changes the output by {change:.1e} (relative). The model is left as it was."
            )
    if not all(module.is_causal for module in attending):  # an encoder: there is nothing to stream
        return Plan(layers, left, body)
    for run, output in zip(runs, originals, strict=True):
        if not bool((output if run.real is None else output[run.real]).isfinite().all()):
            return Plan(layers, left, body, note="The model's own output holds NaN or infinity.")
    untried = "Whether it gives in steps what it gives in one piece was not tried."
    return Plan(layers, left, body, runs, None if any(run.cached for run in runs) else untried)


def _of_text(model: PreTrainedModel, attending: list[AttendingModule]) -> list[AttendingModule]:
    """Without cross-attention and the towers that an `example` with images, sound or encoder states has run."""
    text = model.config.get_text_config(decoder=True)
    own = [x for x in attending if text is model.config or x.module.config is text]
    return [x for x in own if x.is_causal] or own or attending


def _choose(
    model: PreTrainedModel, config: DarkConfig, modules: dict[str, Any], attending: list[AttendingModule]
) -> tuple[list[tuple[str, Any, Layer]], dict[str, str]]:
    """Layers to convert, and why other modules stay."""
    inner = {id(module): (name, short) for name, short, module in inner_names(model)}
    left: dict[str, str] = {}
    layers: list[tuple[str, Any, Layer]] = []
    for x in attending:
        module = x.module
        name, short = inner[id(module)]
        if x.sliding is not None and not config.convert_sliding:
            left[name] = SLIDING[x.sliding]
            continue
        if reason := _why_not(x):
            raise _refuse(name, module, reason)
        own = _number(module)
        slots = tuple(x.slots) or (len(layers) if own is None else own,)
        layer = Layer(
            name=short,
            layer=slots[0] if own is None else own,
            slots=slots,
            **x.heads._asdict(),
            calls=x.calls,
            sliding=x.sliding is not None,
            causal_by_mask=module.config._attn_implementation == "eager",
        )
        if any(tied.startswith(f"{name}.") for tied in _tied(model)):
            raise _refuse(
                name, module,
                "has its weights from another layer (transformers ties them by name): what conversion adds to such a "
                "module cannot be saved and loaded.",
            )  # fmt: skip
        layers.append((name, module, layer))
    called = {id(x.module) for x in attending}
    for name, module in modules.items():
        if id(module) not in called:
            left[name] = (
                "not part of the language model's self-attention: a forward pass on text does not call it."
                if uses_interface(module)
                else "does not use transformers' attention interface."
            )
    if not layers:
        if not attending:
            raise ConversionError(f"{type(model).__name__} attends nowhere on text: there is nothing to convert.")
        raise ConversionError(
            f"all {len(attending)} attention layers of {type(model).__name__} are sliding-window layers, linear "
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


def _why_not(x: AttendingModule) -> str | None:
    """Why the attention of a module cannot be replaced, or None."""
    if x.problem is not None:
        return x.problem
    if x.foreign_keys or getattr(x.module, "is_kv_shared_layer", False):
        return "takes keys and values from another layer's cache, which converted layers do not keep."
    if x.heads.num_heads % x.heads.num_kv_heads:
        return f"attends with {x.heads}: query heads do not divide among the others."
    return None


def _is_sliding(module: Any) -> bool:
    """Whether a module's attention is limited to a window or chunk, by its attributes and its configuration."""
    for name in ("is_sliding", "sliding_window"):
        if hasattr(module, name):
            return bool(getattr(module, name))
    types = getattr(module.config, "layer_types", None)
    if types:
        return types[module.layer_idx] in ("sliding_attention", "chunked_attention")
    return getattr(module.config, "sliding_window", None) is not None


def plan_by_structure(model: PreTrainedModel, config: DarkConfig) -> Plan:
    """A plan without a trial, for models without weights: by the configuration and the modules' attributes."""
    left: dict[str, str] = {}
    layers: list[tuple[str, Any, Layer]] = []
    for name, short, module in inner_names(model):
        kind: Any = module
        number = _number(module)
        if not uses_interface(module) or number is None:
            continue
        if getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__:
            left[name] = "cross-attention."
        elif isinstance(getattr(module, "sinks", None), nn.Parameter):
            raise _refuse(name, module, "adds a learned sink to its softmax, which the features cannot follow.")
        elif getattr(module, "is_kv_shared_layer", False):
            raise _refuse(name, module, "takes keys and values from another layer's cache, which is not kept.")
        elif _is_sliding(module) and not config.convert_sliding:
            left[name] = SLIDING["window"]
        else:
            heads = kind.config.num_attention_heads
            layer = Layer(
                name=short,
                layer=number,
                slots=(number,),
                num_heads=heads,
                num_kv_heads=getattr(kind.config, "num_key_value_heads", None) or heads,
                head_dim=getattr(kind, "head_dim", None) or kind.config.hidden_size // heads,
                sliding=_is_sliding(module),
            )
            layers.append((name, module, layer))
    if not layers:
        raise ConversionError(
            f"all attention layers of {type(model).__name__} are sliding-window layers, linear already: "
            "set convert_sliding=True to convert them nevertheless."
        )
    return Plan(layers, left, note="There was no trial forward pass: the weights are on the meta device.")


def streaming_error(body: Any, run: Run) -> float:
    """Relative difference between the output of a cached run and that of the same tokens in one piece."""
    joined: dict[str, Any] = {
        name: torch.cat([one[name] for one in run.passes], dim=1)
        for name in ("input_ids", "position_ids")
        if name in run.passes[0]
    }
    with quiet(body):
        in_steps = run_model(body, run, new_cache(body))
        at_once = run_model(body, Run("", [{**run.passes[-1], **joined}], None, cached=False))
    return relative_error(in_steps, at_once, run.real)
