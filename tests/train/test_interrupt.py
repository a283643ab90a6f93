"""A run that is interrupted and resumed is the uninterrupted run; a run that diverges leaves its last checkpoint."""

import json
import math
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.families import DARK, linear, tiny, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from darkformer import DarkConfig, NonFiniteError, RunFolderError, TrainConfig, finetune
from darkformer.train.finetune import Interrupted

BLOCKS = tokens(12, 24)
LFK = DarkConfig(method="lfk", num_features=16, window=4, sinks=2)


def _budget(**changes: object) -> TrainConfig:
    options: dict[str, object] = dict(
        steps=8, warmup=2, seq_len=24, batch_size=2, dtype="float32", lr=3e-3, geometry_lr=3e-3, save_every=100
    )
    return TrainConfig(**{**options, **changes})  # type: ignore[arg-type]


def _at(step: int, action: Callable[[], None]) -> Callable[[int, float], None]:
    return lambda now, loss: action() if now == step else None


def _control_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _same_weights(model: PreTrainedModel, expected: PreTrainedModel) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], x) for name, x in expected.state_dict().items())


class TestResume:
    @pytest.mark.parametrize(
        ("config", "changes"),
        [
            (DARK, {}),
            (DARK, {"train": "geometry"}),
            (LFK, {"train": "qkv", "dtype": "bfloat16"}),
            (DARK, {"steps": 14}),  # more than an epoch: the order of the second one counts as well
        ],
        ids=["all", "geometry", "lfk qkv bfloat16", "two epochs"],
    )
    def test_is_the_uninterrupted_run(self, config: DarkConfig, changes: dict[str, object], tmp_path: Path) -> None:
        budget, whole = _budget(**changes), linear("llama", config)
        expected = finetune(whole, BLOCKS, budget, tmp_path / "whole")
        first: list[float] = []

        def on_step(step: int, loss: float) -> None:
            first.append(loss)
            if step == 3:
                _control_c()

        with pytest.raises(Interrupted, match=rf"interrupted at step 4 of {budget.steps}; resume continues there"):
            finetune(linear("llama", config), BLOCKS, budget, tmp_path / "cut", on_step=on_step)
        resumed = linear("llama", config)  # as a new process would build it
        rest = finetune(resumed, BLOCKS, budget, tmp_path / "cut", resume=True)
        assert first == pytest.approx(expected[:4], rel=1e-6)
        assert rest == pytest.approx(expected, rel=1e-6)  # the steps before the interruption included
        assert _same_weights(resumed, whole)

    def test_twice_interrupted(self, tmp_path: Path) -> None:
        whole = linear("llama")
        expected = finetune(whole, BLOCKS, _budget(), tmp_path / "whole")
        for step in (1, 4):
            with pytest.raises(Interrupted):
                finetune(
                    linear("llama"), BLOCKS, _budget(), tmp_path / "cut", resume=True, on_step=_at(step, _control_c)
                )
        resumed = linear("llama")
        assert finetune(resumed, BLOCKS, _budget(), tmp_path / "cut", resume=True) == expected
        assert _same_weights(resumed, whole)

    def test_after_a_kill_it_goes_on_at_the_last_checkpoint(self, tmp_path: Path) -> None:
        whole = linear("llama")
        expected = finetune(whole, BLOCKS, _budget(save_every=2), tmp_path / "whole")

        def die() -> None:
            raise MemoryError

        with pytest.raises(MemoryError):
            finetune(linear("llama"), BLOCKS, _budget(save_every=2), tmp_path / "cut", on_step=_at(5, die))
        resumed = linear("llama")
        assert finetune(resumed, BLOCKS, _budget(save_every=2), tmp_path / "cut", resume=True) == expected
        assert _same_weights(resumed, whole)

    @pytest.mark.parametrize("damage", ["missing", "cut short", "of another step", "of another type"])
    def test_a_checkpoint_that_a_kill_cut_short_is_not_taken(self, damage: str, tmp_path: Path) -> None:
        whole = linear("llama")
        expected = finetune(whole, BLOCKS, _budget(save_every=2), tmp_path / "whole")

        def die() -> None:
            raise MemoryError

        with pytest.raises(MemoryError):
            finetune(linear("llama"), BLOCKS, _budget(save_every=2), tmp_path / "cut", on_step=_at(7, die))
        state = tmp_path / "cut" / "checkpoint-6" / "trainer_state.json"  # Trainer writes it last
        if damage == "missing":
            state.unlink()
        elif damage == "cut short":
            state.write_text(state.read_text()[:100])
        else:  # it would skip the training that is left
            step = 10**9 if damage == "of another step" else "6"
            state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": step}))
        resumed = linear("llama")
        assert finetune(resumed, BLOCKS, _budget(save_every=2), tmp_path / "cut", resume=True) == expected
        assert _same_weights(resumed, whole)

    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
    def test_a_checkpoint_with_a_damaged_file(self, name: str, tmp_path: Path) -> None:
        class Opener:
            def __reduce__(self) -> tuple[Any, ...]:
                return open, (str(tmp_path / "ran"), "w")

        with pytest.raises(Interrupted):
            finetune(linear("llama"), BLOCKS, _budget(save_every=2), tmp_path / "cut", on_step=_at(4, _control_c))
        file = max((tmp_path / "cut").glob("checkpoint-*")) / name
        assert file.is_file()
        for content in (b"", pickle.dumps(Opener())):
            file.write_bytes(content)
            with pytest.raises(RunFolderError, match=r"checkpoint-\d is damaged: delete it"):
                finetune(linear("llama"), BLOCKS, _budget(save_every=2), tmp_path / "cut", resume=True)
        assert not (tmp_path / "ran").exists()

    def test_a_finished_run_takes_no_more_steps(self, tmp_path: Path) -> None:
        whole, again = linear("llama"), linear("llama")
        expected = finetune(whole, BLOCKS, _budget(save_every=4), tmp_path)
        assert finetune(again, BLOCKS, _budget(save_every=4), tmp_path, resume=True) == expected
        assert _same_weights(again, whole)
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]

    def test_only_the_asked_for_checkpoints_are_written(self, tmp_path: Path) -> None:
        finetune(linear("llama"), BLOCKS, _budget(save_every=5), tmp_path)
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]

    def test_without_a_checkpoint_it_starts(self, tmp_path: Path) -> None:
        expected = finetune(linear("llama"), BLOCKS, _budget(), tmp_path / "a")
        assert finetune(linear("llama"), BLOCKS, _budget(), tmp_path / "b", resume=True) == expected


