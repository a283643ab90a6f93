"""Many sequences in the slots of a pool: each gets the numbers of a call of its own, whatever its neighbours do."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from tolerances import AGAINST_FLOAT64, OUTPUT, relative_error
from torch import Tensor

from darkformer import DarkConfig, attention
from darkformer.ops.slots import SlotAttention, slot_words

from .cases import NATIVE_REASON, Case, make_map

SLOTS = 7
CASES = [
    Case(window=window, sinks=sinks, kv_heads=kv_heads, softcap=softcap, method=method, **sizes)
    for window, sinks, kv_heads, softcap, method, sizes in [
        (0, 0, 2, None, "dark", {}),
        (5, 3, 2, None, "dark", {"dim": 20, "features": 20}),
        (1, 0, 6, None, "performer", {}),
        (16, 4, 1, 0.7, "dark", {"dim": 32, "features": 33}),
        (6, 2, 2, None, "local", {}),
        (4, 1, 2, None, "random", {}),
    ]
]
BACKENDS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(NATIVE_REASON is not None, reason=f"native: {NATIVE_REASON}")),
]


@dataclass(eq=False)
class Sequence:
    """One request: its inputs (L, heads, d), how much of it was read, and what came out."""

    query: Tensor
    key: Tensor
    value: Tensor
    slot: int
    read: int = 0
    outputs: tuple[Tensor, ...] = ()

    def piece(self, length: int) -> list[Tensor]:
        return [x[self.read : self.read + length] for x in (self.query, self.key, self.value)]

    def took(self, output: Tensor) -> None:
        self.outputs = (*self.outputs, output)
        self.read += len(output)


def make_sequence(case: Case, length: int, slot: int, dtype: torch.dtype) -> Sequence:
    heads = (case.heads, case.kv_heads, case.kv_heads)
    return Sequence(*(torch.randn(length, n, case.dim).to(dtype) for n in heads), slot=slot)


def expected(case: Case, sequence: Sequence) -> Tensor:
    """(L, H, d) of the quadratic definition in float64."""
    inputs = [x.double().transpose(0, 1)[None] for x in (sequence.query, sequence.key, sequence.value)]
    output = attention(*inputs, make_map(case).float().double(), softcap=case.softcap, backend="reference")
    assert isinstance(output, Tensor)
    return output[0].transpose(0, 1)


def make_slots(case: Case, dtype: torch.dtype, backend: str, begin: int = 0) -> tuple[SlotAttention, Tensor]:
    """The attention, and a pool whose memory holds NaN from whoever had it before."""
    made = make_map(case).float()
    slots = SlotAttention(made, dtype=dtype, scaling=case.dim**-0.5, softcap=case.softcap, begin=begin)
    if backend == "torch":
        slots.__dict__["_compiled"] = None
    pool = torch.full((SLOTS, begin + slots.words + 32), torch.nan)
    return slots, pool


def step(slots: SlotAttention, pool: Tensor, sequences: list[Sequence]) -> None:
    """One token of each sequence."""
    places = torch.tensor([s.slot for s in sequences])
    positions = torch.tensor([s.read for s in sequences])
    tokens = [torch.cat(x) for x in zip(*(s.piece(1) for s in sequences), strict=True)]
    for sequence, output in zip(sequences, slots.step(pool, places, positions, *tokens), strict=True):
        sequence.took(output[None])


def extend(slots: SlotAttention, pool: Tensor, sequence: Sequence, length: int) -> None:
    sequence.took(slots.extend(pool, torch.tensor(sequence.slot), sequence.read, *sequence.piece(length)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_schedule_is_the_reference(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Sequences that come, grow in pieces of any size beside each other, end, and leave their slots to others."""
    chance = random.Random(0)
    slots, pool = make_slots(case, dtype, backend, begin=16)
    pool = pool[::2]  # rows that do not lie side by side
    running: list[Sequence] = []
    ended = []
    for length in (1, 40, 2, 33, 7, 21):
        free = next(i for i in range(len(pool)) if i not in [s.slot for s in running])
        running.append(make_sequence(case, length, free, dtype))
        for _ in range(12):
            decoding = [s for s in running if chance.random() < 0.7 and s.read < len(s.query)]
            if decoding:
                step(slots, pool, decoding)
            for sequence in running:
                left = len(sequence.query) - sequence.read
                if sequence not in decoding and left and chance.random() < 0.3:
                    extend(slots, pool, sequence, min(left, chance.choice((1, 3, 9))))
            ended += [s for s in running if s.read == len(s.query)]
            running = [s for s in running if s.read < len(s.query)]
        if len(running) == len(pool):
            ended.append(running.pop(0))  # aborted: what came out so far must be right
    limit = (AGAINST_FLOAT64 if dtype == torch.float32 else OUTPUT)[dtype]
    assert len(ended) >= 3 and max(len(s.query) for s in ended) == 40
    for sequence in ended:
        output = torch.cat(sequence.outputs)
        assert output.dtype == dtype
        assert relative_error(output, expected(case, sequence)[: len(output)]) <= limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_is_all_there_is(backend: str) -> None:
    """A copy of a slot is a copy of the sequence: prefix caching copies rows of the pool."""
    case = CASES[1]
    slots, pool = make_slots(case, torch.float32, backend)
    first = make_sequence(case, 30, 2, torch.float32)
    extend(slots, pool, first, 20)
    pool[5] = pool[2]
    second = Sequence(first.query, first.key, first.value, slot=5, read=20)
    for _ in range(10):
        step(slots, pool, [second, first])
    assert torch.equal(torch.cat(second.outputs), torch.cat(first.outputs)[20:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_written_elsewhere(backend: str) -> None:
    case = CASES[3]
    slots, pool = make_slots(case, torch.bfloat16, backend, begin=48)
    pool.fill_(7)
    sequence = make_sequence(case, 12, 3, torch.bfloat16)
    extend(slots, pool, sequence, 9)
    step(slots, pool, [sequence])
    own = torch.zeros(pool.shape, dtype=torch.bool)
    own[3, 48 : 48 + slots.words] = True
    assert bool((pool[~own] == 7).all()) and bool((pool[own] != 7).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 6], ids=["step", "piece"])
def test_one_request_with_nan_spoils_no_other(backend: str, length: int) -> None:
    case = CASES[1]
    slots, pool = make_slots(case, torch.float32, backend)
    good, bad = make_sequence(case, 20, 1, torch.float32), make_sequence(case, 20, 4, torch.float32)
    bad.key[8:] = torch.nan
    for sequence in (good, bad):
        extend(slots, pool, sequence, 8)
    if length == 1:
        step(slots, pool, [bad, good])
    else:
        extend(slots, pool, bad, length)
        extend(slots, pool, good, length)
    limit = AGAINST_FLOAT64[torch.float32]
    assert bool(bad.outputs[-1].isnan().any())
    assert relative_error(torch.cat(good.outputs), expected(case, good)[: good.read]) <= limit
    # Who comes next finds an ordinary slot.
    after = make_sequence(case, 5, 4, torch.float32)
    step(slots, pool, [after])
    assert relative_error(torch.cat(after.outputs), expected(case, after)[:1]) <= limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_first_token_hides_the_slots_last_request(backend: str) -> None:
    case, answers = CASES[1], []
    own = make_sequence(case, 4, 4, torch.float32)
    own.key[0] = torch.nan
    for left_behind in (0.0, 2.0):
        slots, pool = make_slots(case, torch.float32, backend)
        pool.fill_(left_behind)
        sequence = Sequence(own.query, own.key, own.value, own.slot)
        for _ in range(4):
            step(slots, pool, [sequence])
        answers.append(torch.cat(sequence.outputs))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0, equal_nan=True)


def test_a_slot_has_the_size_of_its_state() -> None:
    """m·(d + 2) float32 numbers a head for sums and (window + sinks)·2d of the keys' dtype, in whole cache lines."""
    config = DarkConfig(num_features=128, window=64, sinks=4)
    words = slot_words(config, num_kv_heads=3, head_dim=64, dtype=torch.bfloat16)
    assert 4 * words == 3 * (128 * 66 * 4 + 68 * 128 * 2)
    odd = DarkConfig(num_features=5, window=3, sinks=1)
    assert slot_words(odd, num_kv_heads=1, head_dim=6, dtype=torch.bfloat16) == 128
