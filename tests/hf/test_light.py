"""The light form: the same bits again on the same base, and one clear error for every way in which it can be wrong."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from darkformer import (
    ConfigError,
    ConversionError,
    DarkConfig,
    InputError,
    NonFiniteError,
    TrainConfig,
    convert,
    dark_layers,
    finetune,
    load_light,
    load_model,
    revert,
    save_light,
)
from darkformer.hf import light
from darkformer.hf import load as loading
from darkformer.hf.added import added_values, own_entries
from darkformer.hf.light import LIGHT_FILE
from darkformer.hf.sealed import write_sealed
from hf.families import DARK, PAPER, disturb, left_mask, linear, logits, tiny, tokens

IDS, MASK = tokens(2, 40), left_mask([0, 11], 40)
CONFIGS = {
    "default": DARK,
    "paper": PAPER,
    "lfk": DarkConfig(method="lfk", num_features=16, window=4, sinks=2),
    "optimal": DarkConfig(num_features=16, window=4, sinks=2, proposal="optimal"),
    "untied": DarkConfig(num_features=16, window=4, sinks=2, tied=False, draw="iid"),
    "local": DarkConfig(method="local", window=4, sinks=2),
}


def _same(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    assert list(loaded.state_dict()) == list(model.state_dict())
    state, expected = ({**own_entries(m), **added_values(m)} for m in (loaded, model))
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(logits(loaded, IDS, MASK), logits(model, IDS, MASK))
    assert loaded.config.darkformer == model.config.darkformer


def _base_bytes(model: PreTrainedModel) -> int:
    return sum(x.nbytes for name, x in model.state_dict().items() if ".dark." not in name)


def _header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as content:
        return dict(content.metadata())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_load_is_bit_equal(family: str, config: DarkConfig, tmp_path: Path) -> None:
    model = linear(family, config)
    save_light(model, tmp_path)
    loaded = load_light(tiny(family), tmp_path)
    _same(loaded, model)
    assert not any(p.any() for layer in dark_layers(loaded) for p in layer.parameters())  # training starts there
    assert not torch.equal(logits(loaded, IDS, MASK), logits(tiny(family), IDS, MASK))


def test_one_safetensors_file_without_the_base(tmp_path: Path) -> None:
    model = linear("llama")
    file = save_light(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LIGHT_FILE]
    # The names and shapes of version 0.1.0: no word of what is start and what was learned.
    tensors = load_file(file)
    parts = {"geometry", "query_center", "key_center", "query_balance", "key_balance", "far_bias", "projection"}
    assert set(tensors) == {f"model.layers.{i}.self_attn.dark.{name}" for i in range(3) for name in parts}
    assert all(x.dtype == torch.float32 and torch.equal(x, added_values(model)[name]) for name, x in tensors.items())
    added = sum(x.nbytes for x in tensors.values())
    assert file.stat().st_size < added + 8_000 < _base_bytes(model)


def test_a_trained_geometry_is_kept(tmp_path: Path) -> None:
    model = linear("llama")
    budget = TrainConfig(train="geometry", steps=2, warmup=0, seq_len=24, batch_size=2, dtype="float32")
    finetune(model, tokens(4, 24), budget, tmp_path / "run")
    save_light(model, tmp_path)
    _same(load_light(tiny("llama"), tmp_path), model)


def test_the_whole_way_round(tmp_path: Path) -> None:
    # light → full → light: the base is still known, and still the one that was converted.
    model = linear("llama")
    save_light(model, tmp_path / "a")
    load_light(tiny("llama"), tmp_path / "a").save_pretrained(tmp_path / "full")
    save_light(AutoModelForCausalLM.from_pretrained(tmp_path / "full"), tmp_path / "b")
    assert _header(tmp_path / "a" / LIGHT_FILE)["checksum"] == _header(tmp_path / "b" / LIGHT_FILE)["checksum"]
    _same(load_light(tiny("llama"), tmp_path / "b"), model)


def test_a_base_saved_in_half_precision_counts_by_its_numbers(tmp_path: Path) -> None:
    half = tiny("llama").to(torch.bfloat16)
    model = disturb(convert(half.float(), DARK))
    save_light(model, tmp_path)
    _same(load_light(tiny("llama").to(torch.bfloat16).float(), tmp_path), model)
    in_half = load_light(tiny("llama").to(torch.bfloat16), tmp_path)
    assert all(torch.equal(x, added_values(model)[name]) for name, x in added_values(in_half).items())
    assert {p.dtype for layer in dark_layers(in_half) for p in layer.parameters()} == {torch.bfloat16}


def test_no_path_of_this_machine_is_saved(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "my-base")
    file = save_light(convert(load_model(str(tmp_path / "my-base")), DARK), tmp_path / "light")
    assert json.loads(_header(file)["darkformer"])["base"]["name"] == "my-base"
    assert str(tmp_path).encode() not in file.read_bytes()


def test_revert_forgets_the_base(tmp_path: Path) -> None:
    model = revert(linear("llama"))
    assert not hasattr(model.config, "darkformer_base")
    model.save_pretrained(tmp_path)
    assert "darkformer" not in (tmp_path / "config.json").read_text("utf-8")


class TestSavingIsRefused:
    def test_after_the_weights_have_changed(self, tmp_path: Path) -> None:
        model = linear("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
        with pytest.raises(ConversionError, match=r"no longer those of .*save_pretrained.*LoRA"):
            save_light(model, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_in_another_dtype(self, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=r"float32; now bfloat16"):
            save_light(linear("llama").to(torch.bfloat16), tmp_path)

    def test_of_a_softmax_model(self, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=r"LlamaForCausalLM, which is no converted"):
            save_light(tiny("llama"), tmp_path)

    def test_of_an_unknown_base(self, tmp_path: Path) -> None:
        model = linear("llama")
        del model.config.darkformer_base
        with pytest.raises(ConversionError, match="not known which weights"):
            save_light(model, tmp_path)


class TestLoadingIsRefused:
    """Each leaves the base as it was."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return save_light(linear("llama"), tmp_path)

    def _refused(self, file: Path, error: type[Exception], match: str, base: PreTrainedModel | None = None) -> None:
        base = base or tiny("llama")
        before, config = logits(base, IDS, MASK), base.config.to_dict()
        with pytest.raises(error, match=match):
            load_light(base, file.parent)
        assert next(dark_layers(base), None) is None
        assert base.config.to_dict() == config and torch.equal(logits(base, IDS, MASK), before)

    def test_another_base(self, file: Path) -> None:
        self._refused(file, InputError, r"belongs to the weights of .* differ \(fingerprint", tiny("llama", seed=1))
        self._refused(file, InputError, r"belongs to the weights of", tiny("qwen3"))

    def test_one_weight_of_the_base_differs(self, file: Path) -> None:
        base = tiny("llama")
        with torch.no_grad():
            base.lm_head.weight[0, 0] += 1e-6
        self._refused(file, InputError, "belongs to the weights of", base)

    def test_the_base_in_another_dtype(self, file: Path) -> None:
        self._refused(file, InputError, r"converted in float32; received .* in bfloat16", tiny("llama").bfloat16())

    def test_no_file(self, tmp_path: Path) -> None:
        self._refused(tmp_path / LIGHT_FILE, InputError, r"holds no darkformer\.safetensors")

    def test_truncated(self, file: Path) -> None:
        content = file.read_bytes()
        for length in (0, 5, 200, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:length])
            self._refused(file, InputError, "is damaged")

    def test_any_flipped_bit(self, file: Path) -> None:
        content = file.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        generator = torch.Generator().manual_seed(0)
        inside = torch.randint(8, header, (30,), generator=generator).tolist()
        after = torch.randint(header, len(content), (30,), generator=generator).tolist()
        named = [content.index(b'"format"') + 3, content.index(b'"pt"') + 1]  # safetensors' own entry in the metadata
        for place in [0, 3, 7, *named, *inside, header, *after, len(content) - 1]:
            flipped = bytearray(content)
            flipped[place] ^= 1 << (place % 8)
            if flipped[place : place + 1].isspace() and content[place : place + 1].isspace():
                continue  # the header's padding
            file.write_bytes(flipped)
            with pytest.raises((InputError, ConfigError), match=r"damaged|not written by save_light|newer|layout"):
                load_light(tiny("llama"), file.parent)

    @pytest.mark.parametrize(
        "name", ["model.layers.1.self_attn.dark.geometry", "model.layers.2.self_attn.dark.projection"]
    )
    def test_missing_tensors(self, file: Path, name: str) -> None:
        header, tensors = light._read(file)
        del tensors[name]
        write_sealed(file, "darkformer", header, tensors)
        self._refused(file, InputError, rf"lacks 1 tensors \({name}")

    def test_tensors_beyond_the_configuration(self, file: Path) -> None:
        header, tensors = light._read(file)
        write_sealed(
            file, "darkformer", header, tensors | {"model.layers.0.self_attn.dark.key_geometry": torch.zeros(2, 8, 8)}
        )
        self._refused(file, InputError, "beyond what its configuration needs")

    def test_another_shape(self, file: Path) -> None:
        header, tensors = light._read(file)
        name = "model.layers.0.self_attn.dark.projection"
        write_sealed(file, "darkformer", header, tensors | {name: torch.zeros(2, 8, 8)})
        self._refused(file, InputError, r"is \(2, 8, 8\), this model needs \(2, 16, 8\)")

    @pytest.mark.parametrize("number", [torch.nan, torch.inf])
    def test_diverged_maps(self, file: Path, number: float) -> None:
        header, tensors = light._read(file)
        tensors["model.layers.1.self_attn.dark.geometry"][0, 0, 0] = number
        write_sealed(file, "darkformer", header, tensors)
        self._refused(file, NonFiniteError, r"1 tensors of feature maps \(model\.layers\.1\.self_attn\.dark\.geometry")

    def test_another_kind_of_numbers(self, file: Path) -> None:
        header, tensors = light._read(file)
        name = "model.layers.0.self_attn.dark.projection"
        write_sealed(file, "darkformer", header, tensors | {name: tensors[name].to(torch.complex64)})
        self._refused(file, InputError, r"projection has dtype torch\.complex64")

    @pytest.mark.parametrize("change", [{"config": []}, {"base": "llama"}, {"layout": 1e400}])
    def test_a_header_of_other_types(self, file: Path, change: dict[str, object]) -> None:
        header, tensors = light._read(file)
        write_sealed(file, "darkformer", header | change, tensors)
        self._refused(file, InputError, "is damaged")

    def test_a_header_without_its_base(self, file: Path) -> None:
        header, tensors = light._read(file)
        write_sealed(file, "darkformer", header | {"base": {"name": "llama"}}, tensors)
        self._refused(file, InputError, "does not say the dtype, fingerprint of its base")
        for value in (5, None, [], "\0"):
            write_sealed(file, "darkformer", header | {"base": header["base"] | {"fingerprint": value}}, tensors)
            self._refused(file, InputError, "fingerprint")

    def test_an_unknown_field_of_a_newer_version(self, file: Path) -> None:
        header, tensors = light._read(file)
        header["config"]["temperature"] = 1.0
        write_sealed(file, "darkformer", header, tensors)
        self._refused(file, ConfigError, r"temperature.*newer darkformer")

    def test_a_newer_layout(self, file: Path) -> None:
        header, tensors = light._read(file)
        write_sealed(file, "darkformer", header | {"layout": 2, "version": "9.0"}, tensors)
        self._refused(file, ConfigError, r"layout 2.*darkformer 9\.0; upgrade")

    def test_someone_elses_file(self, file: Path) -> None:
        save_file({"weight": torch.zeros(2)}, file)
        self._refused(file, InputError, "not written by save_light")

    def test_a_converted_model(self, file: Path) -> None:
        with pytest.raises(ConversionError, match="converted already"):
            load_light(linear("llama"), file.parent)

    def test_through_load_model(self, file: Path) -> None:
        with pytest.raises(InputError, match=r"light form.*load_light"):
            load_model(str(file.parent))


