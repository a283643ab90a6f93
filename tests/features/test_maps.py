"""The feature map as a module: what it owns, its precision, its scale; and the methods without Gaussian features."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import PARITY, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrize

from darkformer import ConfigError, DarkConfig, FeatureMap, attention, feature_map
from darkformer.config import METHODS
from darkformer.features.affine import FORMS, affine, key_log_features, query_log_features

SHAPE = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8}


def make(**fields: Any) -> FeatureMap:
    return feature_map(DarkConfig(**{"num_features": 16, "window": 0, "sinks": 0} | fields), **SHAPE)


def moved(made: FeatureMap) -> FeatureMap:
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def inputs(length: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(batch, heads, length, 8, dtype=dtype) for heads in (6, 2, 2))
    return query, key, value


PARAMETERS = {
    "geometry": (2, 8, 8),
    "key_geometry": (2, 8, 8),
    "query_center": (2, 8),
    "key_center": (2, 8),
    "query_balance": (2, 8, 8),
    "key_balance": (2, 8, 8),
    "far_bias": (2,),
}


@pytest.mark.parametrize(
    ("fields", "absent"),
    [
        ({"tied": False}, set()),
        ({}, {"key_geometry"}),
        ({"center": False}, {"key_geometry", "query_center", "key_center"}),
        ({"balance": False}, {"key_geometry", "query_balance", "key_balance"}),
        ({"far_bias": False}, {"key_geometry", "far_bias"}),
        ({"window": 0}, {"key_geometry", "far_bias"}),  # nothing exact to weigh the features against
        ({"window": 0, "sinks": 1}, {"key_geometry"}),
        ({"method": "performer", "tied": False}, {"geometry", "key_geometry"}),
        ({"method": "random"}, set(PARAMETERS) - {"far_bias"}),
        ({"method": "constant", "far_bias": False}, set(PARAMETERS)),
        ({"method": "local"}, set(PARAMETERS)),
        ({"method": "exact"}, set(PARAMETERS)),
    ],
)
def test_parameters_are_there_where_the_configuration_uses_them(fields: dict[str, Any], absent: set[str]) -> None:
    made = make(**{"window": 1} | fields)
    present = {name: shape for name, shape in PARAMETERS.items() if name not in absent}
    shapes = {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}
    assert shapes == {f"{name}_offset": shape for name, shape in present.items()}
    assert all(parameter.dtype == torch.float32 and not parameter.any() for parameter in made.parameters())
    gaussian = made.config.method in ("dark", "performer", "lfk")
    starts = {name: tuple(x.shape) for name, x in made.named_buffers()}
    assert starts == present | ({"projection": (2, 16, 8)} if gaussian else {})
    assert made.values().keys() == starts.keys()


def test_lfk_learns_its_projection() -> None:
    made = make(method="lfk", seed=4)
    assert isinstance(made.projection_offset, nn.Parameter)
    assert torch.equal(made.projection, make(method="performer", seed=4).projection)  # started from the same draw
    assert make(method="performer").projection_offset is None


@pytest.mark.parametrize("method", ["dark", "performer", "lfk"])
def test_methods_start_as_the_performer(method: str) -> None:
    """M = I, A = B = I, centres and bias 0: conversion starts from FAVOR+ whatever is trained later."""
    query, key, value = inputs(20)
    want = attention(query, key, value, make(method="performer", center=False, balance=False, far_bias=False))
    assert relative_error(attention(query, key, value, make(method=method, tied=False)), want) <= PARITY


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4, "head_dim": 8}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ({"num_heads": 0, "num_kv_heads": 1, "head_dim": 8}, "num_heads=0"),
        ({"num_heads": 1, "num_kv_heads": 0, "head_dim": 8}, "num_kv_heads=0"),
        ({"num_heads": 1, "num_kv_heads": 1, "head_dim": 0}, "head_dim=0"),
    ],
)
def test_wrong_shapes(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        feature_map(DarkConfig(), **shape)


@pytest.mark.parametrize("method", ["dark", "lfk"])
@pytest.mark.parametrize("move", ["to bfloat16", "to float16", "half", "bfloat16", "to cpu and bfloat16"])
def test_low_precision_moves_leave_it_float32(method: str, move: str) -> None:
    """The model around it and the offsets do become low precision; what these cannot hold goes to the starts."""
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "attention": moved(make(method=method, tied=False))})
    with torch.no_grad():
        model["attention"].query_center_offset.fill_(0.25)
    start = model["attention"].query_center.clone()
    before = copy.deepcopy(model["attention"].values())
    {
        "to bfloat16": lambda: model.to(torch.bfloat16),
        "to float16": lambda: model.to(torch.float16),
        "half": model.half,
        "bfloat16": model.bfloat16,
        "to cpu and bfloat16": lambda: model.to("cpu", torch.bfloat16),
    }[move]()
    assert model["linear"].weight.dtype in (torch.bfloat16, torch.float16)
    after = model["attention"].values()
    assert after.keys() == before.keys()
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)
    assert all(x.dtype == torch.float32 for x in model["attention"].buffers())
    assert {x.dtype for x in model["attention"].parameters()} == {model["linear"].weight.dtype}
    # A quarter is exact in any dtype, so it stays what was learned.
    assert torch.equal(model["attention"].query_center, start) and model["attention"].query_center_offset.eq(0.25).all()


def test_gradients_move_with_the_offsets() -> None:
    made = make()
    made.covariance().sum().backward()
    made.to(torch.bfloat16)
    assert made.geometry_offset.grad.dtype == torch.bfloat16 and made.geometry_offset.grad.any()
    made.to(torch.float32)
    assert made.geometry_offset.dtype == made.geometry_offset.grad.dtype == torch.float32


def test_low_precision_moves_still_move() -> None:
    made = make().to("meta", torch.bfloat16)
    assert {(x.device.type, x.dtype) for x in made.parameters()} == {("meta", torch.bfloat16)}
    assert {(x.device.type, x.dtype) for x in made.buffers()} == {("meta", torch.float32)}


def test_the_dtype_of_what_is_learned() -> None:
    shape = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    for dtype in (torch.bfloat16, torch.float64):
        made = FeatureMap(DarkConfig(num_features=4), **shape, dtype=dtype)
        assert {x.dtype for x in made.parameters()} == {dtype}
        assert {x.dtype for x in made.buffers()} == {torch.float32} == {x.dtype for x in made.values().values()}
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it builds a model
    try:
        made = FeatureMap(DarkConfig(num_features=4), **shape)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in made.parameters()} == {torch.bfloat16}
    assert {x.dtype for x in made.buffers()} == {torch.float32}


def test_double_and_back() -> None:
    made = moved(make(tied=False))
    want = copy.deepcopy(made.state_dict())
    made.double()
    assert {x.dtype for x in made.state_dict().values()} == {torch.float64}
    made.float()
    assert all(torch.equal(x, want[name]) for name, x in made.state_dict().items())


def test_built_on_the_meta_device_to_receive_saved_weights() -> None:
    saved = moved(make(tied=False)).state_dict()
    with torch.device("meta"):
        made = make(tied=False)
    made.load_state_dict(saved, assign=True)
    assert all(torch.equal(x, saved[name]) for name, x in made.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("method", ["dark", "lfk", "performer"])
def test_a_state_dict_of_version_0_1_0(method: str, assign: bool) -> None:
    """It had parameters of these names and no offsets."""
    saved = {name: torch.randn_like(x) for name, x in make(method=method).named_buffers()}
    made = moved(make(method=method))
    made.load_state_dict(saved, assign=assign)
    assert not any(x.any() for x in made.parameters())
    assert all(torch.equal(x, saved[name]) for name, x in made.values().items())
    del saved["query_center"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*\"query_center\""):
        made.load_state_dict(saved)
    damaged = dict(made.state_dict())  # a later file lacks none
    del damaged["key_center_offset"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"key_center_offset"'):
        made.load_state_dict(damaged)


def test_a_float32_state_dict_in_a_half_precision_map() -> None:
    saved = moved(make())
    made = make().to(torch.bfloat16)
    made.load_state_dict(saved.state_dict())
    assert {x.dtype for x in made.parameters()} == {torch.bfloat16}
    assert all(torch.equal(x, saved.values()[name]) for name, x in made.values().items())


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_round_trip(method: str) -> None:
    """Other seeds and other values: after loading, both give the same bits. Ω is saved."""
    fields = {"method": method, "tied": method != "dark", "window": 2, "sinks": 1}
    first, second = moved(make(**fields)), make(**fields | {"seed": 1 if method != "random" else 0})
    second.load_state_dict(first.state_dict())
    tensors = inputs(9, dtype=torch.float32)
    assert torch.equal(attention(*tensors, first), attention(*tensors, second))
    if method in ("dark", "performer", "lfk"):
        assert "projection" in first.state_dict()


def test_copies_are_independent() -> None:
    made = make()
    other = copy.deepcopy(made)
    with torch.no_grad():
        other.geometry.zero_(), other.projection.zero_()
    assert made.geometry.ne(0).any() and made.projection.ne(0).any()


def test_covariance() -> None:
    made = moved(make())
    geometry = made.geometry + made.geometry_offset
    torch.testing.assert_close(made.covariance(), geometry.mT @ geometry)
    torch.testing.assert_close(make(method="performer").covariance(), torch.eye(8).expand(2, -1, -1))


@pytest.mark.parametrize(
    "fields",
    [{}, {"tied": False}, {"balance": False}, {"method": "performer"}, {"method": "lfk"}],
    ids=["dark", "untied", "without balance", "performer", "lfk"],
)
def test_scale(fields: dict[str, Any]) -> None:
    """Scaling both maps by t is a kernel of t·q and t·k (about the centres), per head."""
    made = moved(make(**fields | {"center": False})).double()
    assert made.scalable
    scaled = copy.deepcopy(made)
    scale = torch.tensor([0.5, 1.7], dtype=torch.float32)
    scaled.scale_(scale)
    query, key, value = inputs(11)
    wide = scale.double()[:, None, None]
    want = attention(query * wide.repeat_interleave(3, 0), key * wide, value, made)
    assert relative_error(attention(query, key, value, scaled), want) <= PARITY


@pytest.mark.parametrize("fields", [{"method": "performer", "balance": False}, {"method": "random"}])
def test_nothing_to_scale(fields: dict[str, Any]) -> None:
    made = make(**fields)
    before = copy.deepcopy(made.state_dict())
    assert not made.scalable
    made.scale_(torch.tensor([0.5, 0.5]))
    assert all(torch.equal(x, before[name]) for name, x in made.state_dict().items())


def test_set_is_what_is_computed_with_and_where_training_starts() -> None:
    made = moved(make())
    for name, x in make(seed=1).values().items():
        value = torch.randn_like(x)
        made.set_(name, value)
        assert torch.equal(made.values()[name], value) and torch.equal(made.learned(name), value)
    assert not any(x.any() for x in made.parameters())
    with pytest.raises(ConfigError, match=r"cannot set key_geometry of layer 0 \(method='dark'\), which has no such"):
        made.set_("key_geometry", torch.zeros(2, 8, 8))
    minus = torch.full_like(made.query_center, -0.0)  # its bits as well: they are part of what is saved
    made.set_("query_center", minus)
    assert made.values()["query_center"].signbit().all()


@pytest.mark.parametrize("method", ["dark", "lfk"])
def test_weight_decay_pulls_towards_the_start(method: str) -> None:
    made = make(method=method, tied=False, window=1)
    for name in made.values():
        made.set_(name, torch.randn_like(made.values()[name]))
    before = copy.deepcopy(made.values())
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2, weight_decay=0.5)
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(1000):
        optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in made.values().items())
    distance = [(moved(made).learned("query_balance") - before["query_balance"]).norm().item()]
    for _ in range(1000):
        optimizer.step()
    distance.append((made.learned("query_balance") - before["query_balance"]).norm().item())
    assert distance[1] < 0.01 * distance[0]


def test_forward_hands_the_map_to_what_reads_it() -> None:
    """What happens around a module's forward pass happens around the reading."""
    made, (query, key, value) = make(window=2), inputs(9, dtype=torch.float32)
    seen: list[str] = []
    made.register_forward_pre_hook(lambda module, given: seen.append("before"))
    made.register_forward_hook(lambda module, given, output: seen.append("after"))

    def run(fm: FeatureMap, *tensors: Tensor) -> Tensor:
        seen.append("run")
        assert fm is made
        return attention(*tensors, fm)

    assert torch.equal(made(run, query, key, value), attention(query, key, value, made))
    assert seen == ["before", "run", "after"]


