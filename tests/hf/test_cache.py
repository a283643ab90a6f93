"""Taking tokens back, caches of other models, caches in files, and a size that ten thousand tokens do not change."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tolerances import STREAM, relative_error
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from darkformer import (
    ConfigError,
    ConversionError,
    DarkConfig,
    InputError,
    convert,
    cost,
    dark_layers,
    load_cache,
    save_cache,
)
from darkformer.hf import saved_cache
from darkformer.hf import stream as stream_module
from darkformer.hf.cache import DarkCacheLayer, cache_bytes
from darkformer.hf.sealed import write_sealed
from hf.families import DARK, PAPER, left_mask, linear, logits, positions, tiny, tokens

LENGTH = 24


@torch.no_grad()
def _feed(model: PreTrainedModel, ids: Tensor, mask: Tensor, start: int, stop: int, cache: object) -> Tensor:
    place = positions(mask)[:, start:stop]
    return model(
        ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=place, past_key_values=cache, use_cache=True
    ).logits


def _recording(model: PreTrainedModel, ids: Tensor, mask: Tensor, cuts: list[int]) -> DynamicCache:
    """A cache that records, filled piece by piece up to the last cut."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for start, stop in zip([0, *cuts], cuts, strict=False):
        _feed(model, ids, mask, start, stop, cache)
    return cache


class TestCrop:
    """Any number of recorded tokens can be taken back, and what follows is as if they had never come."""

    @pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
    @pytest.mark.parametrize("config", [None, PAPER], ids=["default", "paper"])
    def test_every_number_of_tokens(self, family: str, config: DarkConfig | None) -> None:
        model, ids, mask = linear(family, config), tokens(2, LENGTH), left_mask([0, 5], LENGTH)
        other = torch.cat([ids[:, :9], tokens(2, LENGTH - 9, seed=1)], dim=1)
        errors = {}
        for remove in range(1, 10):  # other tokens come in place of those taken back
            cache = _recording(model, other, mask, [9, 12, 13, 14, 18])
            ids_now = torch.cat([other[:, : 18 - remove], ids[:, 18 - remove :]], dim=1)
            cache.crop(-remove)
            assert cache.get_seq_length() == 18 - remove
            rest = _feed(model, ids_now, mask, 18 - remove, LENGTH, cache)
            errors[remove] = relative_error(rest, logits(model, ids_now, mask)[:, 18 - remove :])
        assert max(errors.values()) <= STREAM, errors

    def test_back_to_nothing(self) -> None:
        model, ids, mask = linear("llama"), tokens(2, LENGTH), left_mask([0, 5], LENGTH)
        cache = _recording(model, tokens(2, LENGTH, seed=1), mask, [7, 9])
        cache.crop(-9)
        assert cache.get_seq_length() == 0
        found, wanted = _feed(model, ids, mask, 0, LENGTH, cache), logits(model, ids, mask)
        assert relative_error(found[mask.bool()], wanted[mask.bool()]) <= STREAM

    def test_again_and_again(self) -> None:
        model, ids, mask = linear("llama"), tokens(1, LENGTH), left_mask([0], LENGTH)
        cache, at = _recording(model, ids, mask, [6]), 6
        while at < LENGTH:  # three forward, one back
            stop = min(at + 3, LENGTH)
            out = _feed(model, ids, mask, at, stop, cache)
            if stop == LENGTH:
                break
            cache.crop(-1)
            at = stop - 1
        assert relative_error(out, logits(model, ids)[:, at:]) <= STREAM

    def test_a_running_maximum_that_falls_back(self) -> None:
        # A key far larger than all others raises every feature's stabiliser by hundreds of nats: what the sums held
        # before is 0 in them, and no subtraction would bring it back.
        model, ids, mask = linear("llama", PAPER), tokens(1, LENGTH), left_mask([0], LENGTH)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.input_layernorm.weight.mul_(6)
        cache = _recording(model, ids, mask, [10, 20])
        before = [layer.state.log_scale.clone() for layer in cache.layers]
        cache.crop(-10)
        assert any((b - layer.state.log_scale).max() > 30 for b, layer in zip(before, cache.layers, strict=True))
        rest = _feed(model, ids, mask, 10, LENGTH, cache)
        assert relative_error(rest, logits(model, ids)[:, 10:]) <= 1e-4  # logits of that size round more

    def test_a_long_prompt_keeps_its_end_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "CROP", 5)
        model, ids, mask = linear("llama"), tokens(2, LENGTH), left_mask([0, 5], LENGTH)
        cache = _recording(model, ids, mask, [16])
        assert [layer.streams[0].history.length for layer in cache.layers] == [5, 5, 5]
        cache.crop(-5)
        assert relative_error(_feed(model, ids, mask, 11, LENGTH, cache), logits(model, ids, mask)[:, 11:]) <= STREAM

    def test_single_steps_keep_a_bounded_history(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_module, "CROP", 4)
        model, ids, mask = linear("llama"), tokens(1, LENGTH), left_mask([0], LENGTH)
        cache = _recording(model, ids, mask, list(range(1, 21)))
        assert all(4 <= layer.streams[0].history.length < 8 for layer in cache.layers)
        cache.crop(-4)
        assert relative_error(_feed(model, ids, mask, 16, LENGTH, cache), logits(model, ids)[:, 16:]) <= STREAM

    def test_rows_move_with_their_history(self) -> None:
        model, ids, mask = linear("llama"), tokens(3, LENGTH), left_mask([0, 5, 2], LENGTH)
        cache = _recording(model, ids, mask, [12, 18])
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.crop(-4)
        rows = [2, 0, 0]
        rest = _feed(model, ids[rows], mask[rows], 14, LENGTH, cache)
        assert relative_error(rest, logits(model, ids, mask)[rows, 14:]) <= STREAM

    def test_more_than_was_recorded(self) -> None:
        model, ids, mask = linear("llama"), tokens(1, LENGTH), left_mask([0], LENGTH)
        cache = _recording(model, ids, mask, [8])
        assert cache.is_croppable
        with pytest.raises(ConversionError, match=r"crop\(-9\).*8 tokens here"):
            cache.crop(-9)
        cache.crop(0)
        with pytest.raises(ConversionError, match=r"crop\(-1\).*0 tokens here"):
            cache.crop(-1)
        with pytest.raises(ConversionError, match=r"crop\(3\): give the number of tokens to take back, negative"):
            cache.crop(3)

    def test_without_recording(self) -> None:
        cache = linear("llama")(tokens(1, 20), use_cache=True).past_key_values
        cache.crop(0)
        assert not cache.is_croppable
        with pytest.raises(ConversionError, match=r"crop\(-3\).*activate_past_recording\(\) before"):
            cache.crop(-3)


