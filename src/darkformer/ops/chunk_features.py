"""Log-features of super-chunks in reused memory, and their gradients by hand.

Every Gaussian method is one affine form of the scaled token x̃ = √s·x (see `features/log_features.py`):
ℓ = Ωy - ½‖y‖² + linearᵀx̃ + const with y = map·x̃ - offset. The form's tensors are made by ordinary torch from M,
balance, centres, bias and weights, so their gradients reach these through autograd.
Logarithms are to base 2 here: 2^x is three times as fast as e^x in torch on a CPU and as accurate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..features.affine import FeatureParameters, key_log_features, query_log_features

LOG2E = math.log2(math.e)


class Form(NamedTuple):
    """The small tensors of one side's log-features; None where absent. `omega` None: they depend on no token."""

    map: Tensor | None  # (G, r, d); None is the identity
    offset: Tensor | None  # (G, r)
    omega: Tensor | None  # (G, m, r)
    linear: Tensor | None  # (G, d)
    const: Tensor | None  # (G, m)


def forms(parameters: FeatureParameters) -> tuple[Form, Form]:
    """The affine forms of query and key log-features, differentiable in the parameters."""
    p, omega = parameters, parameters.projection
    bias = p.far_bias
    if omega is None:  # `random`, `constant`, `local`: only the bias is learned
        const = None if bias is None else bias[:, None].expand(-1, p.config.feature_count)
        return Form(None, None, None, None, const), Form(None, None, None, None, None)

    def offset(linear: Tensor | None, center: Tensor | None) -> Tensor | None:
        return center if linear is None or center is None else (linear @ center[..., None]).squeeze(-1)

    both = p.query_center is not None and p.key_center is not None
    shared = omega.new_full(omega.shape[:2], -0.5 * math.log(p.config.num_features))
    if p.log_weight is not None:
        shared = shared + 0.5 * p.log_weight
    const = shared
    if p.query_center is not None and p.key_center is not None:
        const = const - (p.query_center * p.key_center).sum(-1, keepdim=True)
    if bias is not None:
        const = const + bias[:, None]
    query = Form(p.query_map, offset(p.query_map, p.query_center), omega, p.key_center if both else None, const)
    return query, Form(p.key_map, offset(p.key_map, p.key_center), omega, p.query_center, shared)


class Scratch:
    """Named buffers that grow once and are used again; what they hold is undefined.

    A run borrows one and gives it back: fresh memory costs the system more time than a short sequence's arithmetic.
    """

    #: Bytes above which a scratch is not kept for the next run.
    KEEP = 64 * 2**20
    _idle: ClassVar[dict[tuple[torch.dtype, torch.device], list[Scratch]]] = {}

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.kind = (dtype, device)
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size, flat = math.prod(shape), self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = torch.empty(size, dtype=self.kind[0], device=self.kind[1])
        return flat[:size].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(flat.nbytes for flat in self._flat.values())

    @classmethod
    def borrow(cls, dtype: torch.dtype, device: torch.device) -> Scratch:
        """An idle scratch, or a new one; safe in threads, because taking one off a list is one step."""
        try:
            return cls._idle[dtype, device].pop()
        except (KeyError, IndexError):
            return cls(dtype, device)

    @classmethod
    def release(cls) -> None:
        """Gives the memory of all idle scratches back to the system."""
        cls._idle.clear()

    def give_back(self) -> None:
        """The next run may have it; one at most is kept of a kind."""
        idle = self._idle.setdefault(self.kind, [])
        if not idle and self.nbytes <= self.KEEP:
            idle.append(self)


class Features(NamedTuple):
    """Log-features without `const`: weight[…, i] + row, to base 2."""

    weight: Tensor  # (BG, T, m)
    row: Tensor  # (BG, T, 1)
    mapped: Tensor  # (BG, T, r) y; the input where there is no map, and where the row is not wanted


