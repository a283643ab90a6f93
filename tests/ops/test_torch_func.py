"""torch.func over the public door: values and per-sample gradients of a loop of ordinary autograd, or a named error."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from darkformer import AttentionState, InputError, attention
from darkformer.errors import DerivativeError
from darkformer.ops.native import stepper

from .cases import STATE_LEAVES, Case, make_inputs, make_map, make_mask, make_state, needs_native

SAMPLES = 3
SMALL: dict[str, Any] = {"length": 9, "features": 4, "dim": 4, "value_dim": 3, "heads": 4, "kv_heads": 2, "batch": 2}
DTYPE = {"native": torch.float32, "auto": torch.float32}
BACKENDS = ["auto", pytest.param("native", marks=needs_native), "chunked", "reference"]
CASES = {
    "plain": Case(window=2, sinks=1, tied=False, **SMALL),
    "no-window": Case(**SMALL),
    "padding": Case(window=2, sinks=1, padding="interior", **SMALL),
    "state": Case(window=2, sinks=1, mode="warm", **SMALL),
    "learned": Case(window=2, method="lfk", **SMALL),
    "weighted": Case(window=2, proposal="optimal", **SMALL),
    "softcap": Case(window=3, sinks=1, softcap=1.5, **SMALL),
    "bidirectional": Case(window=2, sinks=1, mode="bidirectional", **SMALL),
    "documents": Case(window=2, sinks=1, **SMALL),
}


class Door(nn.Module):
    """`attention` as a module of q, k, v and the state's tensors; a tuple of all results that have a gradient."""

    def __init__(self, case: Case, backend: str) -> None:
        super().__init__()
        self.case, self.dtype = case, DTYPE.get(backend, torch.float64)
        self.feature_map = make_map(case).to(self.dtype)
        self.state = make_state(case, self.feature_map, self.dtype) if case.mode == "warm" else None
        self.documents = torch.tensor([[1] * 4 + [2] * 5, [1, 2, 2] + [3] * 6]) if case is CASES["documents"] else None
        self.options: dict[str, Any] = dict(
            is_causal=case.mode != "bidirectional", softcap=case.softcap, backend=backend,
            key_mask=make_mask(case.padding, case.batch, case.length), documents=self.documents,
        )  # fmt: skip

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        if self.state is None:
            return (attention(query, key, value, self.feature_map, **self.options),)
        given = {f.name: getattr(self.state, f.name) for f in fields(AttentionState)}
        state = AttentionState(**given | dict(zip(STATE_LEAVES, sums, strict=False)))
        output, after = attention(
            query, key, value, self.feature_map, initial_state=state, return_state=True, **self.options
        )  # fmt: skip
        return output, *(getattr(after, name) for name in STATE_LEAVES)

    def loss(self, weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return sum((x.sin() * (1 + i)).sum() for i, x in enumerate(functional_call(self, weights, inputs)))

    def samples(self) -> list[Tensor]:
        """q, k, v and the sums of a state, with the samples first."""
        found = [torch.stack(x) for x in zip(*(make_inputs(self.case, seed=s) for s in range(SAMPLES)), strict=True)]
        if self.state is not None:
            scale = torch.arange(1, SAMPLES + 1)
            sums = (getattr(self.state, name) for name in STATE_LEAVES)
            found += [torch.stack([x * s for s in scale]) for x in sums]
        return [x.to(self.dtype) for x in found]


def by_autograd(door: Door, weights: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (*weights.values(), *inputs)]
    named = dict(zip(weights, leaves, strict=False))
    return list(torch.autograd.grad(door.loss(named, *leaves[len(weights) :]), leaves))


def close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    assert len(found) == len(wanted)
    errors = [relative_error(x, y, floor=1e-3) for x, y in zip(found, wanted, strict=True)]
    assert max(errors) <= (1e-9 if dtype == torch.float64 else 1e-4), errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_each_sample(name: str, backend: str) -> None:
    """`grad`, and `vmap(grad)` of every input, every parameter and the state."""
    if backend == "native" and name in ("softcap", "bidirectional"):
        pytest.skip("native cannot")
    door = Door(CASES[name], backend)
    weights = {n: p.detach() for n, p in door.named_parameters()}
    samples = door.samples()
    wanted = [by_autograd(door, weights, [x[i] for x in samples]) for i in range(SAMPLES)]
    places = tuple(range(1 + len(samples)))
    one, *rest = grad(door.loss, argnums=places)(weights, *(x[0] for x in samples))
    close([*one.values(), *rest], wanted[0], door.dtype)
    every, *rest = vmap(grad(door.loss, argnums=places), (None, *[0] * len(samples)))(weights, *samples)
    for i in range(SAMPLES):
        close([x[i] for x in (*every.values(), *rest)], wanted[i], door.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values(backend: str) -> None:
    """`vmap` over inputs, over parameters alone, over a mask, nested, and with an outer dimension that is not 0."""
    door = Door(CASES["padding"], backend)
    made, (query, key, value) = door.feature_map, door.samples()
    mask, options = door.options["key_mask"], {"backend": backend}
    masks = torch.stack([mask, mask.flip(1), torch.ones_like(mask)])

    def one(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return attention(q, k, v, made, key_mask=m, **options)

    wanted = torch.stack([one(*x) for x in zip(query, key, value, masks, strict=True)])
    found = vmap(one, (2, 0, 0, 0), 1)(query.movedim(0, 2), key, value, masks).movedim(1, 0)
    close([found], [wanted], door.dtype)
    nested = vmap(vmap(one, (0, None, None, None)), (None, 0, 0, 0))(query, key, value, masks)
    close([nested[i, i] for i in range(SAMPLES)], list(wanted), door.dtype)
    weights = {n: torch.stack([p.detach() * s for s in (1, 0.5, 0.9)]) for n, p in door.named_parameters()}
    inputs = (query[0], key[0], value[0])
    found = vmap(lambda w: functional_call(door, w, inputs)[0])(weights)
    for i in range(SAMPLES):
        alone = functional_call(door, {n: x[i] for n, x in weights.items()}, inputs)[0]
        close([found[i]], [alone], door.dtype)
    outer = query.clone().requires_grad_()  # ordinary autograd around vmap
    vmap(one)(outer, key, value, masks).sin().sum().backward()
    again = query.clone().requires_grad_()
    torch.stack([one(*x) for x in zip(again, key, value, masks, strict=True)]).sin().sum().backward()
    assert outer.grad is not None and again.grad is not None
    close([outer.grad], [again.grad], door.dtype)


def test_jacobians() -> None:
    door = Door(CASES["plain"], "chunked")
    made, (query, key, value) = door.feature_map, (x[0, :1, :, :3] for x in door.samples())

    def output(q: Tensor, k: Tensor) -> Tensor:
        return attention(q, k, value, made)

    found = jacrev(output, argnums=(0, 1))(query, key)
    wanted = torch.autograd.functional.jacobian(output, (query, key))
    close(list(found), list(wanted), door.dtype)
    out, pull = vjp(output, query, key)
    close(list(pull(torch.ones_like(out))), [x.sum((0, 1, 2, 3)) for x in wanted], door.dtype)


def _dual(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_forward_mode_is_refused(backend: str, gradients: bool) -> None:
    door = Door(CASES["plain"], backend)
    query, key, value = (x[0] for x in door.samples())
    weights = {n: p.detach() for n, p in door.named_parameters()}

    def output(q: Tensor) -> Tensor:
        with torch.set_grad_enabled(gradients):
            return attention(q, key, value, door.feature_map, backend=backend)

    with pytest.raises(DerivativeError, match="forward-mode"):
        jvp(output, (query,), (query,))
    with pytest.raises(DerivativeError, match="forward-mode"):
        _dual(output, query)
    with pytest.raises(DerivativeError, match="forward-mode"):
        jvp(lambda w: functional_call(door, w, (query, key, value))[0], (weights,), (weights,))
    with forward_ad.dual_level():  # nothing has a tangent
        assert torch.equal(output(query), attention(query, key, value, door.feature_map, backend=backend))


def test_second_derivatives_are_refused() -> None:
    door = Door(CASES["plain"], "chunked")
    query, key, value = (x[0] for x in door.samples())

    def loss(q: Tensor) -> Tensor:
        return attention(q, key, value, door.feature_map).sin().sum()

    with pytest.raises(DerivativeError, match="no second derivative"):
        grad(lambda q: grad(loss)(q).sum())(query)
    with pytest.raises(DerivativeError, match=r"torch\.func"):
        hessian(loss)(query)


def test_a_step_and_a_wrong_state() -> None:
    """The step hands memory to C++, so transforms get none; a state must be one."""
    door = Door(CASES["state"], "auto")
    query, key, value = (x[:, :, :, :1] for x in door.samples()[:3])

    def step(q: Tensor) -> Tensor:
        assert stepper(door.state, q, key[0], door.feature_map, scaling=0.5, softcap=None) is None
        return q

    vmap(step)(query)

    def wrong(q: Tensor) -> Tensor:
        return attention(q, key[0], value[0], door.feature_map, initial_state=1)  # type: ignore[arg-type]

    for run in (lambda: wrong(query[0]), lambda: vmap(wrong)(query)):
        with pytest.raises(InputError, match="initial_state is a int"):
            run()
