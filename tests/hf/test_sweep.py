"""Every causal language model of transformers works after `convert`, or `convert` refuses it and leaves it alone.

The list is transformers' own, so a new version brings its new models. `pytest -m full` has those that are not in every
run, and the full form: more tokens, left padding, checkpoints.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf.sweep
from darkformer import ConversionError, DarkConfig, convert
from hf.sweep import describe, sweep
from hf.sweep_table import read_table
from hf.tiny_models import MODEL_TYPES, label

VERSION, TABLE = read_table()
PINNED = transformers.__version__ == VERSION
AGAIN = "python tests/hf/sweep_table.py --write brings docs/families.md up to date."
#: Every third one, and what people convert most.
EVERY_RUN = {*MODEL_TYPES[::3], "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}


@pytest.mark.parametrize(
    "model_type", [x if x in EVERY_RUN else pytest.param(x, marks=pytest.mark.full) for x in MODEL_TYPES]
)
def test_works_or_is_refused(model_type: str) -> None:
    outcome = sweep(model_type)
    assert not outcome.failures, "\n".join([f"{label(model_type)} ({outcome.status})", *outcome.failures])
    committed, found = TABLE.get(label(model_type), "nothing"), describe(model_type, outcome)
    if committed != found:
        text = f"{label(model_type)}: the table of transformers {VERSION} has {committed!r}, found {found!r}. {AGAIN}"
        assert not PINNED, text
        warnings.warn(text, stacklevel=1)  # another version may have other models, which its table will say
    if outcome.status == "not run":
        pytest.skip(outcome.reason)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_in_full(model_type: str) -> None:
    outcome = sweep(model_type, full=True)
    assert not outcome.failures, "\n".join([f"{label(model_type)} ({outcome.status})", *outcome.failures])
    if outcome.status == "not run":
        pytest.skip(outcome.reason)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_with_a_head_that_keeps_softmax(model_type: str) -> None:
    outcome = sweep(model_type, full=True, kept=True)
    assert not outcome.failures, "\n".join([f"{label(model_type)} ({outcome.status})", *outcome.failures])
    if outcome.status != "converted":
        pytest.skip(outcome.reason)


@pytest.mark.skipif(not PINNED, reason=f"the table is of transformers {VERSION}")
def test_the_table_has_every_class_and_no_other() -> None:
    named = {re.sub(r" \(.*", "", name) for name in TABLE}
    assert named == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()), AGAIN


def _late(model: PreTrainedModel, config: DarkConfig) -> None:
    convert(model, config)
    raise ConversionError("refused when the feature maps are in already")


def _crash(model: PreTrainedModel, config: DarkConfig) -> None:
    raise TypeError("no number")


def _nothing(model: PreTrainedModel, config: DarkConfig) -> None:
    model.config.darkformer = config.to_dict()


def _noncausal(model: PreTrainedModel, config: DarkConfig) -> None:
    convert(model, config)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


@pytest.mark.parametrize(
    ("faulty", "failure"),
    [
        (_late, "refused: changed its tensors"),
        (_crash, "convert: TypeError: no number"),
        (_nothing, "linear differs from softmax: only by 0"),
        (_noncausal, "causal: differs by"),
    ],
)
def test_a_faulty_convert_is_noticed(faulty: Callable[..., Any], failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.sweep, "convert", faulty)
    monkeypatch.setattr(hf.sweep, "_outcomes", {})
    assert any(found.startswith(failure) for found in sweep("llama").failures), sweep("llama")
