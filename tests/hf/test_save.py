"""What is saved loads to the same bits, in this process and in a new one, and is reproducible from the seed alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hang import HANG_SECONDS
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import darkformer
from darkformer import (
    ConfigError,
    DarkConfig,
    InputError,
    NonFiniteError,
    convert,
    dark_layers,
    load_light,
    revert,
    save_light,
)
from darkformer.hf.load import load_model
from hf.families import DARK, FAMILIES, PAPER, disturb, left_mask, linear, logits, tiny, tokens

IDS, MASK = tokens(2, 40), left_mask([0, 11], 40)
CONFIGS = {
    "default": DARK,
    "paper": PAPER,
    "lfk": DarkConfig(method="lfk", num_features=16, window=4, sinks=2),
    "untied": DarkConfig(num_features=16, window=4, sinks=2, tied=False, draw="iid"),
    "local": DarkConfig(method="local", window=4, sinks=2),
    "exact": DarkConfig(method="exact"),
}


def _saved_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


def _assert_equal(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    assert [layer.config for layer in dark_layers(loaded)] == [layer.config for layer in dark_layers(model)]
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(logits(loaded, IDS, MASK), logits(model, IDS, MASK))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_load_is_bit_equal(family: str, config: DarkConfig, tmp_path: Path) -> None:
    model = linear(family, config)
    model.save_pretrained(tmp_path)
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert"])
def test_other_heads_on_the_same_weights(family: str, tmp_path: Path) -> None:
    model = linear(family)
    model.save_pretrained(tmp_path)
    given = dict(input_ids=IDS, attention_mask=MASK)
    with torch.no_grad():
        body = AutoModel.from_pretrained(tmp_path)(**given).last_hidden_state
        assert torch.equal(body, model.base_model(**given).last_hidden_state)
        assert not torch.equal(body, tiny(family).base_model(**given).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    layers = list(zip(dark_layers(classifier), dark_layers(model), strict=True))
    assert len(layers) == len(FAMILIES[family].layers)
    assert all(torch.equal(x, a.state_dict()[name]) for a, b in layers for name, x in b.state_dict().items())


def test_only_safetensors_and_omega_among_them(family: str, tmp_path: Path) -> None:
    model = linear(family)
    model.save_pretrained(tmp_path)
    suffixes = {path.suffix for path in tmp_path.iterdir()}
    assert suffixes == {".safetensors", ".json"}
    omegas = {name for name in model.state_dict() if name.endswith("dark.projection")}
    assert len(omegas) == len(list(dark_layers(model)))
    assert omegas <= _saved_names(tmp_path)


def test_shards(tmp_path: Path) -> None:
    model = linear("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_saved_omega_is_what_counts(tmp_path: Path) -> None:
    # A redrawn Ω is not the one that the seed in config.json would give.
    model = linear("llama")
    with torch.no_grad():
        for layer in dark_layers(model):
            layer.projection.mul_(1.5)
    model.save_pretrained(tmp_path)
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_feature_maps_stay_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    model = linear("llama")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for layer, original in zip(dark_layers(loaded), dark_layers(model), strict=True):
        assert {x.dtype for x in layer.parameters()} == {torch.bfloat16}
        assert {x.dtype for x in layer.buffers()} == {torch.float32}
        assert layer.values().keys() == original.values().keys()
        for name, tensor in original.values().items():
            assert torch.equal(layer.values()[name], tensor), name
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    _assert_equal(again, loaded)


def test_a_loaded_model_reverts(tmp_path: Path) -> None:
    expected = logits(tiny("llama"), IDS, MASK)
    linear("llama").save_pretrained(tmp_path)
    model = revert(load_model(str(tmp_path)))
    torch.testing.assert_close(logits(model, IDS, MASK), expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "softmax")
    saved = json.loads((tmp_path / "softmax" / "config.json").read_text("utf-8"))
    assert "darkformer" not in saved
    assert not any("dark" in name for name in _saved_names(tmp_path / "softmax"))


@pytest.mark.parametrize(("family", "implementation"), [("gemma2", "eager"), ("llama", "sdpa")])
def test_a_loaded_model_reverts_to_what_its_class_uses(family: str, implementation: str, tmp_path: Path) -> None:
    linear(family).save_pretrained(tmp_path)
    model = revert(load_model(str(tmp_path)))
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(logits(model, IDS, MASK), logits(tiny(family), IDS, MASK), rtol=0, atol=1e-5)


def test_a_loaded_model_reverts_to_what_was_asked_for(tmp_path: Path) -> None:
    linear("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert revert(model).config._attn_implementation == "eager"


def test_a_loaded_model_saves_again(tmp_path: Path) -> None:
    linear("gemma3").save_pretrained(tmp_path / "first")
    loaded = load_model(str(tmp_path / "first"))
    loaded.save_pretrained(tmp_path / "second")
    _assert_equal(load_model(str(tmp_path / "second")), loaded)


def test_a_config_from_the_future_is_refused(tmp_path: Path) -> None:
    linear("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["darkformer"]["temperature"] = 1.0
    file.write_text(json.dumps(config), "utf-8")
    with pytest.raises(ConfigError, match=r"temperature.*newer darkformer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


class Bomb:
    """A pickle that writes a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.trace), "w")


