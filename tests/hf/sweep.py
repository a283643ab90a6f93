"""What becomes of one causal language model under `convert`: it works, it is refused, or something is wrong.

Nothing here looks inside the library: every check is one that a user could make.
"""

from __future__ import annotations

import inspect
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from tolerances import STREAM, relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from darkformer import ConversionError, DarkConfig, convert, revert
from darkformer.hf.plan import plan_conversion
from hf.families import disturb, left_mask, positions
from hf.tiny_models import SPECIAL, pair, tiny_model

LINEAR = DarkConfig(num_features=16, window=4, sinks=2)
EXACT = DarkConfig(method="exact")
#: Up to here every key is a sink or in the window, so linear mode is softmax.
NEAR = LINEAR.window + LINEAR.sinks
#: From `FAR` on most keys are seen through features, so linear mode has to differ from softmax by this much.
FAR, DIFFERS = 8, 1e-3
#: Tokens of the first prefill, and pads in front of the second row.
PREFILL, PADS = 12, 5
#: A relative difference above this is not rounding, however much a model magnifies it.
ROUNDING = 1e-3
#: The names under which models return their caches.
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")


@dataclass
class Outcome:
    """What the checks found for one model."""

    status: str  # "converted", "refused" or "not run"; it works if `failures` is empty too
    reason: str = ""  # the refusal, or the exception that kept the model from running
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # checks that the softmax model fails too


class _Run(NamedTuple):
    """A model and its logits for the whole sequence."""

    model: PreTrainedModel
    logits: Tensor


def _message(error: BaseException) -> str:
    """One line of at most 300 characters."""
    text = " ".join(str(error).split()) or "(no message)"
    return (text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}")[:300]


@contextmanager
def _check(name: str, failures: list[str]) -> Iterator[None]:
    """Adds whatever is raised inside to `failures`."""
    try:
        yield
    except Exception as error:
        failures.append(f"{name}: {_message(error)}")


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    error = relative_error(actual, expected)
    assert error <= STREAM, f"differs by {error:.1e}"


