"""Learns what a model's attention really receives from a trial forward pass, instead of guessing it from names.

The model runs on a few tokens: whole, and as a padded prompt with a step after it. Once as it is, and once with our own
softmax in place of its attention. Where the outputs differ the model is refused before anything is changed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .interface import NAME, attend_as_before, attending, receive, softmax_of
from .layers import attach, attachment_of, detach, uses_interface
from .masks import AttentionMask

#: Tokens of the trial, those of its last step, and pads before the second row's prompt.
TOKENS, STEP, PADS = 12, 1, 3
EXAMPLE = "the example"
#: Largest relative difference between a model and itself with our softmax, by dtype: only rounding differs.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}


class Heads(NamedTuple):
    """Query heads, key/value heads and the dimension of queries and keys."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads} query and {self.num_kv_heads} key/value heads of dimension {self.head_dim}"


@dataclass
class AttendingModule:
    """A module that called the attention function in a trial, and what it passed.

    Attributes:
        sliding: "window" or "chunk" where transformers limits the distance that a query sees.
        problem: why a converted layer could not follow its calls, or None.
        calls: in one forward pass of the module.
        slots: layers of the cache that it updated.
        foreign_keys: it attended to keys that it did not put into the cache.
    """

    module: Any
    heads: Heads
    sliding: str | None
    problem: str | None
    is_causal: bool
    calls: int = 0
    slots: list[int] = field(default_factory=list)
    foreign_keys: bool = False


@dataclass(frozen=True)
class Trial:
    """What the runs of a trial gave.

    Attributes:
        modules: in the order of their first calls.
        outputs: of the model, by run.
        attention_outputs: (module, its output) of each attention call, by run.
    """

    modules: list[AttendingModule]
    outputs: list[Tensor]
    attention_outputs: list[list[tuple[Any, Tensor]]]


@dataclass(frozen=True)
class Run:
    """One way to call the model.

    Attributes:
        name: for messages.
        passes: keyword arguments of each of its forward passes, in turn.
        real: (B, tokens of all passes together) booleans, True for real tokens; None: all are.
        cached: whether the passes share a cache.
    """

    name: str
    passes: list[dict[str, Any]]
    real: Tensor | None
    cached: bool


