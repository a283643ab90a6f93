"""Exact heads, heads with features and heads without beside each other: all that holds for a converted layer."""

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from accelerate import cpu_offload
from tolerances import STREAM, relative_error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from darkformer import (
    ConfigError,
    ConversionError,
    DarkConfig,
    FeatureMap,
    InputError,
    attention,
    convert,
    cost,
    dark_layers,
    load_cache,
    load_light,
    redraw,
    revert,
    save_cache,
    save_light,
)
from darkformer.hf.cache import DarkCacheLayer, cache_bytes
from darkformer.hf.convert import drop_features
from darkformer.hf.layers import converted_modules, layer_of
from darkformer.hf.parts import parts_of
from darkformer.hf.saved_cache import cache_of
from hf.families import (
    DARK,
    SIZES,
    Whole,
    converted,
    disturb,
    left_mask,
    linear,
    logits,
    positions,
    streamed,
    tiny,
    tokens,
)

#: Layer by layer: all three kinds; two kinds, apart, under a longer window; none with features; softmax throughout.
MIXED = replace(
    DARK, keep_exact=("0.2", "1.0", "1.3", "2.1", 3), no_features=("0.0", 2), layer_windows=((1, 6), (2, 3))
)
EXACT = {0: [2], 1: [0, 3], 2: [1], 3: [0, 1, 2, 3]}
LOCAL = {0: [0], 1: [], 2: [0, 2, 3], 3: []}
LENGTH, NEW = 24, 10
GREEDY: dict[str, Any] = dict(do_sample=False, max_new_tokens=NEW)
IDS, MASK = tokens(2, LENGTH), left_mask([0, 5], LENGTH)
REAL = MASK.bool()


def softmax_model(layers: int = 4) -> PreTrainedModel:
    """Eight query heads on four key/value heads."""
    sizes = {**SIZES, "num_hidden_layers": layers}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = tf.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
        return tf.LlamaForCausalLM(settings).eval()


def mixed(config: DarkConfig = MIXED) -> PreTrainedModel:
    return disturb(convert(softmax_model(), config))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Nothing here may change it."""
    return mixed()


@pytest.fixture(scope="module")
def whole(model: PreTrainedModel) -> Tensor:
    return logits(model, IDS, MASK)


@pytest.fixture(scope="module")
def greedy(model: PreTrainedModel) -> Tensor:
    found = model.generate(IDS, attention_mask=MASK, **GREEDY)
    mask = torch.cat([MASK, MASK.new_ones(2, NEW)], dim=1)
    best = logits(model, found, mask)[:, LENGTH - 1 : -1].argmax(-1)
    assert torch.equal(best, found[:, LENGTH:])  # each token is the likeliest one of a full forward
    return found


@contextmanager
def attentions() -> Iterator[list[tuple[Any, Tensor, Tensor, Tensor, Tensor]]]:
    """(module, q, k, v, output (B, H, L, d)) of each call of transformers' attention interface."""
    seen: list[tuple[Any, Tensor, Tensor, Tensor, Tensor]] = []
    table = ALL_ATTENTION_FUNCTIONS._global_mapping
    before = {name: table[name] for name in ("darkformer", "sdpa")}

    def spy(name: str) -> Any:
        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = before[name](module, q, k, v, *args, **kwargs)
            seen.append((module, q, k, v, output[0].transpose(1, 2)))
            return output

        return attend

    try:
        table.update({name: spy(name) for name in before})
        yield seen
    finally:
        table.update(before)


def alone(q: Tensor, k: Tensor, v: Tensor, module: Any, config: DarkConfig, head: int) -> Tensor:
    """One key/value head (B, R, L, d) of a layer without padding, by plain means."""
    layer, fm = module.layer_idx, module.dark
    length, far = q.shape[2], torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    causal = far >= 0
    if head in EXACT[layer] or head in LOCAL[layer]:
        seen = (far < config.window_of(layer)) | (torch.arange(length) < config.sinks)
        seen = causal if head in EXACT[layer] else causal & seen
        scores = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v.double()).float()
    own = FeatureMap(
        replace(DARK, window=config.window_of(layer)), num_heads=q.shape[1], num_kv_heads=1, head_dim=q.shape[-1],
        layer=layer, heads=(head,),
    )  # fmt: skip
    row = fm.heads.index(head)
    for name, value in fm.values().items():
        own.set_(name, value[row : row + 1])
    return attention(q, k, v, own, scaling=q.shape[-1] ** -0.5)