def test_the_header_is_plain_json(tmp_path: Path) -> None:
    metadata = _header(save_light(linear("llama"), tmp_path))
    header = json.loads(metadata["darkformer"])
    assert DarkConfig.from_dict(header["config"]) == DARK
    assert set(header["base"]) == {"name", "dtype", "fingerprint"} and len(metadata["checksum"]) == 64


class TestFullWeights:
    """The same for `save_pretrained`, where transformers itself would warn at the most."""

    def test_missing_tensors(self, tmp_path: Path) -> None:
        linear("llama").save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        for layer in (0, 2):
            del tensors[f"model.layers.{layer}.self_attn.dark.far_bias"]
        save_file(tensors, file, metadata={"format": "pt"})
        for load in (AutoModelForCausalLM.from_pretrained, lambda folder: load_model(str(folder))):
            with pytest.raises(InputError, match=r"lacks 2 tensors.*layers\.0\.self_attn\.dark\.far_bias"):
                load(tmp_path)

    def test_one_missing_offset(self, tmp_path: Path) -> None:
        """Files of version 0.1.0 have none at all; of a later one each counts."""
        linear("llama").save_pretrained(tmp_path)
        file, name = tmp_path / "model.safetensors", "model.layers.1.self_attn.dark.geometry_offset"
        tensors = load_file(file)
        save_file({n: x for n, x in tensors.items() if n != name}, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=rf"lacks 1 tensors .*\({name}"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize("shards", [False, True])
    def test_any_flipped_bit(self, shards: bool, tmp_path: Path) -> None:
        class Tokenizer:
            def save_pretrained(self, folder: Path) -> None: ...

        model = linear("llama")
        if shards:
            model.save_pretrained(tmp_path, max_shard_size="40KB")
            names = {path.name for path in tmp_path.glob("*.safetensors")}
            assert len(names) > 1
            lines = "".join(f"{digest}  {name}\n" for name, digest in loading._digests(tmp_path).items())
            (tmp_path / "SHA256SUMS").write_text(lines)
        else:
            loading.save_model(model, Tokenizer(), tmp_path)  # type: ignore[arg-type]
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout  # the file is that of the standard tool
        _same(load_model(str(tmp_path)), model)
        for file in sorted(tmp_path.glob("*.safetensors")):
            content = file.read_bytes()
            for place in (20, len(content) // 2, len(content) - 1):
                file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
                with pytest.raises(InputError, match=rf"{file.name} is missing or damaged"):
                    load_model(str(tmp_path))
            file.write_bytes(content)
        file.unlink()
        with pytest.raises(InputError, match=rf"{file.name} is missing or damaged"):
            load_model(str(tmp_path))

    def test_softmax_weights_under_a_converted_config(self, tmp_path: Path) -> None:
        tiny("llama").save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"lacks \d+ tensors of what conversion added"):
            AutoModelForCausalLM.from_pretrained(tmp_path, config=linear("llama").config)

    def test_truncated(self, tmp_path: Path) -> None:
        linear("llama").save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(InputError, match="cannot be loaded"):
            load_model(str(tmp_path))