class TestWhose:
    """A state means something under the features it was made with, and under no others."""

    @staticmethod
    def _filled(model: PreTrainedModel) -> DynamicCache:
        with torch.no_grad():
            return model(tokens(1, 12), use_cache=True).past_key_values

    def test_another_model(self) -> None:
        cache = self._filled(linear("llama"))
        with pytest.raises(ConversionError, match="layer 0 of past_key_values was filled by another converted model"):
            linear("llama")(tokens(1, 1), past_key_values=cache)

    @pytest.mark.parametrize("new", [1, 3])
    @pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "gemma3"])
    def test_a_softmax_model(self, family: str, new: int) -> None:
        # One token at a time nothing else would notice: softmax over the new key alone is a number too.
        with torch.no_grad():
            cache = linear(family)(tokens(1, 12), use_cache=True).past_key_values
        for softmax in (tiny(family), convert(tiny(family), DarkConfig(method="exact"))):
            with pytest.raises(ConversionError, match=r"state of a converted model \(12 tokens\).*empty cache"):
                softmax(tokens(1, new), past_key_values=copy.deepcopy(cache), use_cache=True)

    def test_a_softmax_model_with_a_loaded_cache(self, tmp_path: Path) -> None:
        model = linear("llama")
        file = save_cache(self._filled(model), model, tmp_path / "prompt.safetensors")
        with pytest.raises(ConversionError, match="softmax attention needs their keys"):
            tiny("llama")(tokens(1, 1), past_key_values=load_cache(file, model))

    def test_a_mask_that_hides_what_was_read(self) -> None:
        # Softmax has the keys and can leave some out at any time; sums cannot.
        model, ids = linear("llama"), tokens(2, 20)
        with torch.no_grad():
            cache = model(ids[:, :15], attention_mask=left_mask([0, 4], 15), use_cache=True).past_key_values
        hidden = left_mask([0, 4], 20)
        hidden[1, 6:9] = 0
        for new in (1, 5):
            options = dict(past_key_values=copy.deepcopy(cache), position_ids=torch.arange(15, 15 + new)[None])
            with pytest.raises(ConversionError, match=r"shows 8 tokens of row 1 .* read 11.*cannot be hidden later"):
                model(ids[:, 15 : 15 + new], attention_mask=hidden[:, : 15 + new], **options)
        model(ids[:, 15:], attention_mask=left_mask([0, 4], 20), past_key_values=cache)

    def test_a_batch_of_another_size(self) -> None:
        model = linear("llama")
        with pytest.raises(InputError, match="the state belongs to another batch"):
            model(tokens(2, 1), past_key_values=self._filled(model))

    def test_other_draws(self) -> None:
        model = linear("llama")
        cache = self._filled(model)
        with torch.no_grad():
            for layer in dark_layers(model):
                layer.projection.copy_(layer.projection.flip(1))
        with pytest.raises(ConversionError, match="filled before its feature map changed"):
            model(tokens(1, 1), past_key_values=cache)

    def test_a_copy_of_the_cache_is_as_good(self) -> None:
        # How transformers' guide reuses one prompt several times.
        model, given = linear("llama"), tokens(1, 12)
        cache = self._filled(model)
        for seed in (1, 2):
            more = torch.cat([given, tokens(1, 8, seed=seed)], dim=1)
            with torch.no_grad():
                rest = model(more[:, 12:], past_key_values=copy.deepcopy(cache), use_cache=True).logits
            assert relative_error(rest, logits(model, more)[:, 12:]) <= STREAM
        assert cache.get_seq_length() == 12