class Shifted(nn.Module):
    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(like))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize("name", ["geometry", "geometry_offset"])
def test_a_parametrization_is_what_counts(name: str) -> None:
    """With gradients and without, and nothing stale is kept."""
    made, tensors = moved(make(window=2)), inputs(9, dtype=torch.float32)
    other = copy.deepcopy(made)
    shift = Shifted(made.geometry)
    parametrize.register_parametrization(made, name, shift)
    for value in (0.0, 0.1, 0.2):
        with torch.no_grad():
            shift.shift.fill_(value)
            other.set_("geometry", getattr(made.parametrizations, name).original + shift.shift
                       + (made.geometry_offset if name == "geometry" else made.geometry))  # fmt: skip
            want = attention(*tensors, other)
            torch.testing.assert_close(attention(*tensors, made), want)
        found = attention(*tensors, made)
        torch.testing.assert_close(found, want)
    found.sum().backward()
    assert shift.shift.grad is not None and shift.shift.grad.any()
    torch.testing.assert_close(made.covariance(), other.covariance())
    with pytest.raises(ConfigError, match=r"geometry of layer 0.*is parametrized: remove the parametrization first"):
        made.reset_geometry_()


def test_peft_targets_an_offset() -> None:
    """LoRA of one parameter: peft sets it for the map's forward pass only."""
    peft = pytest.importorskip("peft")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dark = moved(make(window=2))

        def forward(self, *tensors: Tensor) -> Tensor:
            return self.dark(lambda fm, *given: attention(*given, fm), *tensors)

    layer, tensors = Layer(), inputs(9, dtype=torch.float32)
    want = layer(*tensors)
    adapted = peft.get_peft_model(layer, peft.LoraConfig(r=2, target_parameters=["dark.geometry_offset"]))
    assert torch.equal(adapted(*tensors), want)
    weights = dict(adapted.named_parameters())
    learned = {name for name, p in weights.items() if p.requires_grad}
    assert len(learned) == 2 and all("lora_" in name for name in learned)
    adapted(*tensors).sum().backward()
    for p in weights.values():
        if p.requires_grad:
            p.data.add_(0.1)
    found = adapted(*tensors)
    assert relative_error(found, want) > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(adapted(*tensors), found)
        with adapted.disable_adapter():
            assert torch.equal(adapted(*tensors), want)


