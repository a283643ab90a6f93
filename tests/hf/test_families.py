"""One suite over every family: a new family is a new row of `families.FAMILIES` and is tested by all of this."""

import warnings
from pathlib import Path

import pytest
import torch
from tolerances import STREAM, relative_error
from torch import Tensor
from transformers import PreTrainedModel

from darkformer import ConversionError, DarkConfig, convert, dark_layers
from hf.families import (
    DECODERS,
    FAMILIES,
    converted,
    left_mask,
    linear,
    logits,
    positions,
    streamed,
    tiny,
    tokens,
)

#: bfloat16 rounds to 2^-9, and three layers of products add their roundings up: softmax is off by as much. A mixture
#: of experts may choose another expert for a token, so it is measured where the choice is the same.
BFLOAT16 = 0.05
EVERY = sorted(FAMILIES)
LENGTHS = [9, 1, 14, 6]  # of packed documents


@pytest.fixture(scope="module", params=EVERY)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    """The family's model in linear mode; nothing here may change it."""
    return linear(family)


@pytest.mark.parametrize("pads", [[0, 0], [0, 3]], ids=["no padding", "left padding"])
def test_exact_mode_is_the_original(family: str, pads: list[int]) -> None:
    row = FAMILIES[family]
    ids, mask = tokens(2, row.tokens), left_mask(pads, row.tokens)
    given, real = mask if any(pads) else None, mask.bool()
    before = logits(tiny(family), ids, given)
    exact = DarkConfig(method="exact", convert_sliding=row.convert_sliding)
    after = logits(converted(tiny(family), exact), ids, given)
    assert (after - before)[real].abs().max() <= 1e-4


def test_linear_mode_is_not(family: str, model: PreTrainedModel) -> None:
    ids = tokens(2, 40)
    difference = (logits(model, ids) - logits(tiny(family), ids)).abs()
    assert [layer.layer for layer in dark_layers(model)] == FAMILIES[family].layers
    if not FAMILIES[family].encoder:  # up to the first far key (sinks + window) even linear mode is softmax
        assert difference[:, :6].max() <= 1e-4
    assert difference[:, 20:].max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_any_amount_of_padding_changes_nothing(model: PreTrainedModel, side: str) -> None:
    real = tokens(1, 20)
    alone = logits(model, real)
    for pads in (1, 5, 64):  # 64 is a chunk of the operator
        noise = tokens(1, pads, seed=pads)
        mask = left_mask([pads], 20 + pads)
        ids = torch.cat([noise, real] if side == "left" else [real, noise], dim=1)
        mask = mask if side == "left" else mask.flip(1)
        assert relative_error(logits(model, ids, mask)[mask.bool()][None], alone) <= STREAM


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_get_no_gradient(model: PreTrainedModel, side: str) -> None:
    mask = left_mask([0, 7], 25) if side == "left" else left_mask([0, 7], 25).flip(1)
    embedded = torch.randn(2, 25, 48, requires_grad=True)
    out = model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    (gradient,) = torch.autograd.grad(out[mask.bool()].square().sum(), embedded)
    norms = gradient.norm(dim=-1)
    assert norms[~mask.bool()].max() == 0
    assert norms[mask.bool()].min() > 0


def test_rows_of_a_batch_are_alone(model: PreTrainedModel) -> None:
    ids, mask = tokens(3, 25), left_mask([0, 4, 19], 25)
    together = logits(model, ids, mask)
    for row, pads in enumerate([0, 4, 19]):
        alone = logits(model, ids[row : row + 1, pads:])
        assert relative_error(together[row : row + 1, pads:], alone) <= STREAM


@pytest.mark.parametrize("name", DECODERS)
def test_every_split_is_the_full_forward(name: str) -> None:
    model, ids, mask = linear(name), tokens(2, 13), left_mask([0, 3], 13)
    full = logits(model, ids, mask)[mask.bool()]
    splits = [[cut] for cut in range(1, 13)] + [list(range(1, 13)), [4, 5, 6, 10]]
    errors = {str(cuts): relative_error(streamed(model, ids, mask, cuts)[mask.bool()], full) for cuts in splits}
    assert max(errors.values()) <= STREAM, errors


@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_the_argmax_of_full_forwards(name: str) -> None:
    model, ids, mask = linear(name), tokens(2, 9), left_mask([0, 4], 9)
    options = dict(do_sample=False, max_new_tokens=10)
    found = model.generate(ids, attention_mask=mask, **options)
    mask = torch.cat([mask, mask.new_ones(2, 10)], dim=1)
    # One forward over what was generated: every next token must be the best one there.
    assert torch.equal(logits(model, found, mask)[:, 8:-1].argmax(-1), found[:, 9:])