class Side:
    """One side's features over a run: values in reused memory, gradients added up over the super-chunks."""

    def __init__(self, form: Form, parameters: FeatureParameters, batch: int, role: str, scratch: Scratch) -> None:
        self.form, self.parameters, self.batch, self.role, self.scratch = form, parameters, batch, role, scratch
        self.table: Callable[..., Tensor] = query_log_features if role == "query" else key_log_features
        # One copy a row of the batch: a product of batches wants one matrix each.
        self.map, self.offset, self.omega, self.linear, self.const = (
            None if x is None else x.detach().repeat(batch, *(1,) * (x.dim() - 1)) for x in form
        )
        self.omega_mT = None if self.omega is None else (self.omega * LOG2E).mT
        self.needs = {name: x is not None for name, x in form._asdict().items()}
        self.gradients: dict[str, Tensor] = {}
        self.fused: Tensor | None = None

    def drop_row(self) -> None:
        """From here on `values` gives row 0 and one product with ΩM: for queries that see features only.

        A factor common to a query's features then cancels in its normaliser.
        """
        if self.omega_mT is not None:
            self.fused = self.omega_mT if self.map is None else torch.bmm(self.map.mT, self.omega_mT)
            if self.offset is not None:
                shift = torch.bmm(self.offset[:, None], self.omega_mT)[:, 0] / LOG2E
                self.const = -shift if self.const is None else self.const - shift

    def constant(self, like: Tensor) -> Tensor:
        """`const` to base 2, (BG, 1, m) or a zero of `like`'s kind."""
        return like.new_zeros(1, 1, 1) if self.const is None else (self.const * LOG2E)[:, None]

    def values(self, x: Tensor, positions: Tensor, suffix: str = "") -> Features:
        """x̃ (BG, T, d), positions (B, T) → log-features in scratch memory `suffix`."""
        groups, tokens, dim = x.shape
        name = self.role + suffix
        if self.omega is None or self.omega_mT is None:
            free = self.parameters._replace(far_bias=None)
            table = self.table(free, x.view(self.batch, -1, tokens, dim), positions).flatten(0, 1) * LOG2E
            return Features(table, x.new_zeros(groups, tokens, 1), x)
        if self.fused is not None:
            weight = torch.bmm(x, self.fused, out=self.scratch(name, groups, tokens, self.fused.shape[2]))
            return Features(weight, x.new_zeros(groups, tokens, 1), x)
        y = self.mapped(x, name)
        weight = torch.bmm(y, self.omega_mT, out=self.scratch(name, groups, tokens, self.omega.shape[1]))
        square = torch.mul(y, y, out=self.scratch("square", *y.shape))
        row = square.sum(-1, keepdim=True).mul_(-0.5 * LOG2E)
        if self.linear is not None:
            product = torch.mul(x, self.linear[:, None], out=self.scratch("square", *x.shape))
            row.add_(product.sum(-1, keepdim=True), alpha=LOG2E)
        return Features(weight, row, y)

    def mapped(self, x: Tensor, name: str) -> Tensor:
        """y = map·x̃ - offset, (BG, T, r)."""
        if self.map is None and self.offset is None:
            return x
        out = self.scratch(name + " y", *x.shape[:2], x.shape[2] if self.map is None else self.map.shape[1])
        if self.map is None:
            return torch.sub(x, self.offset[:, None], out=out)  # type: ignore[index]
        torch.bmm(x, self.map.mT, out=out)
        return out if self.offset is None else out.sub_(self.offset[:, None])

    def _accumulate(self, name: str, gradient: Tensor) -> None:
        if name in self.gradients:
            self.gradients[name].add_(gradient)
        else:
            self.gradients[name] = gradient.clone()

    def backward(self, change: Tensor, x: Tensor, y: Tensor, out: Tensor) -> None:
        """Adds dL/dx̃ to `out` (BG, T, d), given change = dL/dℓ (BG, T, m), to base e."""
        if self.needs["const"]:
            self._accumulate("const", change.sum(1))
        if self.omega is None:
            return
        if self.fused is not None:
            y = self.mapped(x, self.role)
        total = change.sum(-1, keepdim=True)
        dy = torch.bmm(change, self.omega, out=self.scratch("square", *y.shape)).addcmul_(total, y, value=-1)
        if self.needs["omega"]:
            self._accumulate("omega", torch.bmm(change.mT, y, out=self.scratch("domega", *self.omega.shape)))
        if self.map is None:
            out.add_(dy)
        else:
            out.baddbmm_(dy, self.map)
            if self.needs["map"]:
                self._accumulate("map", torch.bmm(dy.mT, x, out=self.scratch("dmap", *self.map.shape)))
        if self.needs["offset"]:
            self._accumulate("offset", dy.sum(1).neg_())
        if self.linear is not None:
            out.addcmul_(total, self.linear[:, None])
            if self.needs["linear"]:
                self._accumulate("linear", (total * x).sum(1))

    def form_gradients(self) -> list[Tensor | None]:
        """Gradients of the form's tensors, in its order, summed over the batch."""
        found = [self.gradients.get(name) for name in Form._fields]
        return [None if g is None else g.unflatten(0, (self.batch, -1)).sum(0) for g in found]