def _tokens(length: int) -> Tensor:
    """(2, length) random ids: the second row is the first with another last token."""
    ids = torch.randint(3, SPECIAL, (1, length), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    ids[1, -1] = 3 if ids[0, -1] != 3 else 4
    return ids


def _forward(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Any:
    """One forward with those of `arguments` that the model takes, positions through its open keywords too."""
    accepted: set[str] = set(inspect.signature(type(model).forward).parameters)
    accepted |= {"position_ids"} if "kwargs" in accepted else set()
    with torch.no_grad():
        return model(input_ids=ids, **{name: value for name, value in arguments.items() if name in accepted})


def _traces(model: PreTrainedModel) -> dict[str, Any]:
    """What a refused or reverted conversion must leave as it was."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return {
        "tensors": list(model.state_dict()),
        "attention implementation": [getattr(config, "_attn_implementation", None) for config in configs.values()],
        "config": [name for config in configs.values() for name in vars(config) if name.startswith("darkformer")],
        "hooks": sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()),
    }


def _keeping_a_head(model: PreTrainedModel) -> DarkConfig:
    several = (layer.layer for *_, layer in plan_conversion(model, LINEAR).layers if layer.num_kv_heads > 1)
    if (layer := next(several, None)) is None:
        raise ConversionError("no layer has a second kv head")
    return replace(LINEAR, keep_exact=(f"{layer}.0",))


class _Sweep:
    """The checks of one model_type, on 16 tokens, or in the full form on 20 with padding and checkpoints.

    kept: a kv head of the first layer that has several keeps softmax.
    """

    def __init__(self, model_type: str, full: bool, kept: bool) -> None:
        self.model_type, self.full, self.kept = model_type, full, kept
        self.failures: list[str] = []
        self.notes: list[str] = []
        self.ids = _tokens(20 if full else 16)
        self.mask = left_mask([0, PADS], self.ids.shape[1])
        self.steps = list(range(PREFILL, self.ids.shape[1]))
        self.takes_positions = False

    def run(self) -> Outcome:
        try:
            model = tiny_model(self.model_type)
            self.softmax = self._whole(model, self.ids)
            assert self.softmax.isfinite().all(), "its logits are not finite"
            assert self.softmax.shape[:2] == self.ids.shape, f"its logits are {tuple(self.softmax.shape)}"
        except Exception as error:
            return Outcome("not run", _message(error))
        self.takes_positions = self._counts_from_zero(model)
        self.padded = self._whole(model, self.ids, self.mask)
        self.crossed = self._with_encoder(model)
        self.before = _traces(model)
        try:
            self._convert(model, _keeping_a_head(model) if self.kept else LINEAR)
        except ConversionError as error:
            self._unchanged("refused", model)
            return Outcome("refused", " ".join(str(error).split()), self.failures)
        except Exception as error:
            return Outcome("converted", "", [f"convert: {_message(error)}"])
        self._linear(disturb(model))
        with _check("reverted", self.failures):
            revert(model)
        self._unchanged("reverted", model)
        self._exact(tiny_model(self.model_type) if self.failures else model)
        return Outcome("converted", "", self.failures, self.notes)

    @staticmethod
    def _convert(model: PreTrainedModel, config: DarkConfig) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # capped logits are announced
            convert(model, config)

    def _unchanged(self, name: str, model: PreTrainedModel) -> None:
        with _check(name, self.failures):
            after = _traces(model)
            changed = [name for name in after if after[name] != self.before[name]]
            assert not changed, f"changed its {' and '.join(changed)}"
            assert torch.equal(self._whole(model, self.ids), self.softmax), "changed its logits"

    def _exact(self, model: PreTrainedModel) -> None:
        """Exact mode is the original."""
        with _check("exact forward", self.failures):
            self._convert(model, EXACT)
            _assert_close(self._whole(model, self.ids), self.softmax)
        with _check("left-padded exact forward", self.failures):
            real = self.mask.bool()
            _assert_close(self._whole(model, self.ids, self.mask)[real], self.padded[real])
        if self.crossed is not None:
            with _check("exact forward with encoder states", self.failures), suppress(ConversionError):
                _assert_close(self._encoded(model), self.crossed)

    def _linear(self, model: PreTrainedModel) -> None:
        """Linear mode is softmax where attention is near, differs where it is far, and streams."""
        whole = None
        with _check("linear forward", self.failures):
            whole = self._whole(model, self.ids)
            assert whole.isfinite().all(), "not finite"
        if whole is None:
            return
        with _check("linear differs from softmax", self.failures):
            error = relative_error(whole[:, FAR:], self.softmax[:, FAR:])
            assert error > DIFFERS, f"only by {error:.1e}"
        with _check("linear is softmax near by", self.failures):
            _assert_close(whole[:, :NEAR], self.softmax[:, :NEAR])
        if self.crossed is not None:
            with _check("linear forward with encoder states", self.failures), suppress(ConversionError):
                _assert_close(self._encoded(model)[:, :NEAR], self.crossed[:, :NEAR])
        checks = {"causal": self._causal, "steps": self._steps, "two prefills": self._prefills}
        if self.full:
            checks |= {"left padding": self._padding, "padded steps": self._padded_steps, "saved": self._saved}
        for name, error_of in checks.items():
            self._compare(name, error_of, _Run(model, whole))

    def _compare(self, name: str, error_of: Callable[[_Run], float], run: _Run) -> None:
        """A failure if the error is large and the softmax model's is not; a note if it is large for both."""
        failures: list[str] = []
        error = float("inf")
        with _check(name, failures):
            error = error_of(run)
            assert error <= STREAM, f"differs by {error:.1e}"
        if not failures:
            return
        original: list[str] = []
        with _check(name, original):
            floor = error_of(_Run(tiny_model(self.model_type), self.softmax))
            if floor > STREAM and error <= 4 * floor <= ROUNDING:
                return  # this model magnifies rounding: softmax streams no better
            assert floor <= STREAM, f"differs by {floor:.1e}"
        self.notes += [f"of softmax too, {text}" for text in original]
        self.failures += [] if original else failures

    def _causal(self, run: _Run) -> float:
        return relative_error(run.logits[1, :-1], run.logits[0, :-1])

    def _steps(self, run: _Run) -> float:
        return relative_error(self._streamed(run.model, self.steps), run.logits)

    def _prefills(self, run: _Run) -> float:
        return relative_error(self._streamed(run.model, [PREFILL]), run.logits)

    def _padding(self, run: _Run) -> float:
        alone = self._whole(run.model, self.ids[1:, PADS:])
        return relative_error(self._whole(run.model, self.ids, self.mask)[1:, PADS:], alone)

    def _padded_steps(self, run: _Run) -> float:
        whole, real = self._whole(run.model, self.ids, self.mask), self.mask.bool()
        return relative_error(self._streamed(run.model, self.steps, self.mask)[real], whole[real])

    def _saved(self, run: _Run) -> float:
        known = type(run.model.config) in MODEL_FOR_CAUSAL_LM_MAPPING  # a part of a composite model may not be
        with tempfile.TemporaryDirectory() as folder:
            run.model.save_pretrained(folder)
            loaded = (AutoModelForCausalLM if known else type(run.model)).from_pretrained(folder).eval()
        assert type(loaded) is type(run.model), f"loaded as {type(loaded).__name__}"
        assert torch.equal(self._whole(loaded, self.ids), run.logits), "other logits after loading"
        return 0.0

    def _counts_from_zero(self, model: PreTrainedModel) -> bool:
        """Whether position_ids of real tokens begin at 0: RoBERTa's begin after the padding index."""
        given = None
        with suppress(Exception):
            place = positions(torch.ones_like(self.ids))
            given = _forward(model, self.ids, position_ids=place, use_cache=False).logits
        return given is not None and relative_error(given, self.softmax) <= STREAM

    def _place(self, mask: Tensor, start: int, stop: int) -> dict[str, Tensor]:
        """The mask and the positions of tokens [start, stop), as `generate` gives them."""
        place = {"attention_mask": mask[:, :stop]}
        return place | ({"position_ids": positions(mask)[:, start:stop]} if self.takes_positions else {})

    def _whole(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, V) of one forward without a cache."""
        place = {} if mask is None else self._place(mask, 0, ids.shape[1])
        return _forward(model, ids, use_cache=False, **place).logits

    def _streamed(self, model: PreTrainedModel, cuts: list[int], mask: Tensor | None = None) -> Tensor:
        """The same logits from one forward per piece [0, cuts[0]), [cuts[0], cuts[1]), … with a cache."""
        mask = torch.ones_like(self.ids) if mask is None else mask
        past: dict[str, Any] = {}
        pieces = []
        for start, stop in zip([0, *cuts], [*cuts, self.ids.shape[1]], strict=True):
            out = _forward(model, self.ids[:, start:stop], use_cache=True, **past, **self._place(mask, start, stop))
            past = {name: out[name] for name in CACHES if out.get(name) is not None}
            assert past, "no cache is returned"
            pieces.append(out.logits)
        return torch.cat(pieces, dim=1)

    def _encoded(self, model: PreTrainedModel) -> Tensor:
        """(B, L, V) with keys and values of an encoder beside the model's own."""
        states = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
        encoder = dict(encoder_hidden_states=states, encoder_outputs=(states,))  # the latter: Whisper
        return _forward(model, self.ids, **encoder, use_cache=False).logits

    def _with_encoder(self, model: PreTrainedModel) -> Tensor | None:
        """The same, or None from a model that takes no encoder's states."""
        if {"encoder_hidden_states", "encoder_outputs"} & inspect.signature(type(model).forward).parameters.keys():
            with suppress(Exception):
                return self._encoded(model)
        return None


_outcomes: dict[tuple[Any, bool, bool], Outcome] = {}


def sweep(model_type: str, full: bool = False, kept: bool = False) -> Outcome:
    """The outcome of one model_type; several that lead to the same classes are run once in a process."""
    key = (pair(model_type), full, kept)
    if key not in _outcomes:
        _outcomes[key] = _Sweep(model_type, full, kept).run()
    return _outcomes[key]


def describe(model_type: str, outcome: Outcome) -> str:
    """What the table says of an outcome: a short reason that models share, so that they stand in one row."""
    if outcome.failures:
        return "does not work yet: " + ", ".join(failure.split(":")[0] for failure in outcome.failures)
    if outcome.status == "converted":
        return "works"
    if outcome.status == "not run":
        return "not run: " + re.split(r"(?<=\w)\. ", outcome.reason.replace("|", "/"))[0]
    text = outcome.reason.replace(pair(model_type)[1].__name__, "the model").replace("|", "/")
    text = re.sub(r"^\S+ \(\w+\) ", "attention ", text)  # model.layers.0.self_attn (LlamaAttention) …
    text = re.sub(r"\b[\w.]*\.\d+\.[\w.]+", "a layer", text)
    text = re.sub(r"\b\w+(Attention|Model|Layer|Block|Mixer)\b", "its class", text)
    text = re.sub(r"\b\d+\b", "N", text)
    text = re.split(r"(?<=\w)[.:;](?:\s|$)", text)[0]
    return "refused: " + re.sub(r"\s*\([^()]*$", "", text)  # a parenthesis that the cut left open
