"""What released versions have written still loads, and computes what it did then (tests/artifacts/make.py wrote it)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerances import STREAM, relative_error
from transformers import AutoModelForCausalLM, PreTrainedModel

from darkformer import dark_layers, load_cache, load_light, load_model
from darkformer.hf.added import added_values

ARTIFACTS = Path(__file__).parents[1] / "artifacts"
VERSIONS = sorted(path.name for path in ARTIFACTS.iterdir() if (path / "recorded.safetensors").is_file())
FORMS = ("default", "paper")


def _load(version: str, form: str, kind: str) -> PreTrainedModel:
    folder = ARTIFACTS / version
    if kind == "full":
        return load_model(str(folder / form / "full"))
    return load_light(load_model(str(folder / "base")), folder / form / "light")


def test_there_are_some() -> None:
    assert VERSIONS
    size = sum(path.stat().st_size for path in ARTIFACTS.rglob("*") if path.is_file())
    assert size < 200_000 * len(VERSIONS)


@pytest.mark.parametrize("kind", ["full", "light"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", VERSIONS)
def test_loads_to_the_recorded_logits(version: str, form: str, kind: str) -> None:
    recorded = load_file(ARTIFACTS / version / "recorded.safetensors")
    model = _load(version, form, kind)
    with torch.no_grad():
        logits = model(recorded["input_ids"], use_cache=False).logits
    assert relative_error(logits, recorded[form]) < STREAM  # other machines add in another order
    other = recorded[FORMS[1 - FORMS.index(form)]]
    assert (logits - other).abs().max() > 0.01  # the records of the two forms could not be exchanged


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_prompt_goes_on_to_the_recorded_logits(version: str, form: str) -> None:
    recorded = load_file(ARTIFACTS / version / "recorded.safetensors")
    model, ids = _load(version, form, "full"), recorded["input_ids"]
    cache = load_cache(ARTIFACTS / version / form / "prompt.safetensors", model)
    seen = cache.get_seq_length()
    assert 0 < seen < ids.shape[1]
    with torch.no_grad():
        rest = model(ids[:, seen:], past_key_values=cache).logits
        alone = model(ids[:, seen:], use_cache=False).logits
    assert relative_error(rest, recorded[form][:, seen:]) < STREAM
    assert relative_error(alone, recorded[form][:, seen:]) > 0.01  # the prompt is in the file and nowhere else


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_number_of_the_full_form_is_there(
    version: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    folder = ARTIFACTS / version / "default" / "full"
    saved = load_file(folder / "model.safetensors")
    with caplog.at_level("WARNING"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert "MISSING" not in caplog.text and "_offset" not in caplog.text
    values = added_values(model)
    if not any(name.endswith("_offset") for name in saved):
        assert values.keys() == {name for name in saved if ".dark." in name}
        assert all(torch.equal(x.view(torch.int32), saved[name].view(torch.int32)) for name, x in values.items())
    for layer in dark_layers(model):
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert {x.dtype for x in layer.buffers()} == {torch.float32}


@pytest.mark.parametrize("version", VERSIONS)
def test_both_kinds_hold_the_same_tensors(version: str) -> None:
    for form in FORMS:
        full, light = (_load(version, form, kind).state_dict() for kind in ("full", "light"))
        assert list(full) == list(light) and all(torch.equal(full[name], light[name]) for name in full)