class TestControlC:
    def test_in_the_last_step_it_is_not_lost(self, tmp_path: Path) -> None:
        # Too late to stop anything, but the caller must hear of it, and no step may be repeated.
        whole, resumed = linear("llama"), linear("llama")
        expected = finetune(whole, BLOCKS, _budget(), tmp_path / "whole")
        with pytest.raises(Interrupted, match="interrupted at step 8 of 8"):
            finetune(linear("llama"), BLOCKS, _budget(), tmp_path / "cut", on_step=_at(8, _control_c))
        assert finetune(resumed, BLOCKS, _budget(), tmp_path / "cut", resume=True) == expected
        assert _same_weights(resumed, whole)

    def test_the_second_one_does_not_wait(self, tmp_path: Path) -> None:
        def impatient() -> None:
            _control_c()
            _control_c()

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            handler, model = signal.getsignal(signal.SIGINT), linear("llama")
            with pytest.raises(KeyboardInterrupt) as caught:
                finetune(model, BLOCKS, _budget(train="geometry"), tmp_path, on_step=_at(2, impatient))
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)
        assert not isinstance(caught.value, Interrupted)
        assert not list(tmp_path.glob("checkpoint-*"))
        assert all(p.requires_grad for p in model.parameters())

    def test_the_handler_is_put_back(self, tmp_path: Path) -> None:
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(Interrupted):
            finetune(linear("llama"), BLOCKS, _budget(), tmp_path, on_step=_at(2, _control_c))
        assert signal.getsignal(signal.SIGINT) is handler


class TestDivergence:
    """The message names the step, the layer where there is one, and a checkpoint whose weights are finite."""

    @staticmethod
    def _check(folder: Path, kept: int) -> None:
        names = sorted(path.name for path in folder.glob("checkpoint-*"))
        assert names[-1] == f"checkpoint-{kept}"
        loaded = AutoModelForCausalLM.from_pretrained(folder / names[-1])
        assert all(bool(torch.isfinite(p).all()) for p in loaded.parameters())

    def test_in_attention(self, tmp_path: Path) -> None:
        model = linear("llama")

        def poison() -> None:
            model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = math.nan

        with pytest.raises(NonFiniteError, match=r"step 6: layer 1: key hold NaN.*last good checkpoint is .*-4\)"):
            finetune(model, BLOCKS, _budget(save_every=2), tmp_path, on_step=_at(5, poison))
        self._check(tmp_path, kept=4)

    def test_of_the_feature_map(self, tmp_path: Path) -> None:
        model = linear("llama")

        def poison() -> None:
            model.model.layers[2].self_attn.dark.geometry.data[0, 0] = math.nan

        with pytest.raises(NonFiniteError, match=r"step 4: layer 2: .*feature map's parameters .*checkpoint-2"):
            finetune(model, BLOCKS, _budget(save_every=2), tmp_path, on_step=_at(3, poison))
        self._check(tmp_path, kept=2)

    def test_of_the_loss(self, tmp_path: Path) -> None:
        model = linear("llama")

        def poison() -> None:
            model.lm_head.weight.data[0, 0] = math.nan

        with pytest.raises(NonFiniteError, match=r"step 4: the loss is nan; the last good checkpoint is .*-2\."):
            finetune(model, BLOCKS, _budget(save_every=2), tmp_path, on_step=_at(3, poison))
        self._check(tmp_path, kept=2)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_of_a_gradient(self, value: float, tmp_path: Path) -> None:
        # The loss of that step is still finite. Were the step taken, the checkpoint after it would hold NaN.
        model, calls = linear("llama"), []
        weight = model.model.layers[0].mlp.up_proj.weight

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return gradient * value if len(calls) == 4 else gradient

        weight.register_hook(spoil)
        with pytest.raises(NonFiniteError, match=r"step 4: the gradient of .*up_proj\.weight holds NaN.*-2"):
            finetune(model, BLOCKS, _budget(save_every=2), tmp_path)
        self._check(tmp_path, kept=2)

    def test_before_any_checkpoint(self, tmp_path: Path) -> None:
        model = tiny("llama")
        with torch.no_grad():
            model.lm_head.weight.fill_(math.nan)
        with pytest.raises(NonFiniteError, match="step 1: the loss is nan; no checkpoint had been written"):
            finetune(model, BLOCKS, _budget(), tmp_path)
        assert all(p.requires_grad for p in model.parameters())


def test_a_folder_with_another_runs_checkpoints_is_refused(tmp_path: Path) -> None:
    finetune(linear("llama"), BLOCKS, _budget(save_every=4), tmp_path)
    model = linear("llama")
    with pytest.raises(RunFolderError, match=r"holds checkpoint-8 of another run: resume=True continues it"):
        finetune(model, BLOCKS, _budget(save_every=4), tmp_path)
    assert _same_weights(model, linear("llama"))
