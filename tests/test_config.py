"""Every rule of the configurations, their round trips, and the examples in their docstrings."""

import dataclasses
import doctest
import json
from typing import Any

import pytest

import darkformer.config
from darkformer import ConfigError, DarkConfig, DarkformerError, TrainConfig
from darkformer.config import DRAWS, DTYPES, METHODS, PROPOSALS, TRAIN_GROUPS, field_help

NAN, INFINITY = float("nan"), float("inf")
CONFIGS = [DarkConfig, TrainConfig]


@pytest.mark.parametrize(
    ("field", "values", "rule"),
    [
        ("method", ["softmax", "", None, 3], "is unknown: choose one of dark, performer"),
        ("draw", ["halton", None], "is unknown: choose one of orthogonal, iid, simplex, sobol"),
        ("proposal", ["best", None], "is unknown: choose one of isotropic, oprf, optimal, theorem32"),
        ("num_features", [0, -1, 1.5, "8", None, True], "must be an integer of at least 1"),
        ("window", [-1, 0.5, None, False], "must be an integer of at least 0"),
        ("sinks", [-1, 2.0, None, True], "must be an integer of at least 0"),
        ("seed", [-1, 0.0, None], "must be an integer of at least 0"),
        *(
            (name, [0, 1, None, "yes"], "must be True or False")
            for name in ("center", "balance", "tied", "proposal_weights", "cold_start", "far_bias", "convert_sliding")
        ),
    ],
)
def test_dark_config_refuses(field: str, values: list[Any], rule: str) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{field}={value!r}") as error:
            DarkConfig(**{field: value})
        assert rule in str(error.value)


def test_local_needs_a_window() -> None:
    with pytest.raises(ConfigError, match="method='local' with window=0"):
        DarkConfig(method="local", window=0)
    assert DarkConfig(method="local", window=1, sinks=0).window == 1


@pytest.mark.parametrize(
    ("field", "values", "rule"),
    [
        ("train", ["everything", None], "is unknown: choose one of all, qkv, geometry, none"),
        ("dtype", ["float16", None], "is unknown: choose one of auto, float32, bfloat16"),
        *((name, [-1, 1.5, True], "at least 0") for name in ("steps", "warmup", "seed")),
        *((name, [0, -1, 1.5, None], "at least 1") for name in ("batch_size", "save_every")),
        ("seq_len", [1, 0, 1.5, None], "at least 2"),
        *(
            (name, [0, -1.0, NAN, INFINITY, "1", None, True], "finite number above 0")
            for name in ("lr", "geometry_lr", "max_grad_norm")
        ),
        ("weight_decay", [-0.1, NAN, "0", None], "at least 0"),
    ],
)
def test_train_config_refuses(field: str, values: list[Any], rule: str) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{field}={value!r}") as error:
            TrainConfig(**{field: value})
        assert rule in str(error.value)


@pytest.mark.parametrize("smallest", [0, 1, 2])
def test_the_smallest_allowed_values(smallest: int) -> None:
    """Negative control of the refusals: one more than a refused value is accepted."""
    if smallest == 0:
        DarkConfig(window=0, sinks=0, seed=0)
        TrainConfig(steps=0, warmup=0, seed=0, weight_decay=0)
    elif smallest == 1:
        DarkConfig(num_features=1)
        TrainConfig(batch_size=1, save_every=1, lr=1, geometry_lr=1e-300, max_grad_norm=1)
    else:
        TrainConfig(seq_len=2)


def test_errors_are_one_family() -> None:
    with pytest.raises(DarkformerError):
        DarkConfig(method="softmax")
    with pytest.raises(ValueError, match="unknown"):
        DarkConfig(method="softmax")


def test_paper_form() -> None:
    paper = DarkConfig.paper()
    assert paper == DarkConfig(
        method="dark", num_features=128, window=0, sinks=0, center=False, balance=False, tied=True,
        draw="orthogonal", proposal="isotropic", proposal_weights=True, cold_start=False, far_bias=False,
        convert_sliding=False, drop_features=False, seed=0,
    )  # fmt: skip
    assert DarkConfig.paper(64, method="performer", seed=3).to_dict() == paper.to_dict() | {
        "num_features": 64,
        "method": "performer",
        "seed": 3,
    }
    assert DarkConfig.paper(window=16).window == 16


