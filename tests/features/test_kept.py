"""Parameters made without a gradient are kept until a number, the configuration or the map itself changes."""

import copy
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from darkformer import attention

from .test_maps import make, moved


def test_parameters_are_the_same_object_until_a_number_changes() -> None:
    made = moved(make(method="dark", center=True, balance=True))
    with torch.no_grad():
        first = made.parameters_for(torch.float32)
        assert made.parameters_for(torch.float32) is first
        assert made.parameters_for(torch.float64) is not first
        assert copy.deepcopy(made).parameters_for(torch.float32) is not first
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            before = made.parameters_for(torch.float32)
            tensor.data.view(-1)[-1] += 0.25  # no version counter tells
            after = made.parameters_for(torch.float32)
            assert after is not before, name
            assert made.parameters_for(torch.float32) is after
            wanted = made._make(torch.float32)
            for field in ("query_map", "key_map", "projection", "query_center", "key_center"):
                assert torch.equal(getattr(after, field), getattr(wanted, field)), (name, field)
    assert set(made.state_dict()) == set(make(method="dark", center=True, balance=True).state_dict())


def test_parameters_with_a_gradient_are_made_anew() -> None:
    made = moved(make(method="dark", balance=True))
    with torch.no_grad():
        kept = made.parameters_for(torch.float32)
    first, second = made.parameters_for(torch.float32), made.parameters_for(torch.float32)
    assert first is not second and kept is not first
    assert first.cache is None
    assert first.query_map is not None
    first.query_map.sum().backward()
    assert made.geometry_offset is not None and made.geometry_offset.grad is not None
    made.requires_grad_(False)
    assert made.parameters_for(torch.float32) is kept


def test_what_is_kept_is_kept_for_these_numbers_alone() -> None:
    calls: list[int] = []

    def value() -> int:
        calls.append(1)
        return len(calls)

    made = make(method="performer").requires_grad_(False)
    p = made.parameters_for(torch.float32)
    assert [p.cached("a", value), p.cached("a", value), p.cached("b", value)] == [1, 1, 2]
    colder = p._replace(layer=p.layer + 1)  # a changed copy keeps nothing
    assert [colder.cached("a", value), colder.cached("a", value)] == [3, 4]
    made.redraw_(1)
    assert made.parameters_for(torch.float32).cached("a", value) == 5


def test_kept_parameters_do_not_depend_on_where_they_were_made() -> None:
    """Neither inference mode, whose tensors no backward pass may keep, nor autocast leaves a trace."""
    made = moved(make(method="dark", balance=True, window=4)).requires_grad_(False)
    x = torch.randn(1, 6, 20, 8)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        made.parameters_for(torch.float32)
        attention(x, x[:, :2], x[:, :2], made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = made.parameters_for(torch.float32)
    assert torch.equal(kept.query_map, made._make(torch.float32).query_map)  # type: ignore[arg-type]
    x.requires_grad_()
    attention(x, x[:, :2], x[:, :2], made).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_kept_parameters_follow_the_map_itself() -> None:
    """Another configuration, another tensor with the same numbers, a subclass without memory of its own."""
    made = make(method="performer").requires_grad_(False)
    first = made.parameters_for(torch.float32)
    made.config = replace(made.config, window=9)
    assert made.parameters_for(torch.float32).config.window == 9
    old = made.projection
    assert old is not None and first.projection is old
    made.projection = old.clone()
    old.mul_(0)
    now = made.parameters_for(torch.float32)
    assert now.projection is made.projection
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made.projection = mode.from_tensor(made.projection)
        fake = [made.parameters_for(torch.float32) for _ in range(2)]
    assert fake[0] is not fake[1]


def test_parameters_taken_without_a_gradient_keep_no_graph() -> None:
    made = make(method="dark", center=True)
    with torch.no_grad():
        p = made.parameters_for(torch.float32)
    assert p.query_center is not None and not p.query_center.requires_grad

    def double() -> Tensor:
        assert p.query_center is not None
        return 2 * p.query_center

    assert not p.cached("x", double).requires_grad
    with torch.no_grad():
        assert p.cached("x", double) is p.cached("x", double)
        assert not p.cached("x", double).requires_grad
