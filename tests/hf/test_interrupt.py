"""Ctrl-C inside a forward pass: the cache is as before, or complete, or refused; never read on from half a token."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import darkformer
from darkformer import ConversionError, convert, save_cache
from darkformer.hf import convert as conversion
from hf.families import DARK, SIZES, converted, linear, logits, tiny, tokens

#: Lines of these files are places where the interpreter may raise KeyboardInterrupt.
FILES = (str(Path(darkformer.__file__).parent / "hf"), str(Path(tf.__file__).parent / "models"))
LENGTH = 14


@contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """Raises KeyboardInterrupt before the `line`-th line that runs in FILES; yields how many ran."""
    ran = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FILES):
            return None
        if event == "line":
            ran[0] += 1
            if ran[0] == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield ran
    finally:
        sys.settrace(before)


def sliding_last() -> PreTrainedModel:
    config = tf.Gemma3TextConfig(
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"], **SIZES,
    )  # fmt: skip
    return converted(tf.Gemma3ForCausalLM(config).eval(), DARK)


def differential() -> PreTrainedModel:
    settings = dict(num_attention_heads=4, num_key_value_heads=2, **SIZES)
    return converted(tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**settings)).eval(), DARK)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: linear("llama"),
    "heads of three kinds": lambda: linear("llama-mixed"),
    "softmax layers around": lambda: linear("llama", replace(DARK, keep_exact=(0, 2))),
    "one layer": lambda: linear("llama", replace(DARK, keep_exact=(0, 1))),
    "sliding layers first": lambda: linear("gemma3"),
    "sliding layers last": sliding_last,
    "differential": differential,
}


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    return model(ids, past_key_values=cache, use_cache=True).logits[:, -1]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


@pytest.mark.parametrize("new", [1, 5])
def test_wherever_it_comes(model: PreTrainedModel, new: int) -> None:
    """What is accepted afterwards has read the tokens once or not at all."""
    ids = tokens(1, LENGTH)
    prompt = DynamicCache(config=model.config)
    read(model, ids[:, :6], prompt)

    def fresh() -> Any:
        cache = copy.deepcopy(prompt)
        read(model, ids[:, 6:7], cache)  # so that the next token meets a compiled step
        return cache

    part, cache = ids[:, 7 : 7 + new], fresh()
    with interrupted_at(-1) as lines:
        once = read(model, part, cache)
    twice = read(model, part, cache)
    refused = 0
    for line in range(1, lines[0], 29):
        cache = fresh()
        with suppress(KeyboardInterrupt), interrupted_at(line):
            read(model, part, cache)
        try:
            again = read(model, part, cache)
        except ConversionError as error:
            assert "interrupted" in str(error)
            refused += 1
            continue
        assert any(torch.allclose(again, x, atol=1e-4) for x in (once, twice)), f"line {line} of {lines[0]}"
    assert refused > 5


class TestRefused:
    @staticmethod
    def _uneven(model: PreTrainedModel) -> DynamicCache:
        """A cache whose first layer alone has read the last token."""
        cache = DynamicCache(config=model.config)
        read(model, tokens(1, 8), cache)

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            read(model, tokens(1, 1), cache)
        handle.remove()
        return cache

    def test_again_and_again(self) -> None:
        model = linear("llama")
        cache = self._uneven(model)
        for ids in (tokens(1, 1), tokens(1, 1), tokens(1, 5)):
            with pytest.raises(ConversionError, match=r"different numbers of tokens \(9 and 8\).*interrupted"):
                read(model, ids, cache)
        with pytest.raises(ConversionError, match="different numbers of tokens"):
            model.generate(tokens(1, 10), past_key_values=cache, max_new_tokens=2)

    def test_during_the_prompt(self) -> None:
        """Layers that keep softmax and have read nothing count as well."""
        model = linear("llama", replace(DARK, keep_exact=(1, 2)))
        cache = DynamicCache(config=model.config)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            read(model, tokens(1, 8), cache)
        handle.remove()
        with pytest.raises(ConversionError, match=r"\(8 and 0\).*interrupted"):
            read(model, tokens(1, 1), cache)

    def test_copies_and_files(self, tmp_path: Path) -> None:
        model = linear("llama")
        cache = self._uneven(model)
        with pytest.raises(ConversionError, match="interrupted"):
            read(model, tokens(1, 1), copy.deepcopy(cache))
        with pytest.raises(ConversionError, match="interrupted"):
            save_cache(cache, model, tmp_path / "prompt.safetensors")
        assert list(tmp_path.iterdir()) == []

    def test_an_emptied_cache_is_as_new(self) -> None:
        model, ids = linear("llama-mixed"), tokens(1, 9)
        cache = self._uneven(model)
        cache.reset()
        assert torch.equal(read(model, ids, cache), read(model, ids, DynamicCache(config=model.config)))


@pytest.mark.parametrize("at", ["_set_map", "streaming_error"])
def test_an_interrupted_conversion_leaves_softmax(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the check of the steps has taken the conversion back for a moment."""
    model, calls, whole = tiny("llama"), [], getattr(conversion, at)

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return torch.inf if at == "streaming_error" else whole(*args)

    before = logits(model, tokens(1, 20))
    with monkeypatch.context() as patch:
        patch.setattr(conversion, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(model, DARK)
    assert torch.equal(logits(model, tokens(1, 20)), before) and not hasattr(model.config, "darkformer")
    convert(model, DARK)