def test_defaults_are_the_documented_ones() -> None:
    assert DarkConfig() == DarkConfig(
        method="dark", num_features=128, window=64, sinks=4, center=True, balance=True, tied=True,
        draw="orthogonal", proposal="isotropic", proposal_weights=True, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("draw", DRAWS)
def test_round_trip_through_json(method: str, draw: str) -> None:
    config = DarkConfig(method=method, draw=draw, num_features=7, window=3, sinks=2, tied=False, seed=9)
    assert DarkConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"unknown field\(s\) alpha, zeta.*newer darkformer"):
        DarkConfig.from_dict(DarkConfig().to_dict() | {"zeta": 1, "alpha": 2})
    with pytest.raises(ConfigError, match="window=-1"):
        DarkConfig.from_dict({"window": -1})
    assert DarkConfig.from_dict({}) == DarkConfig()  # fields an older version did not write take their defaults


def test_configurations_saved_before_there_were_proposals() -> None:
    old = DarkConfig(num_features=9, draw="iid").to_dict()
    del old["proposal"], old["proposal_weights"]
    assert DarkConfig.from_dict(old) == DarkConfig(num_features=9, draw="iid", proposal="isotropic")


@pytest.mark.parametrize("config", CONFIGS)
def test_frozen(config: type) -> None:
    made = config()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, getattr(made, field.name))
    assert hash(made) == hash(config())


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_has_its_help(config: type) -> None:
    for field in dataclasses.fields(config):
        text = field_help(config, field.name)
        assert text[0].isupper() and text.endswith("."), f"{field.name}: {text}"


@pytest.mark.parametrize(
    ("config", "field", "table"),
    [
        (DarkConfig, "method", METHODS),
        (DarkConfig, "draw", DRAWS),
        (DarkConfig, "proposal", PROPOSALS),
        (TrainConfig, "train", TRAIN_GROUPS),
        (TrainConfig, "dtype", DTYPES),
    ],
)
def test_help_names_every_choice(config: type, field: str, table: dict[str, str]) -> None:
    assert all(f"{name}: {text}" in field_help(config, field) for name, text in table.items())
    for name in table.keys() - {"auto"}:
        assert getattr(config(**{field: name}), field) == name


@pytest.mark.parametrize(
    ("known", "faster", "dtype"),
    [
        ({}, True, "float32"),
        ({"avx512_bf16": False}, True, "float32"),
        ({"avx512_bf16": True}, True, "bfloat16"),
        ({"avx512_bf16": True}, False, "float32"),
        ({"avx512_bf16": True, "amx_bf16": True}, False, "bfloat16"),
        ({"bf16": True}, True, "bfloat16"),
    ],
)
def test_the_automatic_precision_is_one_the_processor_has(
    known: dict[str, bool], faster: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darkformer.config.bfloat16_is_faster", lambda: faster)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: known)
    assert TrainConfig.dtype == "auto"  # what --help shows
    assert TrainConfig().dtype == dtype  # what a record says
    assert TrainConfig(dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("method", METHODS)
def test_feature_count(method: str) -> None:
    assert DarkConfig(method=method, num_features=5).feature_count == (0 if method in ("local", "exact") else 5)


@pytest.mark.parametrize(("steps", "warmup", "taken"), [(100, 5, 5), (10, 5, 2), (4, 5, 0), (0, 5, 0), (100, 0, 0)])
def test_warmup_is_a_fifth_at_most(steps: int, warmup: int, taken: int) -> None:
    assert TrainConfig(steps=steps, warmup=warmup).warmup_steps == taken


def test_docstring_examples_run() -> None:
    result = doctest.testmod(darkformer.config)
    assert result.attempted >= 2 and result.failed == 0