def has_weights(model: nn.Module) -> bool:
    """Whether the model can run: no weight is on the meta device, unless accelerate's hooks bring it when needed."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return True
    return not any(x.is_meta for x in (*model.parameters(), *model.buffers()))


def _reserved(config: Any) -> set[int]:
    """Ids of the tokens that a configuration gives a meaning: images, padding, ends."""
    ids: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            ids |= set(value) if isinstance(value, list) else {value}
        elif hasattr(value, "get_text_config"):
            ids |= _reserved(value)
    return {x for x in ids if isinstance(x, int)}


def trial_runs(model: PreTrainedModel, example: Mapping[str, Any] | None, *, cached: bool) -> list[Run]:
    """The trial's runs: a whole sequence and a padded batch, this in two passes if `cached`; or `example` alone."""
    if example is not None:
        return [Run(EXAMPLE, [dict(example)], None, cached=False)]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    reserved = _reserved(model.config)
    usable = [i for i in range(min(vocabulary, 4096)) if i not in reserved] or list(range(min(vocabulary, 4096)))
    spread = torch.randperm(len(usable), generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor(usable)[spread.repeat(1 + 2 * TOKENS // len(usable))[: 2 * TOKENS]]
    ids = chosen.view(2, TOKENS).to(model.device if model.device.type != "meta" else "cpu")
    mask = torch.ones_like(ids)
    mask[1, :PADS] = 0
    accepted = inspect.signature(model.forward).parameters
    no_cache = {"use_cache": False} if "use_cache" in accepted else {}
    runs = [Run("a whole sequence", [{"input_ids": ids, **no_cache}], None, cached=False)]
    if not cached or "past_key_values" not in accepted:
        padded = {"input_ids": ids, "attention_mask": mask, **no_cache}
        return [*runs, Run("a padded batch", [padded], mask.bool(), cached=False)]
    cut = TOKENS - STEP
    position = (mask.cumsum(1) - 1).clamp(min=0)
    passes = [
        {"input_ids": ids[:, :cut], "attention_mask": mask[:, :cut], "position_ids": position[:, :cut]},
        {"input_ids": ids[:, cut:], "attention_mask": mask, "position_ids": position[:, cut:]},
    ]
    if "position_ids" not in accepted:
        passes = [{k: v for k, v in one.items() if k != "position_ids"} for one in passes]
    return [*runs, Run("a padded prompt and one more token", passes, mask.bool(), cached=True)]


def _tensor(output: Any) -> Tensor:
    """Logits of a model's output, else its hidden states, else its first tensor."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(x := getattr(output, name, None), Tensor):
            return x
    values = output.values() if isinstance(output, Mapping) else output
    return next(x for x in values if isinstance(x, Tensor))


def run_model(model: Any, run: Run, cache: Any = None) -> Tensor:
    """The model's output for a run, its passes joined along the tokens."""
    outputs = []
    for arguments in run.passes:
        caching = {"past_key_values": cache, "use_cache": True} if cache is not None else {}
        outputs.append(_tensor(model(**arguments, **caching)).detach())
        if run.name != EXAMPLE and outputs[-1].shape[:2] != arguments["input_ids"].shape:
            raise ValueError(f"an output of shape {tuple(outputs[-1].shape)} is not one for each token")
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of the kind the model makes itself."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, and the same random state afterwards."""
    training = [module for module in model.modules() if module.training]
    device = next((x.device.type for x in model.parameters() if not x.is_meta), "cpu")
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast(device, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration in the model, outer ones first."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation")}.values())


@contextlib.contextmanager
def implementation(model: nn.Module) -> Iterator[None]:
    """Within the block all attention of the model calls `dark_attention`, and thereby the function of `attending`."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    marked = note_previous(model)
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, previous in before:  # outer ones first, as setting one sets those inside it
            config._attn_implementation = previous
        for module in marked:
            detach(module)


def note_previous(model: nn.Module) -> list[Any]:
    """Notes on every module that attends the implementation it has now; returns these modules."""
    marked: list[Any] = [m for m in model.modules() if hasattr(m, "config") and uses_interface(m)]
    for module in marked:
        previous = module.config._attn_implementation
        if previous != NAME:
            attach(module, previous=previous or "eager")
    return marked


class _Recorder:
    """Computes the softmax attention of each call as a converted model would, and records the calls."""

    def __init__(self) -> None:
        self.modules: dict[int, AttendingModule] = {}
        self.outputs: list[tuple[Any, Tensor]] = []
        self._updated: int | None = None  # the layer of the cache that was updated since any module attended
        self._updated_is_sliding = False
        self._last: Any = None  # the module that attended last
        self._calls = 0  # in the present forward pass of a module

    def recorded(self, cache: DynamicCache) -> DynamicCache:
        """The cache, whose updates are recorded from now on."""
        update = cache.update

        def recording(key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
            self._updated, self._updated_is_sliding = layer_idx, bool(getattr(layer, "is_sliding", False))
            return update(key, value, layer_idx, *args, **kwargs)

        cache.update = recording  # type: ignore[assignment, method-assign]
        return cache

    def enter(self, module: Any, *_: Any) -> None:
        """Before a forward pass of a module that attends."""
        self._calls, self._last = 0, None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        problem, sliding, is_causal = None, None, False
        if isinstance(mask, AttentionMask):
            problem, sliding, is_causal = mask.problem, mask.sliding, bool(mask.is_causal)
        elif isinstance(mask, Tensor):
            problem = (
                f"is given a mask of the model's own making, {tuple(mask.shape)}, which a converted layer cannot read."
            )
        if problem is None and sliding is None:
            attachment = attachment_of(module)
            by_mask = attachment is not None and attachment.previous == "eager"
            extra = {name: x for name, x in kwargs.items() if name not in ("scaling", "dropout")}
            received = receive(module, query, key, value, mask, kwargs["scaling"], extra, causal_by_mask=by_mask)
            is_causal, output, weights = received.is_causal, softmax_of(received)[0], None
            output = output.transpose(1, 2).to(value.dtype).contiguous()
        else:
            output, weights = attend_as_before(module, query, key, value, mask, **kwargs)
        self._record(module, Heads(query.shape[1], key.shape[1], query.shape[3]), sliding, problem, is_causal)
        if key.shape[2] != query.shape[2] and self._updated is None and self._last is not module:
            self.modules[id(module)].foreign_keys = True
        self._updated, self._last = None, module
        self.outputs.append((module, output.detach()))
        return output, weights

    def _record(self, module: Any, heads: Heads, sliding: str | None, problem: str | None, is_causal: bool) -> None:
        seen = self.modules.setdefault(id(module), AttendingModule(module, heads, sliding, problem, is_causal))
        self._calls += 1
        seen.calls = max(seen.calls, self._calls)
        if heads != seen.heads:
            seen.problem = f"attends with {seen.heads} and with {heads}: heads that change from call to call."
        if is_causal != seen.is_causal:
            seen.problem = (
                "is causal with padding and bidirectional without it, or the reverse: its flag is_causal and its mask "
                "disagree. Make both say how it shall attend."
            )
        if self._updated is not None and self._updated not in seen.slots:
            seen.slots.append(self._updated)
            if self._updated_is_sliding and seen.sliding is None:  # whatever its mask says
                seen.sliding = "window"


def read_model(model: PreTrainedModel, runs: list[Run]) -> Trial:
    """Runs the model with our softmax in place of its attention. The model is as before afterwards.

    Raises:
        Exception: whatever the model raises when its attention is ours.
    """
    recorder = _Recorder()
    outputs, attention_outputs = [], []
    hooks = [m.register_forward_pre_hook(recorder.enter) for m in model.modules() if uses_interface(m)]
    try:
        with quiet(model), implementation(model), attending(recorder):
            for run in runs:
                recorder.outputs = []
                outputs.append(run_model(model, run, recorder.recorded(new_cache(model)) if run.cached else None))
                attention_outputs.append(recorder.outputs)
    finally:
        for hook in hooks:
            hook.remove()
    return Trial(list(recorder.modules.values()), outputs, attention_outputs)


def run_original(model: PreTrainedModel, runs: list[Run]) -> list[Tensor]:
    """The model's outputs as it is, by run."""
    with quiet(model):
        return [run_model(model, run, new_cache(model) if run.cached else None) for run in runs]


def relative_error(output: Tensor, expected: Tensor, real: Tensor | None) -> float:
    """‖output − expected‖ / ‖expected‖ over real tokens; infinite where only one of them is finite."""
    output, expected = output.double(), expected.double()
    if real is not None and output.shape[:2] == real.shape:
        output, expected = output[real], expected[real]
    finite = expected.isfinite()
    if not torch.equal(output.isfinite(), finite):
        return float("inf")
    return float((output[finite] - expected[finite]).norm()) / (float(expected[finite].norm()) or 1.0)


def tolerance(model: PreTrainedModel) -> float:
    """The largest `relative_error` between two ways to compute the same model."""
    return TOLERANCES.get(model.dtype, TOLERANCES[torch.bfloat16])


def first_difference(model: PreTrainedModel, runs: list[Run], trial: Trial) -> str | None:
    """The name of the first module whose attention output in the trial differs from the original; None: no single one.

    Both are computed in the same order, so that calls correspond.
    """
    originals: list[tuple[Any, Tensor]] = []

    def original(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, weights = attend_as_before(module, *args, **kwargs)
        originals.append((module, output.detach()))
        return output, weights

    names = {id(module): name for name, module in model.named_modules()}
    with quiet(model), implementation(model), attending(original):
        for run, outputs in zip(runs, trial.attention_outputs, strict=True):
            originals.clear()
            run_model(model, run, new_cache(model) if run.cached else None)
            for (module, output), (_, expected) in zip(outputs, originals, strict=True):
                real = run.real if run.real is not None and run.real.shape == output.shape[:2] else None
                if relative_error(output, expected, real) > tolerance(model):
                    return names[id(module)]
    return None
