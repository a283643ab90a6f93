"""Folders of converted models are refused where darkformer is not imported, and load as ever where it is."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hang import HANG_SECONDS
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

import darkformer
from darkformer import InputError, load_model, revert, save_light
from darkformer.hf.saved_config import MODEL_TYPE, NEEDS, OWN_MODEL_TYPE, as_loaded, as_saved, is_converted
from hf.families import linear, logits, tiny, tokens
from hf.tiny_models import MODEL_TYPES, pair, tiny_config

IDS = tokens(2, 24)
ARTIFACTS = Path(__file__).parents[1] / "artifacts" / "0.1.0"


def _config(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "config.json").read_text("utf-8"))
    return content


#: Loads a folder in several ways and says what came of each: the name of the class, or the error.
LOADS = """
import json, sys
import transformers
ways = {
    "config": lambda folder: transformers.AutoConfig.from_pretrained(folder),
    "auto": lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder),
    "body": lambda folder: transformers.AutoModel.from_pretrained(folder),
    "own class": lambda folder: getattr(transformers, sys.argv[1]).from_pretrained(folder),
    "pipeline": lambda folder: transformers.pipeline("text-generation", model=folder, tokenizer=sys.argv[2]),
    "tokenizer": lambda folder: transformers.AutoTokenizer.from_pretrained(folder),
}
outcomes = {}
for folder in sys.argv[3:]:
    for way, load in ways.items():
        try:
            outcomes[f"{folder} {way}"] = type(load(folder)).__name__
        except Exception as error:
            outcomes[f"{folder} {way}"] = f"refused: {error}"
assert not [name for name in sys.modules if name.startswith("darkformer")]
print(json.dumps(outcomes))
"""


def _without_darkformer(own: str, tokenizer: Path, *folders: Path) -> dict[str, dict[str, str]]:
    """By folder and way, what transformers alone makes of folders."""
    run = subprocess.run(
        [sys.executable, "-c", LOADS, own, *map(str, (tokenizer, *folders))], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    outcomes = json.loads(run.stdout.splitlines()[-1])
    return {
        str(folder): {key.removeprefix(f"{folder} "): x for key, x in outcomes.items() if key.startswith(f"{folder} ")}
        for folder in folders
    }


def test_transformers_alone_refuses_every_folder(model_folder: Path, tmp_path: Path) -> None:
    model = linear("llama")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for name in ("saved", "again", "trained", "merged", "softmax"):
        tokenizer.save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "saved")
    load_model(str(tmp_path / "saved")).save_pretrained(tmp_path / "again", max_shard_size="20KB")
    arguments = TrainingArguments(output_dir=str(tmp_path / "trainer"), use_cpu=True, report_to="none")
    Trainer(model=model, args=arguments).save_model(str(tmp_path / "trained"))
    lora = get_peft_model(load_model(str(tmp_path / "saved")), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.merge_and_unload().save_pretrained(tmp_path / "merged")
    revert(load_model(str(tmp_path / "saved"))).save_pretrained(tmp_path / "softmax")

    folders = [tmp_path / name for name in ("saved", "again", "trained", "merged", "softmax")]
    outcomes = _without_darkformer("LlamaForCausalLM", model_folder, *folders, ARTIFACTS / "default" / "full")
    for folder in folders[:-1]:
        found = outcomes[str(folder)]
        assert found.pop("tokenizer") == type(tokenizer).__name__  # clients count tokens
        assert set(found) == {"config", "auto", "body", "own class", "pipeline"}
        for way, outcome in found.items():
            assert outcome.startswith("refused: ") and "darkformer" in outcome, (folder.name, way, outcome)
        assert "import darkformer" in found["own class"]
    # The controls: what was reverted is a softmax model, and nothing in a folder of 0.1.0 stops transformers.
    for folder in (folders[-1], ARTIFACTS / "default" / "full"):
        assert outcomes[str(folder)]["auto"] == outcomes[str(folder)]["own class"] == "LlamaForCausalLM"


def test_the_models_own_entries_are_recoverable(family: str, tmp_path: Path) -> None:
    model = linear(family)
    model.save_pretrained(tmp_path / "converted")
    tiny(family).save_pretrained(tmp_path / "softmax")
    saved, own = _config(tmp_path / "converted"), _config(tmp_path / "softmax")
    assert saved["model_type"] == MODEL_TYPE and saved[OWN_MODEL_TYPE] == own["model_type"] == model.config.model_type
    assert saved["architectures"] == [f"Darkformer{name}" for name in own["architectures"]]  # type: ignore[attr-defined]
    ours = {"darkformer", "darkformer_layers", "darkformer_base"}
    assert {key: x for key, x in as_loaded(saved).items() if key not in ours} == own


@pytest.mark.slow
def test_every_familys_config_comes_back(tmp_path: Path) -> None:
    """Without a model: what AutoConfig and the class itself read is what they read of the softmax model's folder."""
    wrong = []
    for model_type in MODEL_TYPES:
        config = tiny_config(pair(model_type)[0])
        softmax, converted = tmp_path / model_type / "softmax", tmp_path / model_type / "converted"
        config.save_pretrained(softmax)
        config.darkformer = {"method": "dark"}
        config.save_pretrained(converted)
        for reader in (AutoConfig, type(config)):
            wanted, found = reader.from_pretrained(softmax), reader.from_pretrained(converted)
            same = {**found.to_dict(), "_name_or_path": ""} == {
                **wanted.to_dict(), "_name_or_path": "", "darkformer": config.darkformer
            }  # fmt: skip
            if type(found) is not type(wanted) or not same:
                wrong.append((model_type, reader.__name__))
        if _config(converted)["model_type"] != MODEL_TYPE:
            wrong.append((model_type, "file"))
    assert len(MODEL_TYPES) > 100 and not wrong


