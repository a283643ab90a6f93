"""What heads lose without their far field: three ways to measure it, against brute force."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf.families import FAMILIES
from torch import Tensor

import darkformer
from darkformer import ConfigError, ConversionError, DarkConfig, InputError, RunFolderError
from darkformer.calibration.measure import Measure
from darkformer.calibration.mixed import EXACT, MixedAttention
from darkformer.calibration.rows import IGNORED, Rows, recall_rows, row_losses, text_rows
from darkformer.calibration.sensitivity import FILE, METHODS, Sensitivity, sensitivity
from darkformer.calibration.window_changes import window_changes
from darkformer.hf.interface import attending, receive, softmax_of
from darkformer.hf.trial import implementation

WINDOW, SINKS, LENGTH = 8, 2, 40


class Letters:
    """A tokenizer with one token a character."""

    bos_token_id = 1

    prefix: tuple[int, ...] = ()

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=[*self.prefix * add_special_tokens, *(2 + ord(c) % 90 for c in text)])


@pytest.mark.parametrize("prefix", [(), (1,), (0, 1)], ids=["none", "one", "two"])
def test_numbers_are_told_in_text_that_begins_once(prefix: tuple[int, ...]) -> None:
    """Rows that begin as the tokenizer begins a text: of one row prompts of its length can be made."""
    tokenizer, context = Letters(), 400
    tokenizer.prefix = prefix
    text = ids(2, context)
    text = torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(2, -1), text.clamp_min(2)], dim=1)[:, :context]
    start = list(prefix) or [1]
    for rows in (text[:1], text):
        told = recall_rows(tokenizer, text_rows([rows]), context, 3)
        assert told.ids.shape == (3, context)
        assert told.ids[:, : len(start)].tolist() == [start] * 3 and bool((told.ids[:, len(start) :] > 1).all())


def build(family: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family].build().to(dtype).eval()


def ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(2, 99, (rows, length), generator=torch.Generator().manual_seed(1))


def cut_by_hand(model: Any, layer: int, head: int, batch: Tensor) -> float:
    """Loss of text when one kv head sees window and sinks only, by a dense mask and whole runs."""
    place = torch.arange(batch.shape[1])
    seen = (place[:, None] - place < WINDOW) | (place < SINKS)
    seen &= place <= place[:, None]

    def substitute(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        extra = {name: x for name, x in kwargs.items() if name not in ("scaling", "dropout")}
        received = receive(module, query, key, value, mask, kwargs["scaling"], extra, causal_by_mask=False)
        output = softmax_of(received)[0]
        if module.layer_idx == layer:
            repeats = query.shape[1] // key.shape[1]
            for h in range(head * repeats, (head + 1) * repeats):
                logits = query[:, h] @ key[:, head].mT * kwargs["scaling"]
                output[:, h] = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value[:, head]
        return output.transpose(1, 2), None

    with torch.no_grad(), implementation(model), attending(substitute):
        logits = model(input_ids=batch).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()))


def measure_of(model: Any, rows: Rows) -> Measure:
    for x in model.parameters():
        x.requires_grad_(False)
    return Measure(model, MixedAttention(model, SINKS), {"text": rows}, "float32")


def test_ablation_is_brute_force() -> None:
    model, batch = build(), ids()
    found = sensitivity(model, [batch], method="ablation", window=WINDOW, sinks=SINKS, dtype="float32")
    with torch.no_grad():
        whole = float(F.cross_entropy(model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()))
    assert found.exact["text"] == pytest.approx(whole, rel=1e-9)
    assert [(row.layer, row.head) for row in found.rows] == [(layer, g) for layer in range(3) for g in range(2)]
    for row in found.rows:
        assert row.text == pytest.approx(cut_by_hand(model, row.layer, row.head, batch) - whole, abs=1e-9)
        assert row.recall is None


def test_layers_below_are_skipped_and_that_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    measure = measure_of(model, text_rows([ids(1)]))
    assert measure.blocks is not None
    with torch.no_grad(), measure.mixed.active():
        assert measure._reusing_lower_layers(measure.rows["text"]) is not None
    fast = list(measure.ablated(WINDOW, measure.rows["text"]))
    measure.blocks = None
    slow = list(measure.ablated(WINDOW, measure.rows["text"]))
    assert torch.allclose(torch.tensor(fast), torch.tensor(slow), rtol=1e-12)
    assert not any("forward" in m.__dict__ for m in model.modules())  # nothing stays behind


@pytest.mark.parametrize("at", [0.0, 0.5])
def test_slopes_are_finite_differences(at: float) -> None:
    model, rows = build(), text_rows([ids(1)])
    measure = measure_of(model, rows)
    mixed, heads = measure.mixed, measure.mixed.heads
    exact = [[EXACT] * 2 for _ in mixed.layers]
    slopes = measure.slopes("text", exact, {WINDOW: heads}, at=at)[WINDOW]

    def loss(gates: Tensor) -> float:
        mixed.reset(exact)
        for state, gate in zip(mixed.states, gates, strict=True):
            state.others[WINDOW], state.gates[WINDOW] = [0, 1], gate
        with torch.no_grad(), mixed.active():
            return float(row_losses(model, rows, "float32").sum()) / rows.count

    step = 5e-3  # the norms of Llama compute in float32 whatever the model's dtype
    for n, (layer, g) in enumerate(heads):
        around = torch.full((2, len(mixed.layers), 2), at, dtype=torch.float64)
        around[0, layer, g] -= step
        around[1, layer, g] += step
        low, high = map(loss, around)
        assert slopes[n] == pytest.approx((high - low) / (2 * step), rel=1e-2, abs=1e-5)


def test_slopes_of_several_windows_at_a_mixed_state() -> None:
    """Heads that are cut already, and gates to several windows: each as if it stood alone."""
    model, rows = build(), text_rows([ids(1)])
    measure = measure_of(model, rows)
    state = [[EXACT, 8], [16, 8], [EXACT, EXACT]]
    others = {4: [(0, 1), (1, 0)], EXACT: [(1, 0), (1, 1)]}
    together = measure.slopes("text", state, others, at=0.0)
    for window, heads in others.items():
        for n, head in enumerate(heads):
            alone = measure.slopes("text", state, {window: [head]}, at=0.0)[window]
            assert float(alone) == pytest.approx(float(together[window][n]), rel=1e-9)


def test_windows_of_a_mixed_model_and_padding() -> None:
    """Pads anywhere change nothing, and the cut heads see real tokens."""
    model, batch = build(), ids(1)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), batch], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 7)[None]
    losses = []
    for given in (batch, {"input_ids": padded, "attention_mask": mask.long()}):
        measure = measure_of(model, text_rows([given]))
        losses.append(measure.losses([[EXACT, 8], [4, 8], [EXACT, 16]])["text"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, tmp_path: Path) -> None:
    model, options = build(dtype=torch.float32), dict(window=WINDOW, sinks=SINKS, dtype="float32", method=method)
    seen: list[tuple[int, int]] = []
    batch = ids(3, 400)
    found = sensitivity(
        model, [batch], tokenizer=Letters(), prompts=2, folder=tmp_path, **options,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert sorted(found.order) == [(layer, g) for layer in range(3) for g in range(2)]
    assert all(row.recall is not None for row in found.rows)
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    assert Sensitivity.from_dict(found.to_dict()) == found
    again = sensitivity(model, [batch], tokenizer=Letters(), prompts=2, **options)
    assert again == found  # deterministic, and the same with a folder as without
    assert all(x.requires_grad for x in model.parameters())
    kept = sensitivity(model, [batch], tokenizer=Letters(), prompts=2, folder=tmp_path, **options)
    assert kept == found


@pytest.mark.parametrize("method", METHODS)
def test_it_goes_on_where_it_stopped(method: str, tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    options: dict[str, Any] = dict(window=WINDOW, sinks=SINKS, dtype="float32", method=method)
    whole = sensitivity(model, [ids()], **options)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, [ids()], folder=tmp_path, progress=stop, **options)
    assert (tmp_path / FILE).is_file()
    steps: list[int] = []
    rest = sensitivity(
        model, [ids()], folder=tmp_path, progress=lambda done, total: steps.append(done), **options
    )  # fmt: skip
    assert rest == whole and steps[0] == 3
    with pytest.raises(RunFolderError, match="another rows"):
        sensitivity(model, [ids(3)], folder=tmp_path, **options)
    for content in ("[]", "3", "{}", (tmp_path / FILE).read_text().replace("0.", "1.", 1)):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(RunFolderError, match="it was altered"):
            sensitivity(model, [ids()], folder=tmp_path, **options)


def test_window_changes() -> None:
    """At a state with exact heads and a window a layer: the slopes of that state, by layer and head."""
    model, batch = build(), ids()
    options: dict[str, Any] = dict(exact=[(0, 1)], windows={0: 8, 1: 8, 2: 16}, sinks=SINKS, dtype="float32")
    seen: list[tuple[int, int]] = []
    found = window_changes(
        model, [batch], others=[16, EXACT], progress=lambda done, total: seen.append((done, total)), **options
    )  # fmt: skip
    assert seen == [(n + 1, 4) for n in range(4)]
    rest = [(layer, g) for layer in range(3) for g in range(2) if (layer, g) != (0, 1)]
    assert [(x.layer, x.head, x.window) for x in found] == [
        *((layer, g, 16) for layer, g in rest if layer != 2), *((layer, g, EXACT) for layer, g in rest)
    ]  # fmt: skip
    measure = measure_of(model, text_rows([batch]))
    expected = measure.slopes("text", [[8, EXACT], [8, 8], [16, 16]], {EXACT: rest}, at=0.5)[EXACT]
    assert [x.text for x in found if x.window == EXACT] == pytest.approx(
        expected.tolist(), rel=1e-6
    )  # gates are float32
    with pytest.raises(ConfigError, match=r"3\.0, which is no kv head"):
        window_changes(model, [batch], others=[16], **options | dict(exact=[(3, 0)]))
    with pytest.raises(ConfigError, match="no entry for layer 2"):
        window_changes(model, [batch], others=[16], **options | dict(windows={0: 8, 1: 8}))


def test_sliding_layers_are_left_out() -> None:
    found = sensitivity(build("gemma3"), [ids()], method="ablation", window=WINDOW, sinks=SINKS, dtype="float32")
    assert {row.layer for row in found.rows} == {2}


def test_recall_prompts() -> None:
    text = text_rows([ids(4, 600)])
    rows = recall_rows(Letters(), text, 900, 3, seed=5)
    assert rows.ids.shape == (3, 900) and bool((rows.ids[:, 0] == 1).all())
    asked = rows.labels != IGNORED
    assert bool((rows.labels[asked] == rows.ids[asked]).all())
    told = set()
    for row, label in zip(rows.ids.tolist(), rows.labels.tolist(), strict=True):
        number = [t for t in label if t != IGNORED][:6]  # the first number that is asked for: a space and its digits
        starts = [i for i in range(len(row) - 5) if row[i : i + 6] == number]
        assert len(starts) == 2  # told once, asked for once
        told.add(starts[1] - starts[0])
    assert len(told) == 3
    assert torch.equal(rows.ids, recall_rows(Letters(), text, 900, 3, seed=5).ids)
    assert not torch.equal(rows.ids, recall_rows(Letters(), text, 900, 3, seed=6).ids)


def test_bad_input() -> None:
    model = build(dtype=torch.float32)
    with pytest.raises(InputError, match="no far field to cut"):
        sensitivity(model, [ids(2, 10)], window=WINDOW, sinks=SINKS)
    with pytest.raises(InputError, match="no batches"):
        sensitivity(model, [])
    with pytest.raises(InputError, match="one length"):
        sensitivity(model, [ids(), ids(2, 30)], window=WINDOW)
    with pytest.raises(InputError, match="the text has 80 tokens, prompts of 900"):
        sensitivity(model, [ids()], window=WINDOW, tokenizer=Letters(), context=900)
    with pytest.raises(ConfigError, match="choose one of"):
        sensitivity(model, [ids()], method="guess")
    darkformer.convert(model, DarkConfig(num_features=16, window=4, sinks=2))
    with pytest.raises(ConversionError, match=r"darkformer\.revert"):
        sensitivity(model, [ids()], window=WINDOW)