class TestHeads:
    """Which heads compute what."""

    def test_a_layer_is_its_heads_beside_each_other(self, model: PreTrainedModel) -> None:
        with attentions() as seen:
            logits(model, IDS)
        assert [call[0].layer_idx for call in seen] == [0, 1, 2, 3]
        for module, q, k, v, output in seen:
            for g in range(4):
                rows = slice(2 * g, 2 * g + 2)
                wanted = alone(q[:, rows], k[:, g : g + 1], v[:, g : g + 1], module, MIXED, g)
                assert relative_error(output[:, rows], wanted) <= STREAM, (module.layer_idx, g)

    def test_exact_heads_are_softmax_to_the_bit(self, model: PreTrainedModel) -> None:
        with attentions() as before:
            logits(softmax_model(), IDS)
        with attentions() as after:
            logits(model, IDS)
        same = [torch.equal(before[0][4][:, h], after[0][4][:, h]) for h in range(8)]  # the first layer's input is one
        assert same == [h // 2 == 2 for h in range(8)]

    def test_all_heads_by_name_are_the_whole_layer(self) -> None:
        names = tuple(f"{layer}.{g}" for layer in range(4) for g in range(4))
        every = convert(softmax_model(), replace(DARK, keep_exact=names))
        assert torch.equal(logits(every, IDS, MASK), logits(softmax_model(), IDS, MASK))
        assert all(layer_of(module).exact for module in converted_modules(every))

    def test_only_heads_with_features_have_tensors(self, model: PreTrainedModel) -> None:
        maps = list(dark_layers(model))
        assert [fm.heads for fm in maps[:2]] == [(1, 3), (1, 2)]
        assert [fm.config.method for fm in maps] == ["dark", "dark", "local", "exact"]
        assert all(x.shape[0] == 2 for fm in maps[:2] for x in (*fm.parameters(), *fm.buffers()))
        assert not any([*fm.parameters(), *fm.buffers()] for fm in maps[2:])

    def test_a_draw_does_not_depend_on_the_other_heads(self) -> None:
        some, every = mixed(), mixed(DARK)
        for step in (0, 5):
            redraw(some, step)
            redraw(every, step)
            for a, b in list(zip(dark_layers(some), dark_layers(every), strict=True))[:2]:
                assert torch.equal(a.projection, b.projection[list(a.heads)])

    @pytest.mark.parametrize("method", ["performer", "lfk", "local"])
    def test_other_methods(self, method: str) -> None:
        changed = mixed(replace(MIXED, method=method))
        assert (
            relative_error(streamed(changed, IDS, MASK, [9, 10, 17])[REAL], logits(changed, IDS, MASK)[REAL]) <= STREAM
        )
        assert relative_error(logits(changed, IDS), logits(mixed(), IDS)) > 1e-3

    @pytest.mark.parametrize("family", ["bert", "gpt2"])
    def test_without_and_with_direction(self, family: str) -> None:
        config = replace(DARK, keep_exact=("0.1", "1.0", "1.3"))
        found = linear(family, config)
        with attentions() as before:
            tiny(family)(IDS)
        with attentions() as after:
            found(IDS)
        same = [torch.allclose(before[0][4][:, h], after[0][4][:, h], rtol=0, atol=1e-6) for h in range(4)]
        assert same == [False, True, False, False]

    def test_revert_is_bit_identical(self) -> None:
        before, changed = softmax_model(), mixed()
        wanted, keys = logits(before, IDS, MASK), list(before.state_dict())
        logits(changed, IDS, MASK)
        assert torch.equal(logits(revert(changed), IDS, MASK), wanted)
        assert list(changed.state_dict()) == keys and changed.config.to_dict() == before.config.to_dict()


class TestStreams:
    """The cache: any pieces, rows that move, tokens taken back."""

    @pytest.mark.parametrize("cuts", [[5], [1, 2, 3], [17, 18, 19, 20], list(range(1, LENGTH))])
    def test_any_pieces(self, model: PreTrainedModel, whole: Tensor, cuts: list[int]) -> None:
        assert relative_error(streamed(model, IDS, MASK, cuts)[REAL], whole[REAL]) <= STREAM

    @torch.no_grad()
    def test_pads_in_the_middle(self, model: PreTrainedModel) -> None:
        # A batched chat: the turns of its rows have different lengths.
        mask = torch.ones_like(IDS)
        mask[0, 6:9] = mask[1, :3] = mask[1, 14:15] = 0
        wanted = logits(model, IDS, mask)
        assert relative_error(streamed(model, IDS, mask, [9, 15, 16])[mask.bool()], wanted[mask.bool()]) <= STREAM
        for row in range(2):  # and nothing of a pad is left
            real = mask[row].bool()
            assert relative_error(wanted[row, real], logits(model, IDS[row : row + 1, real])[0]) <= STREAM

    @torch.no_grad()
    @pytest.mark.parametrize("how", ["reorder", "repeat", "select", "select by booleans"])
    def test_rows_move(self, model: PreTrainedModel, whole: Tensor, how: str) -> None:
        cache = model(IDS[:, :15], attention_mask=MASK[:, :15], position_ids=positions(MASK)[:, :15]).past_key_values
        rows = {"reorder": [1, 0], "repeat": [0, 0, 1, 1]}.get(how, [1])
        if how == "repeat":
            cache.batch_repeat_interleave(2)
        elif how == "reorder":
            cache.reorder_cache(torch.tensor(rows))
        else:
            cache.batch_select_indices(torch.tensor([False, True]) if "booleans" in how else torch.tensor([1]))
        place = positions(MASK)[rows]
        found = model(
            IDS[rows, 15:], attention_mask=MASK[rows], position_ids=place[:, 15:], past_key_values=cache
        ).logits  # fmt: skip
        assert relative_error(found, whole[rows, 15:]) <= STREAM

    def test_beams(self, model: PreTrainedModel) -> None:
        options: dict[str, Any] = dict(GREEDY, num_beams=3, num_return_sequences=2, attention_mask=MASK)
        assert torch.equal(model.generate(IDS, **options), model.generate(IDS, **options, use_cache=False))

    @torch.no_grad()
    @pytest.mark.parametrize("remove", [1, 4, 15, 18])
    def test_tokens_are_taken_back(self, model: PreTrainedModel, whole: Tensor, remove: int) -> None:
        place, cache = positions(MASK), DynamicCache(config=model.config)
        cache.activate_past_recording()
        other = torch.cat([IDS[:, : 18 - remove], tokens(2, remove, seed=1)], dim=1)
        for start, stop in ((0, 14), (14, 15), (15, 18)):
            model(
                other[:, start:stop], attention_mask=MASK[:, :stop], position_ids=place[:, start:stop],
                past_key_values=cache,
            )  # fmt: skip
        cache.crop(-remove)
        assert cache.get_seq_length() == 18 - remove
        rest = model(
            IDS[:, 18 - remove :], attention_mask=MASK, position_ids=place[:, 18 - remove :], past_key_values=cache
        ).logits
        real = REAL[:, 18 - remove :]
        assert relative_error(rest[real], whole[:, 18 - remove :][real]) <= STREAM

    def test_assisted_decoding(self, model: PreTrainedModel) -> None:
        draft = mixed()
        with torch.no_grad():
            draft.lm_head.weight.add_(0.05 * torch.randn(draft.lm_head.weight.shape))
        draft.generation_config.num_assistant_tokens = 4
        draft.generation_config.assistant_confidence_threshold = 0.0
        wanted = model.generate(IDS[:1], **GREEDY)
        assert torch.equal(model.generate(IDS[:1], assistant_model=draft, **GREEDY), wanted)
        repeated = tokens(1, 8).repeat(1, 3)
        found = model.generate(repeated, prompt_lookup_num_tokens=3, **GREEDY)
        assert torch.equal(found, model.generate(repeated, **GREEDY))

    @pytest.mark.parametrize("limits", [{}, {"prefill_chunk_size": 7}])
    def test_a_static_cache(self, greedy: Tensor, limits: dict[str, int]) -> None:
        fresh = mixed()  # generate notes the length of its last static cache
        out = fresh.generate(
            IDS, attention_mask=MASK, cache_implementation="static", return_dict_in_generate=True, **GREEDY, **limits
        )  # fmt: skip
        assert torch.equal(out.sequences, greedy)
        room = LENGTH + NEW - 1
        for layer, cached in enumerate(out.past_key_values.layers[:3]):
            assert [x.keys.shape for x in cached.exact_layers] == [(2, len(EXACT[layer]), room, 8)]
            assert cached.template.keys is None  # room for no other head

    def test_an_offloaded_cache(self) -> None:
        model = linear("llama-mixed")  # without a softmax layer, which transformers offloads with CUDA only
        out = model.generate(IDS, attention_mask=MASK, cache_implementation="offloaded", **GREEDY)
        assert torch.equal(out, model.generate(IDS, attention_mask=MASK, **GREEDY))

    @torch.no_grad()
    def test_a_quantized_cache(self, model: PreTrainedModel, whole: Tensor, tmp_path: Path) -> None:
        cache = QuantizedCache("fp8", config=model.config)
        cache.activate_past_recording()
        model(IDS[:, :15], past_key_values=cache)
        found, wanted = model(IDS[:, 15:], past_key_values=cache).logits, logits(model, IDS)[:, 15:]
        assert STREAM < relative_error(found, wanted) < 0.1
        assert type(cache.layers[0].exact_layers[0]).__name__ == "Fp8QuantizedLayer"
        with pytest.raises(
            ConversionError, match=r"crop\(-1\).*Fp8QuantizedLayer, which takes none back\. Use a dynamic"
        ):
            cache.crop(-1)
        with pytest.raises(ConversionError, match="a cache of Fp8QuantizedLayer is not saved"):
            save_cache(cache, model, tmp_path / "prompt.safetensors")
        mask = torch.ones(2, 15)
        softmax = QuantizedCache("fp8", config=model.config)
        softmax_model()(IDS[:, :15], attention_mask=mask, past_key_values=softmax)
        with pytest.raises(ConversionError, match=r"layer 0 .*Fp8QuantizedLayer, has read 15 tokens.*empty cache"):
            model(IDS[:, 15:], past_key_values=softmax)

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["dynamic", "static", "fp8"])
    def test_reset(self, model: PreTrainedModel, whole: Tensor, kind: str) -> None:
        cache: Any = {
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=40),
            "fp8": lambda: QuantizedCache("fp8", config=model.config),
        }[kind]()
        given: dict[str, Any] = dict(attention_mask=MASK, position_ids=positions(MASK), past_key_values=cache)
        model(tokens(2, LENGTH, seed=9), **given)
        cache.reset()
        assert relative_error(model(IDS, **given).logits[REAL], whole[REAL]) <= STREAM

    @torch.no_grad()
    def test_bytes_are_those_of_the_formula(self, model: PreTrainedModel) -> None:
        cache = DynamicCache(config=model.config)
        for stop in (20, 21, 60, 200):
            start = cache.get_seq_length()
            model(tokens(1, stop)[:, start:], past_key_values=cache)
            wanted = [cost.layer_bytes(MIXED, layer, stop, num_kv_heads=4, head_dim=8) for layer in range(4)]
            assert [layer.nbytes for layer in cache.layers[:3]] == wanted[:3]
            assert cache_bytes(cache) == sum(wanted)

    @torch.no_grad()
    def test_nothing_holds_the_keys_of_the_other_heads(self, model: PreTrainedModel) -> None:
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=5000)):
            model(tokens(1, 2000), past_key_values=cache, logits_to_keep=1)
            limit = 2000 if isinstance(cache, DynamicCache) else 5000
            for layer, cached in enumerate(cache.layers[:3]):
                held = _tensors(vars(cached))
                storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
                assert sum(storages.values()) < 4 * 2 * 8 * limit * len(EXACT[layer]) + 20_000

    @torch.no_grad()
    def test_softmax_keys_are_let_go(self) -> None:
        # Once they are in the sums nothing may hold a softmax model's keys.
        model = softmax_model(1)
        cache = model(tokens(1, 2000), use_cache=True, logits_to_keep=1).past_key_values
        convert(model, DARK)
        for _ in range(2):
            model(tokens(1, 1), past_key_values=cache)
        assert sum(x.nbytes for x in _tensors(vars(cache.layers[0]))) < 20_000