def test_loading_runs_no_code_from_the_folder(tmp_path: Path) -> None:
    model, folder, trace = linear("llama"), tmp_path / "model", tmp_path / "ran"
    model.save_pretrained(folder)
    save_light(model, folder / "light")
    for place in (folder, folder / "light"):
        code = f"open({str(trace)!r}, 'w')\nclass Custom: pass\n"
        for name in ("modeling_custom.py", "configuration_custom.py", "darkformer.py", "__init__.py", "conftest.py"):
            (place / name).write_text(code)
        for name in ("pytorch_model.bin", "training_args.bin", "darkformer.bin"):
            torch.save({"weight": Bomb(trace)}, place / name)
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_custom.Custom", "AutoConfig": "configuration_custom.Custom"}
    file.write_text(json.dumps(config), "utf-8")
    for load in (AutoModelForCausalLM.from_pretrained, lambda path: load_model(str(path))):
        _assert_equal(load(folder), model)
    light = load_light(tiny("llama"), folder / "light")
    assert torch.equal(logits(light, IDS, MASK), logits(model, IDS, MASK))
    assert not trace.exists()
    (folder / "model.safetensors").unlink()  # nor where pickled weights are all there is
    with pytest.raises(InputError, match="its weights are pickled and hold more than tensors"):
        load_model(str(folder))
    assert not trace.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # the control: the pickle does what it should not be allowed to


LOADER = """
import sys
import {first}
import {second}
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = torch.load(folder + "/given.pt")
    with torch.no_grad():
        torch.save(model(**given).logits, folder + "/logits.pt")
"""


