"""Finetuning: who learns and how fast, what a run returns, and what is put back afterwards."""

from pathlib import Path

import pytest
import torch
from hf.families import DARK, PAPER, linear, tiny, tokens
from torch import Tensor
from transformers import PreTrainedModel

from darkformer import ConfigError, DarkConfig, TrainConfig, calibrate, convert, dark_layers, finetune
from darkformer.train.evaluate import evaluate
from darkformer.train.finetune import trainable_parameters

BLOCKS = tokens(12, 24)
QUICK = dict(steps=2, warmup=0, seq_len=24, batch_size=2, dtype="float32", lr=1e-2, geometry_lr=1e-2)
LFK = DarkConfig(method="lfk", num_features=16, window=4, sinks=2)


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def _changed(model: PreTrainedModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}


def _added(model: PreTrainedModel) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".dark." in name}


class TestGroups:
    """Exactly the parameters of the group change, and all of them do."""

    @pytest.mark.parametrize("config", [DARK, PAPER, LFK], ids=["dark", "paper", "lfk"])
    def test_geometry(self, config: DarkConfig, tmp_path: Path) -> None:
        model = linear("llama", config)
        before = _state(model)
        finetune(model, BLOCKS, TrainConfig(train="geometry", **QUICK), tmp_path)
        assert _changed(model, before) == _added(model)
        assert any(name.endswith("projection_offset") for name in _added(model)) == (config is LFK)

    def test_qkv(self, tmp_path: Path) -> None:
        model = linear("gemma3")
        before = _state(model)
        finetune(model, BLOCKS, TrainConfig(train="qkv", **QUICK), tmp_path)
        projections = {n for n in before if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))}
        assert len(projections) == 9
        assert _changed(model, before) == _added(model) | projections

    def test_all(self, tmp_path: Path) -> None:
        model = linear("qwen3")
        before = _state(model)
        finetune(model, BLOCKS, TrainConfig(train="all", **QUICK), tmp_path)
        assert _changed(model, before) == {name for name, _ in model.named_parameters()}

    @pytest.mark.parametrize("changes", [dict(train="none"), dict(train="all", steps=0)], ids=["none", "no steps"])
    def test_none(self, changes: dict[str, object], tmp_path: Path) -> None:
        model = linear("llama")
        before = _state(model)
        assert finetune(model, BLOCKS, TrainConfig(**{**QUICK, **changes}), tmp_path / "out") == []
        assert not _changed(model, before)
        assert not (tmp_path / "out").exists()

    def test_a_softmax_model_trains_as_well(self, tmp_path: Path) -> None:
        # The fair reference: the same budget without conversion.
        model = tiny("llama")
        before = _state(model)
        assert len(finetune(model, BLOCKS, TrainConfig(train="all", **QUICK), tmp_path)) == 2
        assert _changed(model, before) == set(dict(model.named_parameters()))

    @pytest.mark.parametrize("method", ["performer", "random", "constant"])
    def test_nothing_to_train(self, method: str, tmp_path: Path) -> None:
        model = convert(tiny("llama"), DarkConfig.paper(num_features=16, method=method))
        with pytest.raises(ConfigError, match=r"train='geometry'.*use train='qkv' or 'all'"):
            finetune(model, BLOCKS, TrainConfig(train="geometry", **QUICK), tmp_path)
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize(
        "name",
        [
            "transformer.h.0.attn.c_attn.weight",
            "gpt_neox.layers.0.attention.query_key_value.bias",
            "model.layers.0.self_attn.qkv_proj.weight",
        ],
    )
    def test_fused_projections_are_found(self, name: str) -> None:
        model = torch.nn.Module()
        owner = model
        *path, leaf = name.split(".")
        for part in path:
            owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, torch.nn.Parameter(torch.zeros(2)))
        model.register_parameter("o_proj", torch.nn.Parameter(torch.zeros(2)))
        own, added = trainable_parameters(model, "qkv")
        assert [id(p) for p in own] == [id(owner.get_parameter(leaf))]
        assert added == []

    def test_projections_of_other_names_are_not_left_out_silently(self) -> None:
        model = linear("llama")  # whose geometry would train alone
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.query, attention.key, attention.value = attention.q_proj, attention.k_proj, attention.v_proj
            del attention.q_proj, attention.k_proj, attention.v_proj
        with pytest.raises(ConfigError, match="no parameter of this model has a name"):
            trainable_parameters(model, "qkv")