def _tensors(x: Any, known: set[int] | None = None) -> list[Tensor]:
    """All tensors that an object holds."""
    known = set() if known is None else known
    if id(x) in known or isinstance(x, nn.Module):
        return []
    known.add(id(x))
    if isinstance(x, Tensor):
        return [x]
    inner = list(vars(x).values()) if hasattr(x, "__dict__") else []
    inner += x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else []
    return [tensor for one in inner for tensor in _tensors(one, known)]


class TestTravel:
    """Caches that are copied, pickled, saved or come from elsewhere."""

    @staticmethod
    def _filled(model: PreTrainedModel, cache: Any = None) -> Any:
        given = dict(attention_mask=MASK[:, :15], position_ids=positions(MASK)[:, :15])
        return model(IDS[:, :15], **given, past_key_values=cache, use_cache=True).past_key_values

    @staticmethod
    @torch.no_grad()
    def _rest(model: PreTrainedModel, cache: Any) -> Tensor:
        place = positions(MASK)[:, 15:]
        return model(IDS[:, 15:], attention_mask=MASK, position_ids=place, past_key_values=cache).logits

    @pytest.mark.parametrize("grad", [False, True])
    def test_copies(self, grad: bool) -> None:
        model = mixed(replace(MIXED, keep_exact=MIXED.keep_exact[:-1]))  # transformers' own layers keep their graph
        whole = logits(model, IDS, MASK)
        with torch.set_grad_enabled(grad):
            cache = self._filled(model)
        twin, own = copy.deepcopy((model, cache))
        assert relative_error(self._rest(twin, own), whole[:, 15:]) <= STREAM
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), torch.load(file, weights_only=False)
        for one in (*copies, cache):
            assert relative_error(self._rest(model, one), whole[:, 15:]) <= STREAM

    @torch.no_grad()
    @pytest.mark.parametrize("static", [False, True])
    def test_files(self, model: PreTrainedModel, static: bool, tmp_path: Path) -> None:
        made = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
        cache = self._filled(model, made)
        file = save_cache(cache, model, tmp_path / "prompt.safetensors")
        model.save_pretrained(tmp_path / "model")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        loaded = load_cache(file, again)
        assert loaded.get_seq_length() == 15
        assert [x.exact_layers[0].keys.shape[1] for x in loaded.layers[:3]] == [1, 2, 1]
        assert relative_error(self._rest(again, loaded), self._rest(model, cache)) <= (STREAM if static else 0)

    @torch.no_grad()
    def test_a_file_of_an_emptied_cache(self, model: PreTrainedModel, whole: Tensor, tmp_path: Path) -> None:
        for empty in (lambda c: c.reset(), lambda c: c.crop(-15)):
            cache = DynamicCache(config=model.config)
            cache.activate_past_recording()
            empty(self._filled(model, cache))
            loaded = load_cache(save_cache(cache, model, tmp_path / "prompt.safetensors"), model)
            self._filled(model, loaded)
            assert relative_error(self._rest(model, loaded), whole[:, 15:]) <= STREAM

    def test_other_exact_heads(self, model: PreTrainedModel, tmp_path: Path) -> None:
        other = mixed(replace(MIXED, keep_exact=("0.1", "1.0", "1.3", "2.1", 3)))
        with torch.no_grad():
            file = save_cache(self._filled(model), model, tmp_path / "prompt.safetensors")
            filled = copy.deepcopy(self._filled(model))
        with pytest.raises(
            InputError, match=r"keep_exact: \['0\.2', .* there, \['0\.1', .* here.*compute the prompt again"
        ):
            load_cache(file, other)
        with pytest.raises(ConversionError, match=r"layer 0 .* filled by another converted model.*empty cache"):
            other(IDS[:, :1], past_key_values=filled)

    def test_other_heads_where_no_tensor_says_so(self) -> None:
        # Maps without features own no tensor, so that nothing but the configuration tells them apart.
        config = replace(DARK, method="local", keep_exact=("0.0", "1.0", "2.0", "3.0"))
        with torch.no_grad():
            cache = copy.deepcopy(self._filled(mixed(config)))
        other = mixed(replace(config, keep_exact=("0.1", "1.1", "2.1", "3.1")))
        with pytest.raises(ConversionError, match="filled by another converted model"):
            other(IDS[:, :1], past_key_values=cache)

    def test_no_single_state_does(self, model: PreTrainedModel) -> None:
        with pytest.raises(ConversionError, match="layer 0 has exact heads or heads of several kinds"):
            cache_of(model, {}, 3)

    @torch.no_grad()
    @pytest.mark.parametrize("pads", [0, 5])
    def test_a_softmax_models_keys(self, pads: int) -> None:
        model, mask = softmax_model(1), left_mask([0, pads], LENGTH)  # keys of one layer do not depend on attention
        cache = model(IDS[:, :15], attention_mask=mask[:, :15], use_cache=True).past_key_values
        disturb(convert(model, replace(DARK, keep_exact=("0.0", "0.2"), no_features=("0.1",))))
        parts = [
            model(IDS[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in ((15, 18), (18, 24))
        ]
        wanted = model(IDS, attention_mask=mask, use_cache=False).logits[:, 15:]
        assert relative_error(torch.cat(parts, dim=1), wanted) <= STREAM
        assert cache.layers[0].inherited is None and cache.layers[0].exact_layers[0].keys.shape == (2, 2, 24, 8)

    def test_two_threads(self, model: PreTrainedModel, greedy: Tensor) -> None:
        found: dict[int, Tensor] = {}
        other = mixed()  # heads without features share one map between models

        def run(i: int) -> None:
            found[i] = (model, other)[i % 2].generate(IDS, attention_mask=MASK, **GREEDY)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and all(torch.equal(x, greedy) for x in found.values())


class TestTraining:
    def test_gradients_are_those_of_the_heads_alone(self) -> None:
        model = mixed().train()
        with attentions() as seen:
            model(IDS, use_cache=False)
        for module, *given, _ in seen[:3]:
            q, k, v = (x.detach().requires_grad_() for x in given)
            offsets = [p for p in module.dark.parameters()]
            output = ALL_ATTENTION_FUNCTIONS["darkformer"](module, q, k, v, None, scaling=8**-0.5)[0].transpose(1, 2)
            weight = torch.randn_like(output)
            found = torch.autograd.grad((output * weight).sum(), (q, k, v, *offsets))
            pieces = []
            for part in parts_of(layer_of(module), module.dark):
                rows, heads = part.query_heads, list(part.heads)
                if part.feature_map is None:
                    own = (q[:, rows], k[:, heads].repeat_interleave(2, 1), v[:, heads].repeat_interleave(2, 1))
                    output = F.scaled_dot_product_attention(*own, is_causal=True)
                else:
                    fm = part.feature_map
                    output = attention(
                        q[:, rows], k[:, heads], v[:, heads], fm, scaling=8**-0.5, backend="reference"
                    )  # fmt: skip
                pieces.append((output * weight[:, rows]).sum())
            wanted = torch.autograd.grad(sum(pieces), (q, k, v, *offsets))
            for a, b in zip(found, wanted, strict=True):
                assert b.abs().max() > 0 and relative_error(a, b) <= 10 * STREAM

    def test_finite_differences(self) -> None:
        # Along one direction of all parameters of a model in float64, but for its norms and its loss.
        model = mixed().double()
        ids = tokens(1, 14)
        parameters = [p for p in model.parameters() if p.requires_grad]
        direction = [torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
                     for i, p in enumerate(parameters)]  # fmt: skip
        loss = model(ids, labels=ids, use_cache=False).loss
        gradients = torch.autograd.grad(loss, parameters)
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))

        @torch.no_grad()
        def moved(step: float) -> float:
            for p, d in zip(parameters, direction, strict=True):
                p.add_(step * d)
            value = model(ids, labels=ids, use_cache=False).loss.item()
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(step * d)
            return value

        step = 1e-4
        assert abs((moved(step) - moved(-step)) / (2 * step) - slope) <= 2e-3 * abs(slope)

    def test_gradient_checkpointing(self) -> None:
        def gradients(checkpoints: bool) -> dict[str, Tensor]:
            model = mixed().train()
            if checkpoints:
                model.gradient_checkpointing_enable()
            model(IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss.backward()
            return {name: p.grad for name, p in model.named_parameters()}

        plain, checked = gradients(False), gradients(True)
        assert all(g is not None and g.abs().max() > 0 for g in plain.values())
        assert all(relative_error(checked[name], plain[name], 1e-6) <= STREAM for name in plain)

    def test_a_cache_keeps_no_graph(self, model: PreTrainedModel) -> None:
        cache = model(IDS, use_cache=True).past_key_values
        out = model(IDS, past_key_values=cache)
        assert out.logits.requires_grad
        assert not any(x.requires_grad for layer in cache.layers[:3] for x in _tensors(vars(layer)))

    @pytest.mark.parametrize("geometry", [False, True])
    def test_lora(self, geometry: bool, tmp_path: Path) -> None:
        more: dict[str, Any] = {"modules_to_save": ["dark"]} if geometry else {}
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more)
        tuned = peft.get_peft_model(mixed(), lora)
        assert torch.equal(logits(tuned, IDS, MASK), logits(mixed(), IDS, MASK))
        step = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):  # LoRA's second matrix is zero at first
            step.zero_grad()
            tuned(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
            assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
            step.step()
        trained = logits(tuned.eval(), IDS, MASK)
        assert relative_error(trained, logits(mixed(), IDS, MASK)) > 1e-3
        assert relative_error(streamed(tuned, IDS, MASK, [9, 10])[REAL], trained[REAL]) <= STREAM
        tuned.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(mixed(), tmp_path).eval()
        assert torch.equal(logits(loaded, IDS, MASK), trained)
        merged = loaded.merge_and_unload()
        assert relative_error(logits(merged, IDS, MASK)[REAL], trained[REAL]) <= 1e-4
        drop_features(merged, [(0, 1)])

    def test_prefix_tuning(self) -> None:
        prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        tuned = peft.get_peft_model(mixed(), prefix)
        tuned(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        (embedding,) = [p for p in tuned.parameters() if p.requires_grad]
        by_head = embedding.grad.view(5, 4, 2, 4, 8).abs().amax((0, 2, 4))  # layers, key/value heads
        assert by_head.min() > 0 and by_head.isfinite().all()
        assert tuned.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=3).shape == (2, LENGTH + 3)


class TestFiles:
    #: Those that differ between layers most: what one layer says must not be taken for the model.
    CONFIGS = (MIXED, replace(MIXED, keep_exact=(0, "1.1")), replace(MIXED, keep_exact=(), no_features=(0, "1.1")))

    @pytest.mark.parametrize("config", CONFIGS)
    def test_light_and_full(self, config: DarkConfig, tmp_path: Path) -> None:
        model = mixed(config)
        save_light(model, tmp_path / "light")
        model.save_pretrained(tmp_path / "full")
        wanted = logits(model, IDS, MASK)
        light = load_light(softmax_model(), tmp_path / "light")
        full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
        for loaded in (light, full):
            assert torch.equal(logits(loaded, IDS, MASK), wanted)
            assert [layer_of(m) for m in converted_modules(loaded)] == [layer_of(m) for m in converted_modules(model)]
        assert torch.equal(logits(revert(light), IDS, MASK), logits(softmax_model(), IDS, MASK))

    def test_files_without_offsets(self, model: PreTrainedModel) -> None:
        # As version 0.1.0 wrote them.
        values = {f"{name}.{own}": x for name, fm in model.named_modules() if isinstance(fm, FeatureMap)
                  for own, x in fm.values().items()}  # fmt: skip
        older = {n: x for n, x in model.state_dict().items() if not n.endswith("_offset")} | values
        other = convert(softmax_model(), MIXED)
        assert not other.load_state_dict(older).missing_keys
        assert relative_error(logits(other, IDS, MASK), logits(model, IDS, MASK)) <= 1e-6

    def test_offloaded(self, model: PreTrainedModel, whole: Tensor, tmp_path: Path) -> None:
        assert torch.equal(logits(cpu_offload(mixed(), "cpu"), IDS, MASK), whole)
        fresh = logits(convert(softmax_model(), MIXED), IDS, MASK)
        assert torch.equal(logits(convert(cpu_offload(softmax_model(), "cpu"), MIXED), IDS, MASK), fresh)
        model.save_pretrained(tmp_path / "model")
        devices = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
        devices |= {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(4)}
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=devices, offload_folder=tmp_path / "off"
        )  # fmt: skip
        assert torch.equal(logits(loaded, IDS, MASK), whole)

    def test_built_on_the_meta_device(self, model: PreTrainedModel, whole: Tensor) -> None:
        with torch.device("meta"):
            empty = type(model)(model.config)
        assert [fm.heads for fm in dark_layers(empty)] == [fm.heads for fm in dark_layers(model)]
        other = empty.to_empty(device="cpu").eval()
        other.load_state_dict(model.state_dict())
        other.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
        assert torch.equal(logits(other, IDS, MASK), whole)


