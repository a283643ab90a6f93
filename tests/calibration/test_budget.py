"""Budgets: what they mean in bytes, that choices keep within them, and that what is chosen is what converts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.families import converted, tiny, tokens

from darkformer import ConfigError, ConversionError, DarkConfig, InputError, TrainConfig, convert, dark_layers
from darkformer.calibration.budget import (
    Budget,
    Choice,
    Chooser,
    calibrate_within,
    converted_bytes,
    counts_features,
    full_context,
    settled,
)
from darkformer.calibration.calibrate import keys_of_features
from darkformer.calibration.probe import SpreadProbe
from darkformer.calibration.sensitivity import Sensitivity, sensitivity
from darkformer.calibration.window_changes import WindowChange
from darkformer.cost import kv_cache_bytes, model_bytes, state_bytes
from darkformer.evaluation.budget import BudgetTask, calibration
from darkformer.hf.cache import cache_bytes
from darkformer.hf.layers import converted_modules, layer_of
from darkformer.train.linearize import check_context

CONTEXT, LENGTH = 320, 4000
FORM = DarkConfig(num_features=4, sinks=2)
BATCHES = [tokens(2, CONTEXT)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def found(model: Any) -> Sensitivity:
    return sensitivity(model, BATCHES, window=32, sinks=2, dtype="float32")


def chosen(model: Any, found: Sensitivity, text: str, **options: Any) -> Choice:
    chooser = Chooser(model, BATCHES, found, config=FORM, dtype="float32", **options)
    return chooser.choose(Budget.parse(text, LENGTH))


class TestParse:
    @pytest.mark.parametrize(
        ("text", "share", "size"),
        [
            ("10%", 0.1, None), ("0", 0.0, None), ("0%", 0.0, None), (" 2.5 %", 0.025, None),
            ("64MB", None, 64_000_000), ("1.5 GiB", None, 3 << 29), ("800kB", None, 800_000), ("100%", 1.0, None),
        ],
    )  # fmt: skip
    def test_shares_and_sizes(self, text: str, share: float | None, size: int | None) -> None:
        assert Budget.parse(text, 100) == Budget(share, size, 100)

    @pytest.mark.parametrize("text", ["", "ten", "10", "-5%", "10 %%", "MB"])
    def test_nonsense(self, text: str) -> None:
        with pytest.raises(ConfigError, match="give a share of the softmax cache"):
            Budget.parse(text, 100)

    def test_more_than_everything(self) -> None:
        with pytest.raises(ConfigError, match=r"whole softmax cache is 100%"):
            Budget.parse("101%", 100)


class TestChoice:
    @pytest.mark.parametrize("text", ["20%", "40%", "70%"])
    def test_it_keeps_within_its_bytes_and_uses_them(self, model: Any, found: Sensitivity, text: str) -> None:
        choice = chosen(model, found, text)
        limit = Budget.parse(text, LENGTH).bytes_of(choice.softmax)
        assert choice.softmax == 3 * kv_cache_bytes(LENGTH, num_kv_heads=2, head_dim=8)
        one_more = kv_cache_bytes(LENGTH, num_kv_heads=1, head_dim=8)
        assert limit - one_more < choice.size <= limit
        assert len(choice.config.keep_exact) >= 1
        assert [row["size"] <= limit for row in choice.tried] == [True] * len(choice.tried)

    def test_what_is_chosen_is_what_a_cache_keeps(self, model: Any, found: Sensitivity) -> None:
        choice = chosen(model, found, "40%")
        linear = converted(tiny("llama"), choice.config)
        with torch.no_grad():
            cache = linear(tokens(1, 700), use_cache=True).past_key_values
        layers = list(map(layer_of, converted_modules(linear)))
        assert cache_bytes(cache) == model_bytes(linear.config, layers, choice.config, 700)

    def test_heads_come_in_their_order(self, model: Any, found: Sensitivity) -> None:
        few, many = (chosen(model, found, text).config.keep_exact for text in ("30%", "70%"))
        names = [f"{layer}.{head}" for layer, head in found.order]
        for kept in (few, many):
            plain = {f"{layer}.{head}" for layer, head in found.order if layer in kept} | set(map(str, kept))
            assert set(names[: len(plain & set(names))]) == plain & set(names)

    def test_the_best_candidate_is_taken(self, model: Any, found: Sensitivity) -> None:
        choice = chosen(model, found, "40%")
        best, config = min(choice.tried, key=lambda row: row["score"]), choice.config
        assert (best["window"], best["size"]) == (config.window, choice.size)
        assert (best["heads"], best["layer_windows"]) == (len(config.keep_exact), len(config.layer_windows))

    def test_nothing_and_everything(self, model: Any, found: Sensitivity) -> None:
        constant, whole = chosen(model, found, "0"), chosen(model, found, "100%")
        assert constant.config == replace(FORM, window=128) and not constant.config.keep_exact  # of rows this short
        assert whole.config.method == "exact" and whole.share == 1.0

    def test_round_trip(self, model: Any, found: Sensitivity) -> None:
        choice = chosen(model, found, "40%")
        assert Choice.from_dict(choice.to_dict()) == choice
        assert "exact heads" in str(choice) and f"{choice.share:.1%}" in str(choice)

    def test_the_model_is_as_it_was(self, model: Any, found: Sensitivity) -> None:
        with torch.no_grad():
            before = model(tokens(1, 50)).logits
            chosen(model, found, "40%")
            assert torch.equal(model(tokens(1, 50)).logits, before)
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("text", "config", "training", "counted"),
    [
        ("10%", {}, {}, False), ("10%", {}, {"steps": 0}, False), ("10%", {"drop_features": False}, {}, True),
        ("10%", {}, {"transfer_steps": 1}, True), ("10%", {}, {"train": "geometry"}, True),
        ("10%", {}, {"train": "geometry", "steps": 0}, False), ("10%", {}, {"redraw_every": 5}, True),
        ("10%", {}, {"window_dropout": 0.5}, True), ("0", {}, {}, True), ("0", {}, {"steps": 0}, False),
    ],
)  # fmt: skip
def test_features_count_where_they_may_learn(
    text: str, config: dict[str, Any], training: dict[str, Any], counted: bool
) -> None:
    assert counts_features(Budget.parse(text, LENGTH), DarkConfig(**config), TrainConfig(**training)) is counted


def test_the_usual_budget_is_none_where_it_is_not_possible() -> None:
    said: list[str] = []

    def impossible(text: str) -> str:
        raise ConfigError(f"not {text}")

    assert settled("usual", lambda text: text, said.append) == "10%" and not said
    assert settled("none", impossible, said.append) is None and settled(None, impossible, said.append) is None
    assert settled("usual", impossible, said.append) is None and "not 10%" in said[0]
    with pytest.raises(ConfigError, match="not 20%"):
        settled("20%", impossible, said.append)


class TestBadInput:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"budgets": ("10%", "5%", "10 %")}, "budget=10%, 5%, 10 %: one of them is there twice"),
            ({"budgets": ("0", "0%")}, "twice"), ({"windows": (64, 64)}, "window=64, 64: one"),
            ({"windows": (64, 0)}, "window=0: a row"), ({"at": -5}, "at=-5"), ({"context": 1}, "context=1"),
        ],
    )  # fmt: skip
    def test_tasks_that_would_fail_late(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            BudgetTask(**values)

    def test_too_little(self, model: Any, found: Sensitivity) -> None:
        with pytest.raises(ConfigError, match=r"a budget of 1% at 4,000 tokens is .* take .* MB \(\d+\.\d%\)"):
            chosen(model, found, "1%")

    def test_a_converted_model(self, found: Sensitivity) -> None:
        linear = convert(tiny("llama"), DarkConfig(num_features=4))
        with pytest.raises(ConversionError, match="converted already"):
            Chooser(linear, BATCHES, found, config=FORM)

    def test_text_shorter_than_any_window(self, model: Any, found: Sensitivity) -> None:
        with pytest.raises(InputError, match="no far field to cut"):
            Chooser(model, [tokens(1, 40)], found, config=FORM)


def test_wider_windows_go_where_they_gain_and_are_paid_for(model: Any, found: Sensitivity) -> None:
    chooser = Chooser(model, BATCHES, found, config=FORM, dtype="float32")
    config = replace(FORM, window=64, keep_exact=("0.0",))
    heads = [(layer, head) for layer in range(3) for head in range(2) if (layer, head) != (0, 0)]
    gains = {0: -3.0, 1: -1e-6, 2: -1e-6}  # of twice the window: only layer 0 gains anything

    def change(layer: int, head: int, window: int) -> WindowChange:
        return WindowChange(layer, head, window, gains[layer] if window == 128 else 1e-3 * (layer + 1), None)

    refined = chooser.refined(config, [change(*head, window) for head in heads for window in (32, 128)])
    assert dict(refined.layer_windows)[0] == 128 and set(dict(refined.layer_windows).values()) == {32, 128}
    assert chooser.bytes_of(refined, LENGTH) <= chooser.bytes_of(config, LENGTH)


def test_candidates_say_their_size_at_the_length_of_each_budget(model: Any, found: Sensitivity) -> None:
    budgets = [Budget.parse("40%", LENGTH), Budget.parse("40%", LENGTH + 100)]
    chooser = Chooser(model, BATCHES, found, config=FORM, dtype="float32", count_features=False)
    for choice in map(chooser.choose, budgets):
        assert choice.size in [row["size"] for row in choice.tried if row["window"] == choice.config.window]


class TestWhatChoosersRemember:
    """What was measured for one budget serves others only where it says something about their heads."""

    CONFIGS = tuple(
        replace(FORM, window=64, keep_exact=names) for names in (("0.0", "1.1", "2.0"), ("0.0",), ("0.0", "1.1"))
    )

    def _heads(self, chooser: Chooser, config: DarkConfig) -> set[str]:
        return {f"{change.layer}.{change.head}" for change in chooser._changes_at(config)}

    def test_every_head_that_is_not_exact_counts_and_no_other(self, model: Any, found: Sensitivity) -> None:
        chooser = Chooser(model, BATCHES, found, config=FORM, dtype="float32")
        every = {f"{layer}.{head}" for layer in range(3) for head in range(2)}
        for config in self.CONFIGS:
            assert self._heads(chooser, config) == every - set(config.keep_exact)

    def test_a_chooser_that_goes_on_uses_what_the_first_one_measured(
        self, model: Any, found: Sensitivity, tmp_path: Path
    ) -> None:
        first, second = (Chooser(model, BATCHES, found, config=FORM, dtype="float32", folder=tmp_path) for _ in "ab")
        _, few, more = self.CONFIGS
        first._changes_at(few)
        assert second._changes_at(more) == first._changes_at(more)
        fresh = Chooser(model, BATCHES, found, config=FORM, dtype="float32")
        assert fresh._changes_at(more) != first._changes_at(more)  # else this test shows nothing


def test_the_length_that_a_model_reads(model: Any) -> None:
    assert full_context(model) == model.config.max_position_embeddings


def test_a_context_beyond_learned_positions(model: Any) -> None:
    longer = 1 + full_context(model)
    check_context(model.config, longer)  # rotations have no end
    learned = tiny("gpt2")
    check_context(learned.config, full_context(learned))
    with pytest.raises(InputError, match=r"has positions for \d+ tokens. Give a smaller --context"):
        check_context(learned.config, 1 + full_context(learned))


class TestWithin:
    """Features beside a budget: only where they beat what their bytes buy, and only within the bytes."""

    FORM = DarkConfig(num_features=8, window=16, sinks=2, keep_exact=("0.0",))

    def _calibrated(self, limit: int | None) -> tuple[Any, list[Any]]:
        linear = converted(tiny("llama"), self.FORM)
        return linear, calibrate_within(
            linear, [tokens(2, 96), tokens(2, 96, seed=1)], limit, length=500, element_bytes=4
        )

    def test_features_that_a_wider_window_beats_are_off(self) -> None:
        linear, choices = self._calibrated(None)
        for choice in choices:
            for pays, error, wider in zip(choice.features, choice.error, choice.error_equal_bytes, strict=True):
                assert not pays or error < wider
        off = {f"{c.layer}.{h}" for c in choices for h, pays in zip(c.heads, c.features, strict=True) if not pays}
        names = linear.config.darkformer["no_features"]
        assert off == {
            f"{layer}.{g}" for layer in range(3) for g in range(2) if layer in names or f"{layer}.{g}" in names
        }

    def test_without_room_all_go(self) -> None:
        bare = replace(self.FORM, no_features=(0, 1, 2))
        linear = converted(tiny("llama"), bare)
        least = converted_bytes(linear, 500, 4)
        model, choices = self._calibrated(least)
        assert converted_bytes(model, 500, 4) <= least
        assert not any(pays for choice in choices for pays in choice.features)

    @pytest.mark.parametrize("changes", [{"drop_features": False}, {"cold_start": False, "far_bias": False}])
    def test_the_limit_holds_where_calibration_drops_or_measures_nothing(self, changes: dict[str, Any]) -> None:
        form = replace(self.FORM, **changes)
        bare = converted_bytes(converted(tiny("llama"), replace(form, no_features=(0, 1, 2))), 500, 4)
        linear = converted(tiny("llama"), form)
        one = 4 * 8 * (8 + 2)
        choices = calibrate_within(
            linear, [tokens(2, 96), tokens(2, 96, seed=1)], bare + one, length=500, element_bytes=4
        )
        assert bare <= converted_bytes(linear, 500, 4) <= bare + one
        off = {f"{c.layer}.{h}" for c in choices for h, pays in zip(c.heads, c.features, strict=True) if not pays}
        assert len(off) >= 4 or not choices

    def test_two_budgets_that_buy_the_same_keep_within_the_smaller(self) -> None:
        bare = converted_bytes(converted(tiny("llama"), replace(self.FORM, no_features=(0, 1, 2))), 500, 4)
        choices = [
            (text, Choice(self.FORM, bare, 10 * bare, 500)) for text in (f"{bare + 10}B", f"{9 * bare}B", "0")
        ]  # fmt: skip
        linear = converted(tiny("llama"), self.FORM)
        calibration(choices, [tokens(2, 96), tokens(2, 96, seed=1)], 4)(linear)
        assert converted_bytes(linear, 500, 4) <= bare + 10

    def test_a_wider_window_takes_as_many_bytes(self) -> None:
        fm = next(dark_layers(converted(tiny("llama"), self.FORM)))
        keys = keys_of_features(fm, key_bytes=4 * 16)
        one, other = replace(self.FORM, window=16 + keys, method="local"), self.FORM
        sizes = [state_bytes(form, num_kv_heads=1, head_dim=8) for form in (one, other)]
        assert 0 <= sizes[0] - sizes[1] < 4 * 16


def test_the_error_of_a_window_is_that_of_a_model_with_it() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 150, 8, generator=generator) for h in (4, 2, 2))
    probes = [
        SpreadProbe(q, k, v, None, 1.0, config=DarkConfig(window=window, sinks=2), queries=200) for window in (8, 40)
    ]
    wider, wanted = probes[0].errors_of_window(40, [probes[0].rows]), probes[1].errors_exact_part([probes[1].rows])
    assert torch.allclose(wider, wanted, rtol=1e-5)
    assert torch.allclose(
        probes[0].errors_of_window(8, [probes[0].rows]), probes[0].errors_exact_part([probes[0].rows]), rtol=1e-5
    )