def test_configs_in_memory_are_the_models_own(family: str, tmp_path: Path) -> None:
    model = linear(family)
    model.save_pretrained(tmp_path / "first")
    for config in (
        AutoConfig.from_pretrained(tmp_path / "first"),
        type(model.config).from_pretrained(tmp_path / "first"),
    ):
        assert type(config) is type(model.config) and config.model_type == model.config.model_type
        assert config.architectures == [type(model).__name__]
        assert not {"transformers_weights", OWN_MODEL_TYPE} & set(vars(config))
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert _config(tmp_path / "second") == _config(tmp_path / "first")


def test_a_class_that_is_called_directly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = linear("llama")
    model.save_pretrained(tmp_path)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        assert "to instantiate a model of type" not in caplog.text
        with pytest.raises(InputError, match="does not say darkformer"):
            GPT2LMHeadModel.from_pretrained(tmp_path)
        assert "of type `llama` to instantiate a model of type `gpt2`" in caplog.text  # the control
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_a_pipeline(model_folder: Path, tmp_path: Path) -> None:
    linear("llama").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    assert len(list(darkformer.dark_layers(generate.model))) == 3


def test_a_model_inside_another(tmp_path: Path) -> None:
    """A model of text and pictures has the entry in the text model's config."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_id=98)
    model = darkformer.convert(Gemma3ForConditionalGeneration(config).eval(), darkformer.DarkConfig(num_features=16))
    model.save_pretrained(tmp_path)
    saved = _config(tmp_path)
    assert saved["model_type"] == MODEL_TYPE and saved["text_config"]["model_type"] == "gemma3_text"  # type: ignore[index]
    for load in (AutoModelForCausalLM, Gemma3ForConditionalGeneration):
        loaded = load.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_folders_of_earlier_versions(tmp_path: Path) -> None:
    model = linear("llama")
    model.save_pretrained(tmp_path)
    earlier = as_loaded(_config(tmp_path))  # as versions before this one wrote it
    assert earlier["model_type"] == "llama" and "transformers_weights" not in earlier
    (tmp_path / "config.json").write_text(json.dumps(earlier), "utf-8")
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path), IDS), logits(model, IDS))


def test_an_adapter_of_peft_on_a_folder(tmp_path: Path) -> None:
    linear("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(load_model(str(tmp_path / "base")), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_B" in name:
                x.fill_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    loaded = PeftModel.from_pretrained(load_model(str(tmp_path / "base")), tmp_path / "adapter")
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # the base is found by its name
    assert torch.equal(logits(merged, IDS), logits(model, IDS))


def test_a_checkpoint_of_trainer_goes_on(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens(1, 8).repeat(4, 4)]

    def trained(steps: int, **options: object) -> torch.Tensor:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to="none",
            use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(model=linear("llama"), args=arguments, train_dataset=rows)
        trainer.train(**options)  # type: ignore[arg-type]
        return logits(trainer.model.eval(), IDS)

    whole = trained(4)
    assert _config(tmp_path / "checkpoint-2")["model_type"] == MODEL_TYPE
    assert torch.equal(trained(4, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), whole)


def test_the_light_form_has_no_config(tmp_path: Path) -> None:
    save_light(linear("llama"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["darkformer.safetensors"]


@pytest.mark.parametrize("kind", ["from the future", MODEL_TYPE, None, 3])
def test_a_model_type_that_is_not_known(kind: object, tmp_path: Path) -> None:
    linear("llama").save_pretrained(tmp_path)
    content = _config(tmp_path) | {OWN_MODEL_TYPE: kind}
    (tmp_path / "config.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(InputError, match="it must name a model type"):
        AutoConfig.from_pretrained(tmp_path)
    del content[OWN_MODEL_TYPE]
    (tmp_path / "config.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(InputError, match="it must name a model type"):
        load_model(str(tmp_path))


def test_code_of_a_config_is_looked_up_by_its_own_type() -> None:
    config = {"model_type": "theirs", "architectures": ["Theirs"], "auto_map": {}, "darkformer": {}}
    saved = as_saved(config)
    assert saved == {**config, "transformers_weights": NEEDS} and as_loaded(saved) == config


def test_other_configs_stay_as_they_are(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    plain = _config(tmp_path)
    assert not is_converted(plain) and as_loaded(plain) == plain and plain["model_type"] == "llama"
    named = plain | {"transformers_weights": "model.safetensors"}
    (tmp_path / "config.json").write_text(json.dumps(named), "utf-8")
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.transformers_weights == "model.safetensors"
    assert PreTrainedConfig.get_config_dict(tmp_path)[0] == named


def test_the_config_of_another_model_is_refused(tmp_path: Path) -> None:
    """Qwen3's layers have norms that Llama's weights lack: they would be left as they were initialised."""
    linear("llama").save_pretrained(tmp_path)
    config = _config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, OWN_MODEL_TYPE: "qwen3"}))
    with pytest.raises(InputError, match=r"lacks .* tensors of converted layers .*q_norm"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_that_does_not_say_darkformer_is_refused(tmp_path: Path) -> None:
    linear("llama").save_pretrained(tmp_path)
    foreign = tiny("llama").config
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
        with pytest.raises(InputError, match=r"is a converted model .* does not say darkformer"):
            load(str(tmp_path), config=foreign)