def _run(code: str, *arguments: str) -> str:
    source = str(Path(darkformer.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("first", "second"), [("darkformer", "transformers"), ("transformers", "darkformer")])
def test_a_fresh_process_loads_to_the_same_bits(first: str, second: str, tmp_path: Path) -> None:
    given = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    expected = {}
    for family in ("llama", "gemma3"):
        model = linear(family)
        model.save_pretrained(tmp_path / family)
        torch.save(given, tmp_path / family / "given.pt")
        with torch.no_grad():
            expected[family] = model(**given).logits
    _run(LOADER.format(first=first, second=second), *(str(tmp_path / family) for family in expected))
    for family, wanted in expected.items():
        assert torch.equal(torch.load(tmp_path / family / "logits.pt"), wanted)


FINDER = """
import sys
import darkformer
assert not [name for name in sys.modules if name.split(".")[0] in ("transformers", "accelerate", "datasets")]
ours = [finder for finder in sys.meta_path if type(finder).__module__ == "darkformer.hf.patches"]
assert len(ours) == 3, ours
import transformers.modeling_utils as target
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
ours = [finder for finder in sys.meta_path if type(finder).__module__ == "darkformer.hf.patches"]
assert not ours, ours
assert target.PreTrainedModel.post_init.by_darkformer
assert PreTrainedConfig.get_config_dict.by_darkformer and "darkformer" in CONFIG_MAPPING
wrapped = target.PreTrainedModel.post_init, vars(PreTrainedConfig)["get_config_dict"], CONFIG_MAPPING["darkformer"]
darkformer.hf.patches.install()
again = target.PreTrainedModel.post_init, vars(PreTrainedConfig)["get_config_dict"], CONFIG_MAPPING["darkformer"]
assert all(x is y for x, y in zip(again, wrapped, strict=True)), "wrapped twice"
print("as it should")
"""


def test_import_is_light_and_the_finders_remove_themselves() -> None:
    assert _run(FINDER) == "as it should\n"


class TestInitialization:
    """What no checkpoint fills is as `convert` would make it, never what the memory held."""

    def test_mismatched_sizes(self, tmp_path: Path) -> None:
        linear("llama").save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        config.darkformer["num_features"] = 32
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
        assert len(info["mismatched_keys"]) == 3
        new = convert(tiny("llama"), DarkConfig(num_features=32, window=4, sinks=2))
        saved = linear("llama")
        for layer, drawn, trained in zip(dark_layers(loaded), dark_layers(new), dark_layers(saved), strict=True):
            assert torch.equal(layer.projection, drawn.projection)
            assert torch.equal(layer.learned("geometry"), trained.learned("geometry"))

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_built_without_memory(self, config: DarkConfig) -> None:
        model = convert(tiny("llama"), config)
        with torch.device("meta"):
            empty = type(model)(model.config)
        empty.to_empty(device="cpu")
        with torch.no_grad():
            for x in (*empty.parameters(), *empty.buffers()):
                x.fill_(77)
        empty.init_weights()
        for made, wanted in zip(dark_layers(empty), dark_layers(model), strict=True):
            for name, x in wanted.state_dict().items():
                assert torch.equal(made.state_dict()[name], x), name

    def test_what_was_learned_stays(self) -> None:
        model = linear("llama")
        before = {name: x.clone() for name, x in model.state_dict().items()}
        model.init_weights()
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["geometry", "far_bias_offset"])
def test_diverged_maps_are_refused(name: str, tmp_path: Path) -> None:
    model = linear("llama")
    with torch.no_grad():
        getattr(list(dark_layers(model))[1], name).view(-1)[0] = torch.nan
    model.save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(
            NonFiniteError, match=rf"1 tensors of feature maps \(model\.layers\.1\.self_attn\.dark\.{name}"
        ):
            load(str(tmp_path))


class TestSeed:
    """Ω follows from `config.seed` and the layer, whatever the global generator is at."""

    @staticmethod
    def _omegas(config: DarkConfig, global_seed: int) -> list[torch.Tensor]:
        model = tiny("llama")
        torch.manual_seed(global_seed)
        return [layer.projection for layer in dark_layers(convert(model, config))]

    @pytest.mark.parametrize("draw", ["orthogonal", "iid"])
    def test_alone_reproduces(self, draw: str) -> None:
        config = DarkConfig(num_features=16, draw=draw, seed=7)
        first, second = self._omegas(config, 1), self._omegas(config, 2)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_another_seed_differs(self) -> None:
        first = self._omegas(DarkConfig(num_features=16, seed=7), 1)
        second = self._omegas(DarkConfig(num_features=16, seed=8), 1)
        assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_layers_and_heads_differ(self) -> None:
        every = torch.cat(self._omegas(DarkConfig(num_features=16), 1))  # (layers * G, m, d)
        assert len({tuple(omega.flatten().tolist()) for omega in every}) == 6

    def test_conversion_leaves_the_global_generator_alone(self) -> None:
        model = tiny("llama")
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        disturb(convert(model, DARK))
        assert torch.equal(torch.rand(3), expected)