class TestFiles:
    """`save_cache` and `load_cache`."""

    @pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "mistral-sliding", "gpt2", "gpt-neox"])
    def test_goes_on_to_the_same_bits(self, family: str, tmp_path: Path) -> None:
        model, ids, mask = linear(family), tokens(2, LENGTH), left_mask([0, 5], LENGTH)
        cache = DynamicCache(config=model.config)
        _feed(model, ids, mask, 0, 15, cache)
        file = save_cache(cache, model, tmp_path / "prompt.safetensors")
        wanted = _feed(model, ids, mask, 15, LENGTH, cache)
        model.save_pretrained(tmp_path / "model")
        again = type(model).from_pretrained(tmp_path / "model")  # another process would start from here
        loaded = load_cache(file, again)
        assert loaded.get_seq_length() == 15
        assert torch.equal(_feed(again, ids, mask, 15, LENGTH, loaded), wanted)

    def test_generation_goes_on(self, tmp_path: Path) -> None:
        model, ids = linear("llama"), tokens(1, 12)
        options = dict(do_sample=False, max_new_tokens=8)
        whole = model.generate(ids, **options)
        with torch.no_grad():
            cache = model(ids[:, :-1], use_cache=True).past_key_values
        file = save_cache(cache, model, tmp_path / "prompt.safetensors")
        assert torch.equal(model.generate(ids, past_key_values=load_cache(file, model), **options), whole)

    @staticmethod
    def _saved(folder: Path, model: PreTrainedModel | None = None) -> Path:
        model = model or linear("llama")
        cache = model(tokens(1, 12), use_cache=True).past_key_values
        return save_cache(cache, model, folder / "prompt.safetensors")

    def test_another_models(self, tmp_path: Path) -> None:
        file = self._saved(tmp_path)
        other = linear("llama")
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        with pytest.raises(InputError, match=r"another model \(its weights are others, or the same in another dtype\)"):
            load_cache(file, other)

    def test_other_draws(self, tmp_path: Path) -> None:
        file = self._saved(tmp_path)
        other = linear("llama")
        with torch.no_grad():
            next(dark_layers(other)).projection.mul_(1.01)
        with pytest.raises(InputError, match=r"another model \(its draws or what calibration"):
            load_cache(file, other)

    def test_another_configuration(self, tmp_path: Path) -> None:
        file = self._saved(tmp_path)
        with pytest.raises(
            InputError, match=r"another model \(its configuration is another one, window: 4 there, 5 here\)"
        ):
            load_cache(file, linear("llama", DarkConfig(num_features=16, window=5, sinks=2)))

    def test_a_softmax_model(self, tmp_path: Path) -> None:
        file = self._saved(tmp_path)
        with pytest.raises(ConversionError, match="is not converted"):
            load_cache(file, tiny("llama"))
        with pytest.raises(ConversionError, match="layer 0 of the cache holds no state"):
            save_cache(DynamicCache(), linear("llama"), file)

    def test_saving_what_another_filled(self, tmp_path: Path) -> None:
        cache = linear("llama")(tokens(1, 12), use_cache=True).past_key_values
        with pytest.raises(ConversionError, match="filled by another converted model"):
            save_cache(cache, linear("llama"), tmp_path / "prompt.safetensors")
        assert list(tmp_path.iterdir()) == []

    def test_damage(self, tmp_path: Path) -> None:
        model = linear("llama")
        file = self._saved(tmp_path, model)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match="cannot be read"):
            load_cache(file, model)
        flipped = bytearray(whole)
        flipped[-100] ^= 1
        file.write_bytes(bytes(flipped))
        with pytest.raises(InputError, match="its checksum does not fit"):
            load_cache(file, model)
        with pytest.raises(InputError, match="no such file"):
            load_cache(tmp_path / "nothing", model)
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(InputError, match="holds no cache"):
            load_cache(tmp_path / "other.safetensors", model)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("recent_key", lambda x: x[..., :1]),
            ("recent_value", lambda x: x[:, :, :1]),
            ("feature_values", lambda x: x.half()),
            ("feature_values", lambda x: torch.full_like(x, torch.inf)),
            ("feature_sum", lambda x: x[..., :1]),
            ("feature_sum", lambda x: torch.cat([x, x], dim=-1)),
            ("feature_sum", lambda x: x * torch.nan),
            ("feature_sum", lambda x: x + 100),  # more than 12 keys add
            ("feature_sum", lambda x: -x),
            ("log_scale", lambda x: x[..., :0]),
            ("log_scale", lambda x: x.long()),
            ("sink_key", lambda x: x[:0]),
            ("sink_key", lambda x: x.double()),
            ("sink_value", lambda x: x[..., :0]),
            ("count", lambda x: x - 2**40),
            ("count", lambda x: x + 1),
            ("count", lambda x: x.int()),
            ("count", lambda x: x.repeat(1_000_000)),
            ("stream1.recent_key", lambda x: x.flatten()),
            ("stream1.count", lambda x: x - 1),
            ("keys", lambda x: x[:, :, 1:]),
            ("keys", lambda x: x.repeat(1, 2, 1, 1)),
            ("values", lambda x: x * torch.nan),
            ("values", lambda x: x.to(torch.int32)),
            ("real", lambda x: ~x),
            ("real", lambda x: x.long()),
            ("real", lambda x: x[:, 1:]),
        ],
    )
    def test_tensors_that_no_layer_leaves_behind(
        self, name: str, change: Callable[[Tensor], Tensor], tmp_path: Path
    ) -> None:
        """Whoever writes a file can compute its checksum, and compiled code would read behind the tensors' ends."""
        model, mask = linear("llama-mixed"), left_mask([0, 3], 12)
        cache = DynamicCache(config=model.config)
        _feed(model, tokens(2, 12), mask, 0, 12, cache)
        header, tensors = saved_cache._read(save_cache(cache, model, tmp_path / "prompt.safetensors"))
        key = next(key for key in sorted(tensors) if key.endswith(f".{name}"))
        write_sealed(tmp_path / "crafted", "darkformer_cache", header, tensors | {key: change(tensors[key])})
        with pytest.raises(InputError, match=rf"crafted: layer {key.split('.')[1]} is not one that save_cache wrote"):
            load_cache(tmp_path / "crafted", model)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"seen": -1}, "seen = -1"),
            ({"seen": 2**60}, "seen = "),
            ({"seen": True}, "seen = True"),
            ({"seen": 0}, "belong to no layer of its kind"),
            ({"seen": 11}, "not those of 11 tokens"),
            ({"streams": 2}, "it needs 1 states"),
            ({"exact": 1}, "and 0 sets of exact heads"),
            ({"kind": "softmax"}, "its kind is 'softmax'"),
            ({"kind": []}, r"its kind is \[\]"),
        ],
    )
    def test_headers_that_no_layer_leaves_behind(self, change: dict[str, object], match: str, tmp_path: Path) -> None:
        model = linear("llama")
        file = self._saved(tmp_path, model)
        header, tensors = saved_cache._read(file)
        header["layers"][1] |= change
        write_sealed(file, "darkformer_cache", header, tensors)
        with pytest.raises(InputError, match=rf"layer 1 is not.*{match}"):
            load_cache(file, model)

    def test_layers_that_have_read_different_numbers_of_tokens(self, tmp_path: Path) -> None:
        model = linear("llama")
        files = [
            save_cache(model(tokens(1, n), use_cache=True).past_key_values, model, tmp_path / f"{n}") for n in (9, 12)
        ]
        (header, short), (_, long) = map(saved_cache._read, files)
        mixed = {name: (short if name.startswith("layers.1.") else long)[name] for name in long}
        for seen in (9, 12):
            header["layers"] = [{**x, "seen": seen if i == 1 else 12} for i, x in enumerate(header["layers"])]
            write_sealed(tmp_path / "mixed", "darkformer_cache", header, mixed)
            with pytest.raises(InputError, match=r"mixed: its layers have read different numbers of tokens"):
                load_cache(tmp_path / "mixed", model)

    def test_what_is_missing_or_too_much(self, tmp_path: Path) -> None:
        model = linear("llama")
        file = self._saved(tmp_path, model)
        header, tensors = saved_cache._read(file)
        more, less = {**tensors, "layers.1.extra": torch.zeros(1)}, {**tensors}
        del less["layers.2.sink_key"]
        fewer, layers = header | {"layers": header["layers"][:2]}, header["layers"]
        for other, content, match in (
            (header, more, r"layer 1 .*extra belong to no layer"),
            (header, less, r"layer 2 .*sink_key is missing"),
            (header, tensors | {"layers.01.count": torch.zeros(1)}, r"layers\.01\.count belong to no layer"),
            (fewer, tensors, "holds 2 layers, the model's cache has 3"),
            (header | {"layers": [*layers, *layers]}, tensors, "holds 6 layers"),
            (header | {"layers": [1, 2, 3]}, tensors, "layer 0 .*seen = None"),
            (header | {"layers": 3}, tensors, "its header lacks layers"),
            ({k: v for k, v in header.items() if k != "weights"}, tensors, "its header lacks weights"),
        ):
            write_sealed(file, "darkformer_cache", other, content)
            with pytest.raises(InputError, match=match):
                load_cache(file, model)

    def test_every_tensor_in_another_type(self, tmp_path: Path) -> None:
        """Half precision is what autocast leaves in a model of float32; float64 is nothing that such a model leaves."""
        model, mask = linear("gpt2"), left_mask([0, 3], 12)
        cache = DynamicCache(config=model.config)
        with torch.autocast("cpu", torch.bfloat16):
            _feed(model, tokens(2, 12), mask, 0, 12, cache)
        file = save_cache(cache, model, tmp_path / "prompt.safetensors")
        assert load_cache(file, model).get_seq_length() == 12
        header, tensors = saved_cache._read(file)
        assert tensors["layers.0.recent_key"].dtype == torch.bfloat16
        wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        write_sealed(file, "darkformer_cache", header, wide)
        with pytest.raises(InputError, match=r"has dtype torch\.float64"):
            load_cache(file, model)

    @pytest.mark.parametrize(
        "change", [lambda x: x[:, :1], lambda x: torch.cat([x, x], -1), lambda x: x.double(), lambda x: x[..., :0]]
    )
    @torch.no_grad()
    def test_layers_that_keep_softmax(self, change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
        model = linear("llama", DarkConfig(num_features=16, window=4, sinks=2, keep_exact=(1,)))
        file = self._saved(tmp_path, model)
        header, tensors = saved_cache._read(file)
        both = {f"layers.1.{name}": change(tensors[f"layers.1.{name}"]) for name in ("keys", "values")}
        write_sealed(file, "darkformer_cache", header, tensors | both)
        with pytest.raises(InputError, match=r"layer 1 is not.*keys has"):
            load_cache(file, model)

    def test_a_shape_beyond_all_integers(self, tmp_path: Path) -> None:
        content = json.dumps({"x": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}).encode()
        (tmp_path / "crafted").write_bytes(len(content).to_bytes(8, "little") + content)
        with pytest.raises(InputError, match="cannot be read"):
            load_cache(tmp_path / "crafted", linear("llama"))

    def test_keys_of_a_sliding_layer(self, tmp_path: Path) -> None:
        model = linear("gemma3")
        file = self._saved(tmp_path, model)
        header, tensors = saved_cache._read(file)
        of_file = tensors["layers.0.keys"]
        for keys in (of_file[:, :, 1:], of_file[:0], torch.zeros(3), of_file.double()):
            write_sealed(tmp_path / "crafted", "darkformer_cache", header, tensors | {"layers.0.keys": keys})
            with pytest.raises(InputError, match="layer 0 is not"):
                load_cache(tmp_path / "crafted", model)

    @pytest.mark.parametrize("records", [False, True])
    def test_sliding_layers_with_more_keys_than_their_window(self, records: bool, tmp_path: Path) -> None:
        """Caches that record, and those that were made without the model's config, keep all of them."""
        model, ids = linear("gemma3"), tokens(1, LENGTH)
        cache = DynamicCache(config=model.config) if records else DynamicCache()
        if records:
            cache.activate_past_recording()
        mask = left_mask([0], LENGTH)
        _feed(model, ids, mask, 0, 15, cache)
        loaded = load_cache(save_cache(cache, model, tmp_path / "prompt.safetensors"), model)
        wanted = _feed(model, ids, mask, 15, LENGTH, cache)
        assert loaded.get_seq_length() == 15
        torch.testing.assert_close(_feed(model, ids, mask, 15, LENGTH, loaded), wanted)

    def test_a_configuration_of_another_version(self, tmp_path: Path) -> None:
        model = linear("llama")
        file = self._saved(tmp_path, model)
        header, tensors = saved_cache._read(file)
        del header["configuration"]["seed"]  # as if it had come after this file: it has its default
        write_sealed(file, "darkformer_cache", header, tensors)
        assert load_cache(file, model).get_seq_length() == 12
        header["configuration"]["temperature"] = 1.0
        write_sealed(file, "darkformer_cache", header, tensors)
        with pytest.raises(ConfigError, match=r"temperature.*newer darkformer"):
            load_cache(file, model)

    def test_a_file_from_the_future(self, tmp_path: Path) -> None:
        model = linear("llama")
        file = self._saved(tmp_path, model)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = json.loads(metadata["darkformer_cache"]) | {"layout": 3, "version": "9.0"}
        save_file(tensors, file, metadata=metadata | {"darkformer_cache": json.dumps(header)})
        with pytest.raises(ConfigError, match=r"layout 3.*darkformer 9\.0; upgrade"):
            load_cache(file, model)


@torch.no_grad()
def test_ten_thousand_tokens_cost_the_bytes_of_a_hundred() -> None:
    model = linear("llama", DARK)
    ids = tokens(1, 10_000)
    cache = model(ids[:, :100], use_cache=True, logits_to_keep=1).past_key_values
    bytes_before = cache_bytes(cache)
    one = cost.state_bytes(DARK, num_kv_heads=2, head_dim=8)
    assert bytes_before == 3 * one
    model(ids[:, 100:], past_key_values=cache, use_cache=True, logits_to_keep=1)
    assert cache.get_seq_length() == 10_000
    assert cache_bytes(cache) == bytes_before
    assert all(isinstance(layer, DarkCacheLayer) for layer in cache.layers)
