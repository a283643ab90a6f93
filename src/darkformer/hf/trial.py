"""Looks at what a model's attention really receives, by a trial forward pass, instead of guessing it from names.

The model runs on a few tokens: whole, and as a padded prompt with a step after it. Once as it is, and once with our own
reading of every attention call. What both give must agree, or the model is refused before anything is changed.
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

from .interface import NAME, attending, receive, softmax_of, stays
from .layers import attach, attachment_of, detach, uses_interface
from .masks import AttentionMask

#: Tokens of the trial, those of its last step, and pads before the second row's prompt.
TOKENS, STEP, PADS = 12, 1, 3
EXAMPLE = "the example"
#: Largest relative difference between a model and our reading of it, by dtype; between kernels it is rounding alone.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}


class Heads(NamedTuple):
    """Query heads, key/value heads and the dimension of queries and keys."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads} query and {self.num_kv_heads} key/value heads of dimension {self.head_dim}"


@dataclass
class Arrival:
    """What reached the attention function from one module."""

    module: Any
    heads: Heads
    local: str | None  # "window" or "chunk" where transformers limits the distance
    unread: str | None  # why its mask cannot be followed
    is_causal: bool
    calls: int = 0  # in one forward pass of the module
    slots: list[int] = field(default_factory=list)
    foreign_keys: bool = False  # it attends to keys that it did not put into the cache


@dataclass(frozen=True)
class Trial:
    """Which attention calls a model makes, in the order in which its modules first made one."""

    arrivals: list[Arrival]
    outputs: list[Tensor]  # of the model, by run
    attended: list[list[tuple[Any, Tensor]]]  # (module, its output) by run


@dataclass(frozen=True)
class Run:
    """One way to call the model: keyword arguments of each of its forward passes, in turn."""

    name: str
    passes: list[dict[str, Any]]
    real: Tensor | None  # (B, tokens) of all passes together, which of them are no padding
    cached: bool


def has_weights(model: nn.Module) -> bool:
    """Whether the model can run: no weight is on the meta device, unless accelerate's hooks bring it when needed."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return True
    return not any(x.is_meta for x in (*model.parameters(), *model.buffers()))


def _reserved(config: Any) -> set[int]:
    """Numbers of tokens that mean something to a configuration: images, padding, ends."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            found |= set(value) if isinstance(value, list) else {value}
        elif hasattr(value, "get_text_config"):
            found |= _reserved(value)
    return {x for x in found if isinstance(x, int)}


def trial_runs(model: PreTrainedModel, example: Mapping[str, Any] | None, *, cached: bool) -> list[Run]:
    """How the model is called: whole, and, unless `example` says what its inputs are, padded in two pieces."""
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
    """Logits of a model's output, else its hidden states (or whatever it gives first)."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    values = output.values() if isinstance(output, Mapping) else output
    return next(x for x in values if isinstance(x, Tensor))


def run_model(model: Any, run: Run, cache: Any = None) -> Tensor:
    """The model's output for a run, its passes joined along the tokens."""
    outputs = []
    for arguments in run.passes:
        given = {"past_key_values": cache, "use_cache": True} if cache is not None else {}
        outputs.append(_tensor(model(**arguments, **given)).detach())
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
    found: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation") and not any(config is other for other in found):
            found.append(config)
    return found


