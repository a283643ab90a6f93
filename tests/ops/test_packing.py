"""Packed documents are what they are alone, in output and every gradient, and inputs that cannot say are refused."""

import pytest
import torch
from tolerances import PARITY, relative_error
from torch import Tensor

from darkformer import DarkConfig, FeatureMap, InputError, attention, feature_map
from darkformer.ops.packing import unpack

LENGTHS = [[7, 1, 12, 3], [5, 5, 13]]  # two rows of 23 tokens, ragged in different ways


def _numbers() -> Tensor:
    """The documents' numbers, with gaps between them: only rising counts."""
    rows = [torch.arange(len(row)).mul(3).repeat_interleave(torch.tensor(row)) for row in LENGTHS]
    return torch.stack(rows)


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 4, 23, 8), (2, 2, 23, 8), (2, 2, 23, 5)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def _map(method: str) -> FeatureMap:
    config = DarkConfig(method=method, num_features=8, window=3, sinks=2)
    return feature_map(config, num_heads=4, num_kv_heads=2, head_dim=8).double()


def _gradients(output: Tensor, made: FeatureMap, inputs: list[Tensor]) -> dict[str, Tensor]:
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    found = {"output": output.detach()} | {n: x.grad for n, x in zip("qkv", inputs, strict=True)}
    return found | {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("masked", [False, True], ids=["all real", "pads inside"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("method", ["dark", "exact"])
def test_documents_are_separate(method: str, backend: str, causal: bool, masked: bool) -> None:
    mask = torch.ones(2, 23, dtype=torch.bool)
    if masked:
        mask[0, 5:9] = mask[1, 20:] = False
    options = dict(is_causal=causal, backend=backend)
    made, inputs = _map(method), _inputs()
    packed = attention(*inputs, made, documents=_numbers(), key_mask=mask, **options)
    found = _gradients(packed, made, inputs)

    made, inputs = _map(method), _inputs()
    rows = []
    for b, lengths in enumerate(LENGTHS):
        pieces, start = [], 0
        for length in lengths:
            span = slice(start, start + length)
            alone = [x[b : b + 1, :, span] for x in inputs]
            pieces.append(attention(*alone, made, key_mask=mask[b : b + 1, span], **options))
            start += length
        rows.append(torch.cat(pieces, dim=2))
    wanted = _gradients(torch.cat(rows), made, inputs)
    errors = {name: relative_error(found[name], wanted[name], 1e-3) for name in wanted}
    assert found.keys() == wanted.keys()
    assert max(errors.values()) <= PARITY, errors
    if masked:
        assert all(found[name][0, :, 5:9].abs().max() == 0 for name in "qkv")


def test_packing_matters() -> None:
    inputs, made = _inputs(), _map("dark")
    together = attention(*inputs, made)
    apart = attention(*inputs, made, documents=_numbers())
    assert relative_error(together[0, :, :7], apart[0, :, :7]) <= PARITY
    assert relative_error(together[0, :, 12:], apart[0, :, 12:]) > 1e-2


def test_one_long_document_does_not_pad_the_short_ones() -> None:
    # 1,024 tokens in one document and 1,024 documents of one token: a table of all would have 1,025 x 1,024 places.
    numbers = torch.cat([torch.zeros(1024, dtype=torch.int64), torch.arange(1, 1025)])[None]
    assert sum(group.valid.numel() for group in unpack(numbers)) <= 2 * 2048


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (torch.zeros(2, 22, dtype=torch.int64), r"documents \(2, 22\): must be \(batch, tokens\) = \(2, 23\)"),
        (torch.zeros(2, 23), "give integers"),
        (torch.zeros(2, 23, dtype=torch.bool), "give integers"),
        (torch.tensor([0] * 9 + [1] * 9 + [0] * 5).expand(2, -1), "falls along a row"),
    ],
    ids=["shape", "floats", "booleans", "a number that returns"],
)
def test_what_does_not_name_documents(documents: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attention(*_inputs(), _map("dark"), documents=documents)


def test_no_states() -> None:
    with pytest.raises(InputError, match="packed documents take and return no state"):
        attention(*_inputs(), _map("dark"), documents=_numbers(), return_state=True)