class TestDropping:
    def test_the_other_heads_stay(self, tmp_path: Path) -> None:
        model, twin = mixed(), mixed()
        filled = model(IDS[:, :9], use_cache=True).past_key_values
        drop_features(model, [(0, 3), (1, 1), (1, 2)])
        maps, before = list(dark_layers(model)), list(dark_layers(twin))
        assert maps[0].heads == (1,) and maps[1].config.method == "local" and maps[1].heads == (1, 2)
        for name, value in maps[0].values().items():
            assert torch.equal(value, before[0].values()[name][:1])
        with attentions() as after, attentions() as originals:
            logits(model, IDS), logits(twin, IDS)
        first, second = after[0][4], originals[4][4]
        assert [torch.equal(first[:, h], second[:, h]) for h in range(8)] == [True] * 6 + [False] * 2
        assert relative_error(streamed(model, IDS, MASK, [9, 10])[REAL], logits(model, IDS, MASK)[REAL]) <= STREAM
        with pytest.raises(ConversionError, match=r"layer 0 .* filled before its feature map changed.*empty cache"):
            model(IDS[:, 9:], past_key_values=filled)
        save_light(model, tmp_path)
        assert torch.equal(logits(load_light(softmax_model(), tmp_path), IDS), logits(model, IDS))
        assert all(p.requires_grad for p in maps[0].parameters())

    def test_a_cache_of_a_loaded_model(self, tmp_path: Path) -> None:
        # Whose tensors have been written as often as those of the new map.
        save_light(mixed(), tmp_path)
        model = load_light(softmax_model(), tmp_path)
        with torch.no_grad():
            filled = model(IDS[:, :9], use_cache=True).past_key_values
        drop_features(model, [(1, 1)])
        with pytest.raises(ConversionError, match="filled before its feature map changed"):
            model(IDS[:, 9:], past_key_values=filled)

    @pytest.mark.parametrize(
        ("head", "error", "message"),
        [
            ((9, 0), ConversionError, "no_features names layer 9, .*choose from 0-3"),
            ((1, 7), ConfigError, r"names key/value head 1\.7, and layer 1 has 4 of them, 1\.0 to 1\.3"),
            ((-1, 0), ConfigError, r"no_features='-1\.0'"),
        ],
    )
    def test_a_head_that_is_not_there(self, head: tuple[int, int], error: type[Exception], message: str) -> None:
        model = mixed()
        settings, wanted = model.config.to_dict(), logits(model, IDS)
        with pytest.raises(error, match=message):
            drop_features(model, [(0, 1), head])
        assert model.config.to_dict() == settings and torch.equal(logits(model, IDS), wanted)

    def test_a_softmax_model_and_an_adapter(self) -> None:
        with pytest.raises(ConversionError, match=r"no converted layer.*convert it first"):
            drop_features(softmax_model(), [(0, 1)])
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["dark"])
        with pytest.raises(ConversionError, match="before an adapter of peft takes over"):
            drop_features(peft.get_peft_model(mixed(), lora), [(0, 1)])