def test_its_representation_says_what_it_is() -> None:
    assert repr(make(window=7)) == "FeatureMap(dark, m=16, window=7, sinks=0, heads=6/2, d=8)"


def test_every_method_has_features() -> None:
    assert set(FORMS) == set(METHODS)


@pytest.mark.parametrize("method", ["dark", "random", "constant"])
def test_the_form_of_raw_tokens(method: str) -> None:
    x, positions = torch.randn(1, 2, 5, 8).double(), torch.arange(5)[None]
    for form in affine(moved(make(method=method, window=1)).parameters_for(torch.float64)):
        form = form._replace(table=form.table and (lambda x, positions: x.abs()))  # one that depends on the token
        torch.testing.assert_close(form.of_raw(0.3)(x, positions), form(0.3 * x, positions))


# random: independent of the token, a function of seed, head, position and feature


def random_features(made: FeatureMap, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    parameters = made.parameters_for(torch.float64)
    shift = 0.5 * torch.tensor(made.config.num_features).log().double()
    return (
        query_log_features(parameters, x, positions) + shift,
        key_log_features(parameters, x, positions) + shift,
    )


def test_random_features_depend_on_the_position_only() -> None:
    made, positions = make(method="random", num_features=32), torch.arange(50)[None]
    one, other = (random_features(made, torch.randn(1, 2, 50, 8).double(), positions) for _ in range(2))
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x, y)
    for features in one:
        numbers = features.flatten()
        assert numbers.unique().numel() == numbers.numel()  # no head, position or feature repeats another
        assert numbers.mean().abs() <= 4 / len(numbers) ** 0.5
        assert (numbers.var() - 1).abs() <= 4 * (2 / len(numbers)) ** 0.5
    query, key = one
    assert torch.corrcoef(torch.stack([query.flatten(), key.flatten()]))[0, 1].abs() <= 4 / len(numbers) ** 0.5
    later = random_features(made, torch.randn(1, 2, 50, 8).double(), positions + 7)[0]
    assert torch.equal(later[:, :, :43], query[:, :, 7:])
    reseeded = make(method="random", num_features=32, seed=1)
    assert not torch.isclose(random_features(reseeded, torch.zeros(1, 2, 50, 8).double(), positions)[0], query).any()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_random_attention_ignores_queries_and_keys(causal: bool) -> None:
    made = make(method="random").double()
    query, key, value = inputs(30)
    want = attention(query, key, value, made, is_causal=causal)
    assert torch.equal(attention(-query, 3 * key, value, made, is_causal=causal), want)
    assert relative_error(attention(query, key, 2 * value, made, is_causal=causal), 2 * want) <= PARITY
    # One query group shares its features, and different groups do not.
    assert not torch.allclose(want[:, :3] - want[:, 3:], torch.zeros(1).double())