@contextlib.contextmanager
def implementation(model: nn.Module) -> Iterator[None]:
    """Within the block every attention of the model goes through ours; what it was before stands on each module."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    marked = note_previous(model)
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, previous in before:  # outer ones first: they set those inside them
            config._attn_implementation = previous
        for module in marked:
            detach(module)


def note_previous(model: nn.Module) -> list[Any]:
    """Notes on every module that attends which implementation it has now, for those that will keep it."""
    marked: list[Any] = [m for m in model.modules() if hasattr(m, "config") and uses_interface(m)]
    for module in marked:
        previous = module.config._attn_implementation
        if previous != NAME:
            attach(module, previous=previous or "eager")
    return marked


class _Recorder:
    """Computes the softmax attention of each call as a converted model would, and notes what arrived."""

    def __init__(self) -> None:
        self.arrivals: dict[int, Arrival] = {}
        self.attended: list[tuple[Any, Tensor]] = []
        self._forgets = False  # whether that layer keeps the last keys only
        self._updated: int | None = None  # the layer of the cache that was updated since any module attended
        self._last: Any = None  # the module that attended last
        self._turn = 0

    def watch(self, cache: DynamicCache) -> DynamicCache:
        """Has the cache say which of its layers is updated."""
        update = cache.update

        def noting(key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            self._updated = layer_idx
            known = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
            self._forgets = bool(getattr(known, "is_sliding", False))
            return update(key, value, layer_idx, *args, **kwargs)

        cache.update = noting  # type: ignore[assignment, method-assign]
        return cache

    def enter(self, module: Any, *_: Any) -> None:
        """Before a forward pass of a module that attends."""
        self._turn, self._last = 0, None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        attachment = attachment_of(module)
        by_mask = attachment is not None and attachment.previous == "eager"
        unread, local, is_causal = None, None, False
        if isinstance(mask, AttentionMask):
            unread, local, is_causal = mask.unread, mask.local, bool(mask.is_causal)
        elif isinstance(mask, Tensor):
            unread = (
                f"is given a mask of the model's own making, {tuple(mask.shape)}, which a converted layer cannot read."
            )
        if unread is None and local is None:
            scaling = kwargs["scaling"]
            extra = {name: x for name, x in kwargs.items() if name not in ("scaling", "dropout")}
            received = receive(module, query, key, value, mask, scaling, extra, causal_by_mask=by_mask)
            is_causal, output, weights = received.is_causal, softmax_of(received)[0], None
            output = output.transpose(1, 2).to(value.dtype).contiguous()
        else:
            output, weights = stays(module, query, key, value, mask, **kwargs)
        heads = Heads(query.shape[1], key.shape[1], query.shape[3])
        arrival = self.arrivals.setdefault(id(module), Arrival(module, heads, local, unread, is_causal))
        self._turn += 1
        arrival.calls = max(arrival.calls, self._turn)
        if heads != arrival.heads:
            arrival.unread = f"attends with {arrival.heads} and with {heads}: heads that change from call to call."
        if arrival.is_causal != is_causal:
            arrival.unread = (
                "is causal with padding and bidirectional without it, or the reverse: its flag is_causal and its mask "
                "disagree. Make both say how it shall attend."
            )
        if self._updated is not None and self._updated not in arrival.slots:
            arrival.slots.append(self._updated)
            if self._forgets and arrival.local is None:  # whatever its mask says
                arrival.local = "window"
        if key.shape[2] != query.shape[2] and self._updated is None and self._last is not module:
            arrival.foreign_keys = True
        self._updated, self._last = None, module
        self.attended.append((module, output.detach()))
        return output, weights


def read_model(model: PreTrainedModel, runs: list[Run]) -> Trial:
    """Runs the model with our reading of its attention. The model is as before afterwards.

    Raises:
        Exception: whatever the model raises when its attention is ours.
    """
    recorder = _Recorder()
    outputs, attended = [], []
    hooks = [m.register_forward_pre_hook(recorder.enter) for m in model.modules() if uses_interface(m)]
    try:
        with quiet(model), implementation(model), attending(recorder):
            for run in runs:
                recorder.attended = []
                outputs.append(run_model(model, run, recorder.watch(new_cache(model)) if run.cached else None))
                attended.append(recorder.attended)
    finally:
        for hook in hooks:
            hook.remove()
    return Trial(list(recorder.arrivals.values()), outputs, attended)


def run_original(model: PreTrainedModel, runs: list[Run]) -> list[Tensor]:
    """What the model gives as it is, by run."""
    with quiet(model):
        return [run_model(model, run, new_cache(model) if run.cached else None) for run in runs]


def difference(found: Tensor, wanted: Tensor, real: Tensor | None) -> float:
    """Relative difference ‖found - wanted‖ / ‖wanted‖ over real tokens; infinite where only one of them is finite."""
    found, wanted = found.double(), wanted.double()
    if real is not None and found.shape[:2] == real.shape:
        found, wanted = found[real], wanted[real]
    if not bool((found.isfinite() == wanted.isfinite()).all()):
        return float("inf")
    known = wanted.isfinite()
    scale = float(wanted[known].norm())
    return float((found[known] - wanted[known]).norm()) / (scale or 1.0)


def tolerance(model: PreTrainedModel) -> float:
    """How far two ways to compute the same model may lie apart."""
    return TOLERANCES.get(model.dtype, TOLERANCES[torch.bfloat16])


def first_difference(model: PreTrainedModel, runs: list[Run], trial: Trial) -> str | None:
    """The name of the first module whose attention differs from what it was, None if none does by itself."""
    attended: list[tuple[Any, Tensor]] = []

    def original(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, weights = stays(module, *args, **kwargs)
        attended.append((module, output.detach()))
        return output, weights

    names = {id(module): name for name, module in model.named_modules()}
    with quiet(model), implementation(model), attending(original):
        for run, found in zip(runs, trial.attended, strict=True):
            attended.clear()
            run_model(model, run, new_cache(model) if run.cached else None)
            for (module, output), (_, wanted) in zip(found, attended, strict=True):
                real = run.real if run.real is not None and run.real.shape == output.shape[:2] else None
                if difference(output, wanted, real) > tolerance(model):
                    return names[id(module)]
    return None