SMALL = dict(vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
             num_key_value_heads=4, initializer_range=0.15, pad_token_id=0, bos_token_id=1,
             eos_token_id=None)  # fmt: skip


class TestOtherModels:
    @pytest.fixture(params=["differential", "mixer"])
    def other(self, request: pytest.FixtureRequest) -> PreTrainedModel:
        config: Any = tf.DiffLlamaConfig(**SMALL)
        if request.param == "mixer":
            config = tf.FalconH1Config(**SMALL, head_dim=12, mamba_d_state=8, mamba_n_heads=8, mamba_d_head=12,
                                       mamba_d_ssm=96, mamba_n_groups=1, mamba_chunk_size=8)  # fmt: skip
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config).eval()
        return disturb(convert(made, replace(DARK, keep_exact=("0.1", "1.0", "1.3"), no_features=("0.2",))))

    @torch.no_grad()
    def test_streams(self, other: PreTrainedModel) -> None:
        wanted = logits(other, IDS)
        for cuts in ([9], [1, 2, 3], list(range(1, LENGTH))):
            assert relative_error(streamed(other, IDS, torch.ones_like(IDS), cuts), wanted) <= STREAM
        cache = other(IDS[:, :15], use_cache=True).past_key_values
        calls = 2 if isinstance(other, tf.DiffLlamaForCausalLM) else 1
        assert [len(layer.exact_layers) for layer in cache.layers] == [calls, calls]
        cache.reorder_cache(torch.tensor([1, 1]))
        found = other(IDS[[1, 1], 15:], past_key_values=cache).logits
        assert relative_error(found, wanted[[1, 1], 15:]) <= STREAM
        options: dict[str, Any] = dict(GREEDY, num_beams=2)
        assert torch.equal(other.generate(IDS, **options), other.generate(IDS, **options, use_cache=False))

    @torch.no_grad()
    def test_tokens_are_taken_back_twice(self) -> None:
        torch.manual_seed(0)
        model = tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**SMALL)).eval()
        disturb(convert(model, replace(DARK, keep_exact=("0.1", "1.0", "1.3"), no_features=("0.2",))))
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        model(IDS, past_key_values=cache)
        cache.crop(-6)
        assert relative_error(model(IDS[:, 18:], past_key_values=cache).logits, logits(model, IDS)[:, 18:]) <= STREAM

    @torch.no_grad()
    def test_keys_before_differential_attention_splits_them(self) -> None:
        model = tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**SMALL)).eval()
        cache = model(IDS[:, :9], use_cache=True).past_key_values
        convert(model, DARK)
        with pytest.raises(ConversionError, match=r"layer 0 .*differential attention splits.*empty cache"):
            model(IDS[:, 9:], past_key_values=cache)

    def test_capped_logits(self) -> None:
        model = linear("gemma2-mixed")
        wanted = logits(model, IDS, MASK)
        assert relative_error(streamed(model, IDS, MASK, [9, 10, 20])[REAL], wanted[REAL]) <= STREAM
        found = model.generate(IDS, cache_implementation="static", **GREEDY)
        assert torch.equal(found, model.generate(IDS, **GREEDY))


