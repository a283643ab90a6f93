"""Every backend against the quadratic oracle in float64: output, state and every gradient.

`chunked` (and `exact`, `recurrent` where they apply) computes in float64 too; `native` in float32 and bfloat16, from
the same numbers, with tolerances of its own.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from tolerances import PARITY, relative_error

from darkformer.config import METHODS
from darkformer.features.feature_map import LEARNED

from .cases import (
    CHUNKED,
    NATIVE,
    NATIVE_BFLOAT16,
    ODD_SIZES,
    Case,
    Pair,
    Way,
    above,
    all_pairs,
    by_way,
    covering,
    differences,
    expected,
    make_map,
    needs_native,
    pairs,
    solve,
    use_chunked,
)

AXES = {
    "length": (1, 2, 63, 64, 65, 500),
    "window": (0, 1, 16, 64),
    "sinks": (0, 4),
    "kv_heads": (1, 2, 6),
    "mode": ("cold", "warm", "bidirectional"),
    "padding": ("none", "left", "right", "interior"),
    "tied": (True, False),
    "draw": ("orthogonal", "iid"),
}
PRODUCT = ("length", "window", "sinks", "kv_heads", "mode")


def case_of(row: dict) -> Case:
    # The oracle holds (G, R, L, L, m): small m and d keep L = 500 fast.
    small = {"features": 3, "dim": 4, "value_dim": 3} if row["length"] == 500 else {}
    return Case(**row, **small)


def dark_rows() -> Iterator[dict]:
    """The full product of `PRODUCT` for L ≤ 65; for L = 500 the mode cycles too. The other axes cycle.

    A cycled axis takes the value at (sum of some other axes' indices), so that every pair of values of two axes occurs;
    `test_every_pair_of_values_occurs` checks it.
    """
    for indices in product(*(range(len(AXES[axis])) for axis in PRODUCT)):
        length, window, sinks, kv_heads, mode = indices
        row = {axis: AXES[axis][i] for axis, i in zip(PRODUCT, indices, strict=True)}
        if row["length"] == 500 and mode != (window + sinks + kv_heads) % 3:
            continue
        row["padding"] = AXES["padding"][(length + window + 2 * sinks + kv_heads + mode) % 4]
        row["tied"] = AXES["tied"][(window // 2 + kv_heads + mode) % 2]
        row["draw"] = AXES["draw"][(length + sinks + mode) % 2]
        yield row


def impossible(pair: Pair) -> bool:
    values = dict(pair)
    if values.get("method") == "local" and values.get("window") == 0:
        return True  # refused by DarkConfig: nothing to attend to
    return values.get("method", "dark") != "dark" and not values.get("tied", True)  # only dark has an M to untie


METHOD_AXES = {"method": tuple(METHODS), **AXES}


def test_every_pair_of_values_occurs() -> None:
    dark = set().union(*map(pairs, dark_rows()))
    assert dark == all_pairs(AXES)
    methods = set().union(*map(pairs, covering(METHOD_AXES, impossible)))
    assert methods == all_pairs(METHOD_AXES, impossible)


@pytest.mark.parametrize(("case", "way"), by_way(case_of(row) for row in dark_rows()))
def test_dark(case: Case, way: Way) -> None:
    assert not way.wrong(case)


@pytest.mark.parametrize(("case", "way"), by_way(case_of(row) for row in covering(METHOD_AXES, impossible)))
def test_every_method(case: Case, way: Way) -> None:
    assert not way.wrong(case)


def odd_cases() -> Iterator[Case]:
    """Sizes that fill no vector, windows longer than a chunk, lengths beyond two chunks."""
    axes = ((1, 5, 64, 65, 150), (0, 1, 16, 100), (0, 4), (1, 6), ("cold", "warm"))
    for indices in product(*(range(len(axis)) for axis in axes)):
        length, window, sinks, kv_heads, mode = (axis[i] for axis, i in zip(axes, indices, strict=True))
        if (sum(indices) + indices[0] * indices[1]) % 3 == 0:
            padding = ("none", "left", "right", "interior")[sum(indices[1:]) % 4]
            yield Case(
                length=length, window=window, sinks=sinks, kv_heads=kv_heads, mode=mode, padding=padding,
                tied=sum(indices) % 2 == 0, **ODD_SIZES,
            )  # fmt: skip


@pytest.mark.parametrize(("case", "way"), by_way(odd_cases()))
def test_odd_sizes(case: Case, way: Way) -> None:
    assert not way.wrong(case)


@needs_native
@pytest.mark.parametrize("case", [*odd_cases()][::2], ids=str)
def test_bfloat16(case: Case) -> None:
    assert not NATIVE_BFLOAT16.wrong(case)


SIZES = [
    Case(dim=16, features=48, value_dim=64, window=9), Case(dim=32, features=96, value_dim=8, sinks=4),
    Case(dim=64, features=100, value_dim=80, window=20, sinks=4), Case(dim=80, features=33, value_dim=16),
    Case(dim=128, features=130, value_dim=128, window=7), Case(dim=256, features=130, value_dim=192, sinks=4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "way"),
    by_way(
        (replace(case, length=90, batch=2, heads=2, kv_heads=1, mode="warm", padding="left") for case in SIZES),
        lambda case: [CHUNKED, NATIVE, NATIVE_BFLOAT16],
    ),
)
def test_sizes(case: Case, way: Way) -> None:
    """Head dimensions from 16 to 256, numbers of features that are no power of two, d_v ≠ d, one kv head."""
    assert not way.wrong(replace(case, scale=(8 / case.dim) ** 0.25))


PROPOSALS = [
    Case(length=65, window=16, sinks=4, mode="warm", padding="interior", proposal="optimal"),
    Case(length=64, mode="bidirectional", padding="left", tied=False, proposal="oprf"),
    Case(length=63, window=1, padding="right", method="performer", draw="simplex", proposal="optimal"),
    Case(length=65, kv_heads=1, method="lfk", draw="sobol", proposal="theorem32"),
]


@pytest.mark.parametrize(
    ("case", "way"), by_way(replace(case, proposal_weights=w) for case in PROPOSALS for w in (True, False))
)
def test_proposals(case: Case, way: Way) -> None:
    assert not way.wrong(case)
    isotropic = expected(replace(case, proposal="isotropic"))
    want = expected(case).tensors["output"]
    assert relative_error(want, isotropic.tensors["output"]) > 1e-3  # the proposal does something


BOTH = Case(length=65, window=16, sinks=4, tied=False, mode="warm", padding="interior")
GAUSSIAN = {"query_center", "key_center", "query_balance", "key_balance", "far_bias"}


LEARNED_BY: dict[str, set[str]] = {
    "dark": {"geometry", "key_geometry"} | GAUSSIAN,
    "performer": GAUSSIAN,
    "lfk": {"projection"} | GAUSSIAN,
    "random": {"far_bias"},
    "constant": {"far_bias"},
    "local": set(),
    "exact": set(),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_compared_gradients_are_all_there_and_not_zero(method: str) -> None:
    """Else parity would compare zeros with zeros."""
    case = Case(length=65, window=16, sinks=4, method=method, tied=method != "dark")
    offsets = {f"{name}_offset" for name in LEARNED_BY[method]}
    assert {name for name, _ in make_map(case).named_parameters()} == offsets
    found = solve(case, case.fast).tensors
    for name in {"query", "key", "value"} | offsets:
        assert found[f"gradient of {name}"].norm() > 1e-3, name


@pytest.mark.parametrize("name", [name for name in LEARNED if name != "projection"])  # that of `lfk` alone
def test_a_perturbed_parameter_is_noticed(name: str) -> None:
    """Negative control: a change of 1e-6 in one parameter breaks the tolerance, in the output and in the gradients."""

    def perturb(made: torch.nn.Module) -> None:
        with torch.no_grad():
            getattr(made, name).view(-1)[0].mul_(1 + 1e-6).add_(1e-6)

    wrong = above(differences(solve(BOTH, "chunked", perturb), expected(BOTH)), PARITY)
    assert {"output", f"gradient of {name}_offset"} <= wrong.keys()


def test_a_window_off_by_one_is_noticed() -> None:
    """Negative control: a window of 15 in place of 16 is far from the same answer."""
    found, want = (solve(Case(length=65, window=window, sinks=4), "chunked").tensors["output"] for window in (15, 16))
    assert relative_error(found, want) > 1e-3


SUPER_CASES = [
    Case(length=length, window=window, sinks=4, mode=mode, padding=padding, features=3, dim=4, value_dim=3)
    for length, window, mode, padding in [
        (500, 0, "cold", "none"),
        (500, 16, "warm", "interior"),
        (300, 64, "bidirectional", "left"),
        (130, 1, "warm", "right"),
    ]
]


@pytest.mark.parametrize("span", [64, 256])
@pytest.mark.parametrize("case", SUPER_CASES, ids=str)
def test_several_super_chunks(case: Case, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state handed from one super-chunk to the next, forward and backward, the last one short."""
    use_chunked(monkeypatch, chunk=64, span=span)
    assert not CHUNKED.wrong(case)