def _alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return torch.cat([logits(model, piece) for piece in ids.split(LENGTHS, dim=1)], dim=1)


@torch.no_grad()
def _packed(model: PreTrainedModel, ids: Tensor, *, restart: bool, lengths: bool) -> Tensor:
    batch = ids.shape[0]
    place = torch.cat([torch.arange(n) for n in LENGTHS])[None].expand(batch, -1)
    more: dict[str, Tensor] = {"position_ids": place} if restart else {}
    if lengths:
        cuts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        more |= {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts}
    return model(ids, use_cache=False, **more).logits


@pytest.mark.parametrize("name", DECODERS)
def test_documents_by_their_positions(name: str) -> None:
    model, ids = linear(name), tokens(2, sum(LENGTHS))
    found = _packed(model, ids, restart=True, lengths=False)
    assert relative_error(found, _alone(model, ids)) <= STREAM
    assert relative_error(logits(model, ids), _alone(model, ids)) > 1e-2  # control: unpacked they mix


def test_documents_by_their_lengths(family: str, model: PreTrainedModel) -> None:
    ids = tokens(1, sum(LENGTHS))
    if family == "modernbert":  # its sliding layers know documents by a mask that encoders do not get
        with pytest.raises(ConversionError, match="sliding-window layers that stay would mix"):
            _packed(model, ids, restart=True, lengths=True)
        return
    assert relative_error(_packed(model, ids, restart=True, lengths=True), _alone(model, ids)) <= STREAM


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gpt2", "gemma3", "bert"])
def test_documents_count_their_own_positions(name: str) -> None:
    # To softmax rotary positions are relative, but features are not rotated with the keys: documents whose positions
    # run on would be other documents than those alone.
    with pytest.raises(ConversionError, match=r"cu_seq_lens_q (puts|without).*Pass position_ids that restart"):
        _packed(linear(name), tokens(1, sum(LENGTHS)), restart=False, lengths=True)


def test_saved_shards_load_to_the_same_bits(model: PreTrainedModel, tmp_path: Path) -> None:
    ids, mask = tokens(2, 40), left_mask([0, 11], 40)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = type(model).from_pretrained(tmp_path)
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(logits(loaded, ids, mask), logits(model, ids, mask))


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    ids, mask = tokens(2, 40), left_mask([0, 11], 40)
    model.zero_grad()
    model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    model = linear(family).train()
    wanted = _gradients(model)
    model.gradient_checkpointing_enable()
    found = _gradients(model)
    assert found.keys() == wanted.keys()
    assert sum(".dark." in name for name in found) >= 2 * len(FAMILIES[family].layers)
    errors = {name: relative_error(found[name], wanted[name], 1e-6) for name in wanted}
    assert max(errors.values()) <= 1e-5, errors


def test_bfloat16_keeps_near_float32(family: str, model: PreTrainedModel) -> None:
    ids, mask = tokens(2, 40), left_mask([0, 11], 40)
    wanted = logits(model, ids, mask)[mask.bool()]
    half = linear(family).to(torch.bfloat16)
    found = logits(half, ids, mask)
    assert found.dtype == torch.bfloat16
    difference = (found.float()[mask.bool()] - wanted).abs().amax(-1) / wanted.abs().max()
    share = 0.8 if "mixture" in FAMILIES[family].special else 1.0
    assert difference.sort().values[int(share * len(difference)) - 1] <= BFLOAT16
    assert difference.max() > 0
    assert all(x.dtype == torch.float32 for layer in dark_layers(half) for x in layer.buffers())
    assert all(p.dtype == torch.bfloat16 for layer in dark_layers(half) for p in layer.parameters())
    if not FAMILIES[family].encoder:
        with torch.no_grad():
            cache = half(ids, use_cache=True).past_key_values
        states = [cache.layers[i].state for i in FAMILIES[family].layers]
        assert {s.feature_values.dtype for s in states} == {s.feature_sum.dtype for s in states} == {torch.float32}


def test_a_soft_cap_is_announced_once_and_applied() -> None:
    with pytest.warns(
        UserWarning, match=r"Gemma2ForCausalLM caps its attention logits at 0\.8.*features cannot"
    ) as seen:
        model = convert(tiny("gemma2"), DarkConfig(method="exact"))
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, tokens(1, 5))  # said when the model is converted, not at every forward
    ids = tokens(1, 40)
    wanted = logits(model, ids)
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    assert relative_error(logits(model, ids), wanted) > 1e-2