@torch.no_grad()
def test_export() -> None:
    model = disturb(convert(softmax_model(1), replace(DARK, keep_exact=("0.2",), no_features=("0.0",))))
    example = tokens(2, LENGTH, seed=4), torch.ones_like(IDS)
    program = torch.export.export(Whole(model), example, strict=False).module()
    assert relative_error(program(IDS, MASK)[REAL], logits(model, IDS, MASK)[REAL]) <= STREAM


def test_windows_by_layer(model: PreTrainedModel) -> None:
    wide = replace(DARK, layer_windows=((0, 2), (1, 30), (3, 9)))
    found = mixed(wide)
    assert [fm.config.window for fm in dark_layers(found)] == [2, 30, 4, 9]
    assert relative_error(streamed(found, IDS, MASK, [3, 11, 12, 13])[REAL], logits(found, IDS, MASK)[REAL]) <= STREAM
    every = mixed(replace(DARK, window=30))  # longer than the sequence: softmax
    assert relative_error(logits(every, IDS), logits(softmax_model(), IDS)) <= 1e-4
    with torch.no_grad():
        cache = found(IDS, use_cache=True).past_key_values
    assert [layer.state.recent_key.shape[2] for layer in cache.layers] == [2, 30, 4, 9]


class TestBadInput:
    @pytest.mark.parametrize(
        ("fields", "error", "message"),
        [
            ({"keep_exact": ("1.5",)}, ConfigError, r"head 1\.5, and layer 1 has 4 of them, 1\.0 to 1\.3"),
            ({"keep_exact": (9,)}, ConversionError, "names layer 9, .*choose from 0-3"),
            ({"no_features": ("9.0",)}, ConversionError, "no_features names layer 9, .*choose from 0-3"),
            ({"layer_windows": ((9, 4),)}, ConversionError, "layer_windows names layer 9"),
            ({"keep_exact": (1.5,)}, ConfigError, r"keep_exact=1\.5: .*In quotes"),
            ({"keep_exact": "18.2"}, ConfigError, r"keep_exact='18\.2': give a list"),
            ({"keep_exact": 6}, ConfigError, "keep_exact=6: give a list"),
            ({"no_features": None}, ConfigError, "no_features=None: give a list"),
            ({"keep_exact": ("-1",)}, ConfigError, "keep_exact='-1': name a layer"),
            ({"keep_exact": (True,)}, ConfigError, "keep_exact=True: name a layer"),
            ({"layer_windows": "3=4"}, ConfigError, "layer_windows='3=4': give a list of pairs"),
            ({"layer_windows": (3, 4)}, ConfigError, "layer_windows=3: give LAYER=WINDOW"),
            ({"layer_windows": ((1, -1),)}, ConfigError, "window of layer 1=-1"),
            ({"layer_windows": ((1, 4), (1, 5))}, ConfigError, "gives layer 1 two windows, 4 and 5"),
            ({"layer_windows": ((1, 0),), "no_features": ("1.0",)}, ConfigError, "layer 1 has window=0"),
        ],
    )
    def test_one_clear_error(self, fields: dict[str, Any], error: type[Exception], message: str) -> None:
        model = softmax_model()
        with pytest.raises(error, match=message):
            convert(model, replace(DARK, **fields))
        assert not converted_modules(model) and "darkformer" not in model.config.to_dict()

    def test_sliding_layers(self) -> None:
        with pytest.raises(ConversionError, match=r"names layer 0, .*attend within a window already.*choose from 2"):
            convert(tiny("gemma3"), replace(DARK, keep_exact=("0.0",)))
        with pytest.raises(ConversionError, match="layer 0, whose softmax is limited to a window"):
            converted(tiny("gemma3"), replace(DARK, keep_exact=("0.0",), convert_sliding=True))

    def test_softmax_over_a_mixed_cache(self, model: PreTrainedModel) -> None:
        with torch.no_grad():
            cache = model(IDS, use_cache=True).past_key_values
        assert isinstance(cache.layers[0], DarkCacheLayer)
        with pytest.raises(ConversionError, match=r"state of a converted model \(24 tokens\)"):
            softmax_model()(IDS[:, :1], past_key_values=cache)
