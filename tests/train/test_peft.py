"""LoRA by peft on a converted model: it learns, is saved, loads on either form of the base, and merges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf.families import DARK, disturb, linear, logits, tiny, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from darkformer import (
    ConversionError,
    FeatureMap,
    Redraw,
    calibrate,
    convert,
    dark_layers,
    load_light,
    load_model,
    redraw,
    save_light,
)

IDS = tokens(2, 40)


def _adapted(model: PreTrainedModel, **options: object) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]
    return get_peft_model(model, config)


def _train(model: PeftModel, folder: Path, **options: object) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=2, learning_rate=2e-2, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(1, 8).repeat(4, 4)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, **options)  # type: ignore[arg-type]
    trainer.train()
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


@pytest.fixture(params=[False, True], ids=["lora", "lora and geometry"])
def geometry(request: pytest.FixtureRequest) -> dict[str, object]:
    return {"modules_to_save": ["dark"]} if request.param else {}


def test_train_save_load_merge(geometry: dict[str, object], tmp_path: Path) -> None:
    model = _adapted(linear("llama"), **geometry)
    assert torch.equal(logits(model, IDS), logits(linear("llama"), IDS))  # LoRA starts at zero
    before = _state(model)
    losses = _train(model, tmp_path / "run")
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    expected = {name for name in before if "lora_" in name}
    if geometry:
        expected |= {n for n in before if ".modules_to_save." in n and n.endswith("_offset")}
    assert changed == expected and len([name for name in changed if "geometry" in name]) == (3 if geometry else 0)

    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("dark.geometry" in name for name in names) == bool(geometry)
    trained = logits(model, IDS)
    loaded = PeftModel.from_pretrained(linear("llama"), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, IDS), trained)

    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, IDS), trained, rtol=0, atol=1e-4)
    layers = list(dark_layers(merged))
    assert len(layers) == 3 and all(type(layer) is FeatureMap for layer in layers)
    assert all(
        torch.equal(x, trained_layer.values()[name])
        for layer, trained_layer in zip(layers, dark_layers(model), strict=True)
        for name, x in layer.values().items()
    )
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_model(str(tmp_path / "merged")), IDS), logits(merged, IDS))
    with pytest.raises(ConversionError, match="no longer those of"):
        save_light(merged, tmp_path / "light")


def test_base_light_form_and_adapter_are_the_whole_model(tmp_path: Path) -> None:
    model = linear("llama")
    save_light(model, tmp_path / "light")
    adapted = _adapted(model)
    _train(adapted, tmp_path / "run")
    adapted.save_pretrained(tmp_path / "adapter")
    base = load_light(tiny("llama"), tmp_path / "light")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), IDS), logits(adapted, IDS))


def test_the_adapter_generates_and_switches_off(geometry: dict[str, object], tmp_path: Path) -> None:
    model = _adapted(linear("llama"), **geometry)
    _train(model, tmp_path)
    ids = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    # Streaming is the full forward: every new token is the likeliest one after those before it.
    assert torch.equal(logits(model, ids)[:, -7:-1].argmax(-1), ids[:, -6:])
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(linear("llama"), IDS))


def test_redraw_under_an_adapter(geometry: dict[str, object], tmp_path: Path) -> None:
    model, expected = _adapted(linear("llama"), **geometry), linear("llama")
    _train(model, tmp_path, callbacks=[Redraw(4)])
    redraw(expected, 8)
    layers = list(dark_layers(model))
    assert len(layers) == 3
    assert all(torch.equal(a.projection, b.projection) for a, b in zip(layers, dark_layers(expected), strict=True))


def test_calibration_comes_before_the_adapter_that_trains_the_geometry() -> None:
    calibrate(_adapted(disturb(convert(tiny("llama"), DARK))), [tokens(3, 60)])
    with pytest.raises(ConversionError, match="before an adapter of peft"):
        calibrate(_adapted(linear("llama"), modules_to_save=["dark"]), [tokens(3, 60)])


def test_save_light_refuses_an_adapted_model(tmp_path: Path) -> None:
    model = _adapted(linear("llama"))
    with pytest.raises(ConversionError, match=r"PeftModelForCausalLM.*adapter of peft is saved by its own"):
        save_light(model, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="no longer those of"):
        save_light(model.get_base_model(), tmp_path)