# constant: the mean of the values


@pytest.mark.parametrize("masked", [True, False])
def test_constant_is_the_mean_of_the_values(masked: bool) -> None:
    made = make(method="constant").double()
    query, key, value = inputs(70)
    mask = torch.ones(2, 70, dtype=torch.bool)
    if masked:
        mask[0, 20:50] = mask[1, :40] = False
    weight = mask[:, None, :, None].double()
    total, count = (value * weight).cumsum(2), weight.cumsum(2)
    want = (total / count.clamp_min(1) * weight).repeat_interleave(3, dim=1)
    assert relative_error(attention(query, key, value, made, key_mask=mask), want) <= PARITY
    want = ((total / count)[:, :, -1:] * weight).repeat_interleave(3, dim=1)
    assert relative_error(attention(query, key, value, made, key_mask=mask, is_causal=False), want) <= PARITY


# exact: softmax attention through the same door


def softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    length = query.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool)
    allowed = (allowed.tril() if causal else allowed)[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    found = F.scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True)
    return found if mask is None else found.nan_to_num(0) * mask[:, None, :, None]


@pytest.mark.parametrize("backend", ["exact", "reference", "auto"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("masked", [True, False])
def test_exact_is_softmax_attention(masked: bool, causal: bool, backend: str) -> None:
    made, (query, key, value) = make(method="exact", window=64, sinks=4), inputs(40)
    mask = None
    if masked:
        mask = torch.ones(2, 40, dtype=torch.bool)
        mask[0, :13] = mask[1, 5:9] = False
    found = attention(query, key, value, made, key_mask=mask, is_causal=causal, backend=backend)
    assert relative_error(found, softmax(query, key, value, mask, causal)) <= PARITY
    assert relative_error(found, softmax(query, key, value, mask, not causal)) > 0.1  # negative control


@pytest.mark.parametrize("backend", ["exact", "reference"])
def test_exact_after_a_state_is_the_full_forward(backend: str) -> None:
    made, tensors = make(method="exact"), inputs(40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :13] = False
    outputs, state = [], None
    for start, stop in ((0, 10), (10, 30), (30, 31), (31, 40)):
        piece = (x[:, :, start:stop] for x in tensors)
        output, state = attention(
            *piece, made, key_mask=mask[:, start:stop], initial_state=state, return_state=True, backend=backend
        )
        outputs.append(output)
    assert relative_error(torch.cat(outputs, dim=2), softmax(*tensors, mask)) <= PARITY
    assert state.key.shape[2] == 40 and state.count.tolist() == [40, 27]


@pytest.mark.parametrize("method", ["dark", "performer", "random", "constant", "local"])
@pytest.mark.parametrize(("window", "sinks"), [(40, 0), (64, 3), (1, 40)])
def test_a_window_or_sinks_over_everything_is_softmax_attention(method: str, window: int, sinks: int) -> None:
    """The exact part uses the model's own logits, whatever the features' parameters are."""
    made, tensors = moved(make(method=method, window=window, sinks=sinks)).double(), inputs(40)
    assert relative_error(attention(*tensors, made), softmax(*tensors)) <= PARITY


def test_gqa_groups_share_consecutive_query_heads() -> None:
    """Each group of three query heads equals a call with its kv head alone."""
    made, (query, key, value) = moved(make(window=4, sinks=1)).double(), inputs(30)
    want = attention(query, key, value, made)
    for g in range(2):
        config = DarkConfig(num_features=16, window=4, sinks=1)
        single = feature_map(config, num_heads=3, num_kv_heads=1, head_dim=8).double()
        single.load_state_dict({name: x[g : g + 1] for name, x in made.state_dict().items()})
        found = attention(query[:, 3 * g : 3 * g + 3], key[:, g : g + 1], value[:, g : g + 1], single)
        assert relative_error(found, want[:, 3 * g : 3 * g + 3]) <= PARITY


def test_no_tokens_leave_a_state_of_ones_own() -> None:
    made = make(method="dark")
    x = torch.randn(1, 6, 0, 8)
    _, state = attention(x, x[:, :2], x[:, :2], made, return_state=True)
    state.feature_values[0, 0, 0, 0] = 1
    assert state.feature_values.sum() == 1