def test_two_learning_rates_and_the_schedule(tmp_path: Path) -> None:
    budget = TrainConfig(**{**QUICK, "steps": 10, "warmup": 50, "lr": 1e-3, "geometry_lr": 3e-2, "weight_decay": 0.1})
    model = linear("llama")
    finetune(model, BLOCKS, TrainConfig(**{**budget.__dict__, "save_every": 5}), tmp_path)
    groups = torch.load(tmp_path / "checkpoint-5" / "optimizer.pt")["param_groups"]
    assert [(g["initial_lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-3, 0.0), (3e-2, 0.0)]
    counts = [len(g["params"]) for g in groups]
    assert counts[2] == len(_added(model))
    assert sum(counts) == len(list(model.parameters()))
    # Two warm-up steps (a fifth of ten), then a cosine: after five steps 3/8 of the way down.
    factor = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 3 / 8)).item())
    assert [g["lr"] for g in groups] == pytest.approx([1e-3 * factor, 1e-3 * factor, 3e-2 * factor])


@pytest.mark.parametrize("group", ["all", "qkv", "geometry"])
def test_the_loss_goes_down(group: str, tmp_path: Path) -> None:
    repeated = tokens(1, 8).repeat(12, 4)
    model = convert(tiny("llama"), DARK)
    calibrate(model, [tokens(3, 60)])
    before = evaluate(model, repeated).loss
    budget = TrainConfig(train=group, **{**QUICK, "steps": 30, "lr": 3e-3, "geometry_lr": 3e-2})
    losses = finetune(model, repeated, budget, tmp_path)
    assert len(losses) == 30
    assert losses[0] == pytest.approx(before, rel=1e-4)
    share = {"all": 0.2, "qkv": 0.7, "geometry": 0.97}[group]  # the frozen rest of a random model can do only so much
    assert losses[-1] < share * before
    assert evaluate(model, repeated).loss == pytest.approx(losses[-1], rel=0.05)


def test_lfk_learns_omega_and_dark_does_not(tmp_path: Path) -> None:
    learned, fixed = linear("llama", LFK), linear("llama")
    assert all(isinstance(fm.projection_offset, torch.nn.Parameter) for fm in dark_layers(learned))
    omegas = (
        [fm.learned("projection").detach().clone() for fm in dark_layers(learned)],
        [fm.projection.clone() for fm in dark_layers(fixed)],
    )
    for model in (learned, fixed):
        finetune(model, BLOCKS, TrainConfig(train="all", **QUICK), tmp_path / model.config.darkformer["method"])
    assert not any(
        torch.equal(fm.learned("projection"), x) for fm, x in zip(dark_layers(learned), omegas[0], strict=True)
    )
    assert all(torch.equal(fm.projection, x) for fm, x in zip(dark_layers(fixed), omegas[1], strict=True))


def test_bfloat16_autocast(tmp_path: Path) -> None:
    model, exact = linear("llama"), linear("llama")
    losses = finetune(model, BLOCKS, TrainConfig(**{**QUICK, "steps": 4, "dtype": "bfloat16"}), tmp_path / "a")
    expected = finetune(exact, BLOCKS, TrainConfig(**{**QUICK, "steps": 4}), tmp_path / "b")
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.03)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_steps_are_reported(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    scores: list[int] = []
    losses = finetune(
        linear("llama"), BLOCKS, TrainConfig(**{**QUICK, "steps": 4}), tmp_path,
        on_step=lambda step, loss: seen.append((step, loss)),
        after_step={2: lambda: scores.append(len(seen)), 4: lambda: scores.append(len(seen))},
    )  # fmt: skip
    assert seen == list(enumerate(losses, start=1))
    assert scores == [1, 3]  # after the step, before it is logged


def test_what_was_frozen_stays_frozen(tmp_path: Path) -> None:
    model = linear("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    finetune(model, BLOCKS, TrainConfig(train="geometry", **QUICK), tmp_path)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert model.config.use_cache  # Trainer turns it off, and the saved model would keep that
    assert model(BLOCKS[:1]).past_key_values is not None


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> list[float]:
        torch.manual_seed(len(name))  # whatever the global generator is at
        return finetune(linear("llama"), BLOCKS, TrainConfig(**{**QUICK, "steps": 4, "seed": seed}), tmp_path / name)

    first = run("first", 0)
    assert run("again", 0) == first
    assert run("other", 1) != first
