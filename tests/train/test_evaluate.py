"""Scores against a plain computation."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hf.families import linear, tiny, tokens

from darkformer import InputError, NonFiniteError
from darkformer.train.evaluate import PositionScore, Score, evaluate, position_buckets

BLOCKS = tokens(7, 24)


@torch.no_grad()
def _plainly(model: torch.nn.Module) -> tuple[float, float]:
    logits = model(BLOCKS).logits[:, :-1].double()
    target = BLOCKS[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return float(loss), float((logits.argmax(-1) == target).double().mean())


@pytest.mark.parametrize("make", [tiny, linear])
def test_a_plain_computation(make: object) -> None:
    model = make("llama")  # type: ignore[operator]
    with torch.no_grad():  # so that some next tokens are right
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))
    loss, accuracy = _plainly(model)
    score = evaluate(model, BLOCKS)
    assert score.loss == pytest.approx(loss, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert score.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert score.tokens == 7 * 23


def test_accuracy_of_a_model_that_knows() -> None:
    class Next(torch.nn.Module):
        """Predicts token + 1."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            logits = 50.0 * F.one_hot((input_ids + 1) % 99, 99).float() + self.weight
            return type("Output", (), {"logits": logits})

    blocks = torch.arange(40).view(2, 20)
    blocks[1, 10] = 0  # one wrong prediction here, and one from it
    score = evaluate(Next(), blocks)
    assert score.accuracy == pytest.approx(36 / 38)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    model = linear("llama")
    score, expected = evaluate(model, BLOCKS, batch_size=batch_size), evaluate(model, BLOCKS, batch_size=4)
    assert score.loss == pytest.approx(expected.loss, rel=1e-6)
    assert (score.accuracy, score.tokens) == (expected.accuracy, expected.tokens)


def test_bfloat16_is_near() -> None:
    model = linear("llama")
    score, expected = evaluate(model, BLOCKS, dtype="bfloat16"), evaluate(model, BLOCKS)
    assert score.loss != expected.loss
    assert score.loss == pytest.approx(expected.loss, rel=0.02)


def test_progress_and_mode() -> None:
    model, seen = linear("llama").train(), []
    evaluate(model, BLOCKS, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_diverged() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(NonFiniteError, match="the evaluation loss is nan"):
        evaluate(model, BLOCKS)


def test_the_mode_is_put_back_after_an_error() -> None:
    model = tiny("llama").train()

    def interrupt(done: int, total: int) -> None:
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, BLOCKS, progress=interrupt)
    assert model.training


@pytest.mark.parametrize("shape", [(0, 24), (3, 1)])
def test_nothing_to_predict(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="at least one block of two tokens"):
        evaluate(tiny("llama"), torch.zeros(shape, dtype=torch.int64))


def test_a_record_of_plain_values() -> None:
    score = Score(1.0, math.e, 0.5, 8, (PositionScore(1, 9, 1.0, 0.5, 8),))
    bucket = {"start": 1, "stop": 9, "loss": 1.0, "accuracy": 0.5, "tokens": 8}
    whole = {"loss": 1.0, "perplexity": math.e, "accuracy": 0.5, "tokens": 8}
    assert score.to_dict() == {**whole, "by_position": [bucket]} == json.loads(json.dumps(score.to_dict()))


@pytest.mark.parametrize(
    ("length", "expected"),
    [(2, [(1, 2)]), (64, [(1, 64)]), (65, [(1, 64), (64, 65)]), (256, [(1, 64), (64, 128), (128, 256)])],
)
def test_buckets_of_positions(length: int, expected: list[tuple[int, int]]) -> None:
    assert position_buckets(length) == expected


@pytest.mark.parametrize("batch_size", [None, 2])
@torch.no_grad()
def test_positions_against_a_plain_computation(batch_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkformer.train.evaluate.NUMBERS_AT_ONCE", 37)  # a row is computed in parts
    model, blocks = linear("llama"), tokens(3, 150)
    score = evaluate(model, blocks, batch_size=batch_size)
    logits, target = model(blocks).logits[:, :-1], blocks[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    right = (logits.argmax(-1) == target).float()
    assert [(bucket.start, bucket.stop) for bucket in score.by_position] == [(1, 64), (64, 128), (128, 150)]
    for start, stop, loss, accuracy, count in score.by_position:
        places = slice(start - 1, stop - 1)  # logits of position t predict token t + 1
        assert loss == pytest.approx(float(losses[:, places].mean()), rel=1e-5)
        assert accuracy == pytest.approx(float(right[:, places].mean()), abs=1e-6) and count == 3 * (stop - start)
    assert sum(bucket.tokens for bucket in score.by_position) == score.tokens
    means = sum(bucket.loss * bucket.tokens for bucket in score.by_position) / score.tokens
    assert means == pytest.approx(score.loss, rel=1e-12)


def test_batches_are_bounded_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkformer.train.evaluate.TOKENS_AT_ONCE", 50)
    seen: list[tuple[int, int]] = []
    evaluate(tiny("llama"), BLOCKS, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)  # two blocks of 24 at a time
    evaluate(tiny("llama"), tokens(2, 60), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2, 2)  # a block is never cut
