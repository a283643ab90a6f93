"""Random problems against a formula in float64 that stands in this file alone: every backend, direction and gradient.

    python benchmarks/fuzz.py --cases 100000 --out benchmarks/records/fuzz.json
    python benchmarks/fuzz.py --cases 2000 --sanitize address    (or pages: guard pages around all working memory)

A case is made from (seed, number), so `--only N` repeats it. The record is written on the way, and the same command
goes on where it ended; a case that killed the process is then tried once more in a process of its own.

A fault is silent: a number that rounding does not explain, or NaN or infinity without an error, or an error that is
not the library's. NonFiniteError is right where float32 cannot hold the logits, and nowhere else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import darkformer
from darkformer.features.feature_map import LEARNED
from darkformer.ops import native
from darkformer.ops.assembled import assemble
from darkformer.ops.attention import BACKENDS, Backend
from darkformer.records import environment

#: Kinds of runs: backend and dtype. The step and `recurrent` take the last tokens one at a time.
RUNS = (
    ("native", torch.float32), ("native", torch.bfloat16), ("step", torch.float32), ("step", torch.bfloat16),
    ("chunked", torch.float32), ("chunked", torch.float64), ("recurrent", torch.float32), ("reference", torch.float32),
    ("assembled", torch.float32), ("exact", torch.float32),
)  # fmt: skip
METHODS = ("dark", "dark", "dark", "performer", "lfk", "local", "constant")
LOG_ZERO = -1e30
#: Logarithms from which float32 rounds by a quarter: a row whose largest logit is beyond may be refused.
HUGE = 2.0**20
#: Relative error of products with bfloat16 factors, and of float32 ones besides what logarithms lose.
ROUNDING = {torch.bfloat16: 3e-2, torch.float32: 2e-6, torch.float64: 1e-12}


@dataclass(frozen=True)
class Case:
    """One problem and the way it is run."""

    number: int
    seed: int
    backend: str
    dtype: str
    method: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    dim: int
    value_dim: int
    features: int
    window: int
    sinks: int
    padding: str  # none, left, right, interior
    causal: bool
    pieces: int  # calls that the sequence is cut into
    scale: float  # of queries and keys
    huge: str  # which token is far larger: none, query, key, both
    power: float  # by which factor
    weights: str  # of the proposal: none (isotropic), weighted, unweighted
    paper: bool
    softcap: float | None

    @property
    def classes(self) -> list[str]:
        """What the record counts."""
        direction = "causal" if self.causal else "bidirectional"
        run = "steps" if self.backend in ("step", "recurrent") else "pieces" if self.pieces > 1 else "whole"
        size = "huge" if self.huge != "none" else "large" if self.scale > 3 else "ordinary"
        return [
            f"{self.backend} {self.dtype}",
            self.method,
            direction,
            run,
            f"{size} inputs",
            f"padding {self.padding}",
        ]


def make_case(seed: int, number: int) -> Case:
    """The case of this number."""
    r = random.Random(f"{seed}/{number}")
    backend, dtype = r.choice(RUNS)
    steps = backend in ("step", "recurrent")
    method = "exact" if backend == "exact" else r.choice(METHODS)
    if backend in ("native", "step") and method == "constant":
        method = "dark"
    kv_heads = r.choice((1, 1, 2))
    dim, odd = r.choice(((8, False), (16, False), (32, False), (r.randint(1, 24), True)))
    paper = method in ("dark", "performer") and r.random() < 0.3
    window, sinks = (0, 0) if paper else (r.choice((0, 0, 1, 2, 5, 16, 64)), r.choice((0, 0, 1, 3)))
    if method == "local":
        window = max(window, 1)
    causal = backend not in ("chunked", "reference", "exact") or r.random() < 0.7
    # Method `exact` is torch's own attention.
    huge = "none" if method == "exact" else r.choice(("none",) * 9 + ("query", "key", "both"))
    return Case(
        number=number, seed=seed, backend=backend, dtype=str(dtype).removeprefix("torch."), method=method,
        batch=r.choice((1, 1, 2)), heads=kv_heads * r.choice((1, 2, 3)), kv_heads=kv_heads,
        length=r.choice((1, 2, r.randint(3, 40), r.randint(3, 40), r.randint(41, 100))), dim=dim,
        value_dim=r.randint(1, 24) if odd else dim, features=r.choice((8, 16, r.randint(1, 24))),
        window=window, sinks=sinks,
        padding="none" if steps else r.choice(("none", "none", "left", "right", "interior")),
        causal=causal, pieces=r.choice((1, 1, 2, 3)) if causal else 1,
        scale=r.choice((0.3, 1.0, 1.0, 1.0, 3.0, 10.0, 30.0, 100.0)),
        huge=huge, power=10.0 ** r.choice((r.uniform(1, 6), r.uniform(1, 38))),
        weights="none" if paper or method != "dark" else r.choice(("none", "none", "weighted", "unweighted")),
        paper=paper, softcap=r.choice((None, None, None, 5.0)) if backend != "native" else None,
    )  # fmt: skip


class Inputs(NamedTuple):
    query: Tensor  # (B, H, L, d)
    key: Tensor  # (B, G, L, d)
    value: Tensor  # (B, G, L, d_v)
    mask: Tensor  # (B, L)
    grad_output: Tensor  # (B, H, L, d_v)
    feature_map: darkformer.FeatureMap


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed * 1_000_003 + case.number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = {"method": case.method, "num_features": case.features, "window": case.window, "sinks": case.sinks}
    if case.paper:
        config = darkformer.DarkConfig.paper(case.features, method=case.method)
    else:
        proposal = "isotropic" if case.weights == "none" else "optimal"
        config = darkformer.DarkConfig(**sizes, proposal=proposal, proposal_weights=case.weights != "unweighted")
    fm = darkformer.feature_map(config, num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.dim)
    if case.dtype == "float64":
        fm = fm.double()
    with torch.no_grad():
        for x in fm.parameters():
            x.add_(0.2 * normal(*x.shape).to(x.dtype) / case.dim**0.5)
    if fm.proposal_root is not None:
        root = normal(case.kv_heads, case.dim, case.dim)
        fm.propose_(torch.eye(case.dim) + 0.1 * root @ root.mT)
    query, key = (case.scale * normal(case.batch, h, case.length, case.dim) for h in (case.heads, case.kv_heads))
    at = case.length // 2
    for name, x in (("query", query), ("key", key)):
        if case.huge in (name, "both"):
            x[:, :, at] *= case.power / x[:, :, at].abs().max()
    mask = torch.ones(case.batch, case.length, dtype=torch.bool)
    if case.padding == "interior":
        mask = torch.rand(case.batch, case.length, generator=generator) > 0.3
        mask[:, at] = True
    elif case.padding != "none":
        mask[-1, : case.length // 2] = False
        mask = mask.flip(1) if case.padding == "right" else mask
    dtype = getattr(torch, case.dtype)
    value, grad_output = (normal(case.batch, h, case.length, case.value_dim) for h in (case.kv_heads, case.heads))
    query, key, value, grad_output = (x.to(dtype) for x in (query, key, value, grad_output))
    return Inputs(query, key, value, mask, grad_output, fm)


class Expected(NamedTuple):
    output: Tensor  # (H, n, d_v) of a row's real tokens
    sums: Tensor  # (G, m, d_v + 1) over the far keys at the end, scaled by exp(-log_scale)
    log_scale: Tensor  # (G, m)
    key_size: Tensor  # (G, m): the largest term of a logarithm that has a share in the sums
    size: Tensor  # (H, n): the largest logarithm that has a share in the output, or term of one
    top: Tensor  # (H, n): the row's largest logit, and what float32 may have to hold beside it


def formula(case: Case, tensors: dict[str, Tensor], root: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Expected:
    """softmax over q·k of the keys seen exactly and log κ(q, k) of the others, as docs/theory.md writes it.

    κ(q, k) = e^β · e^{cᵀq + bᵀk - bᵀc} · mean_i w_i exp(ω_iᵀ(y_q + y_k) - ½‖y_q‖² - ½‖y_k‖²), y_q = M_q(q - b),
    y_k = M_k(k - c). One row: q (H, n, d), k (G, n, d), v (G, n, d_v), all float64; unscaled.
    """
    groups, n, dim = k.shape
    q, k = (x * dim**-0.25 for x in (q, k))  # the square root of the logits' scale, for each
    q = q.unflatten(0, (groups, -1))
    t = torch.arange(n)
    offset = t[:, None] - t
    seen = offset >= 0 if case.causal else torch.ones(n, n, dtype=torch.bool)
    near = (offset if case.causal else offset.abs()) < case.window
    near = near | (t < case.sinks)[None] if case.method != "exact" else torch.ones_like(near)
    logits = (q[:, :, :, None] * k[:, None, None]).sum(-1)
    terms = (q.abs()[:, :, :, None] * k.abs()[:, None, None]).sum(-1)  # of a logit, which may cancel
    sizes = logits.abs()
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    bias = tensors["far_bias"][:, None, None, None] if "far_bias" in tensors else 0.0
    lk, key_sizes = torch.zeros(groups, n, 0, dtype=torch.float64), None
    if case.method == "constant":
        kernel = torch.zeros_like(logits) + bias
        lk = torch.full((groups, n, case.features), -0.5 * math.log(case.features), dtype=torch.float64)
    elif case.method in ("dark", "performer", "lfk"):
        zero = torch.zeros(groups, dim, dtype=torch.float64)
        b, c = tensors.get("query_center", zero), tensors.get("key_center", zero)
        omega, m = tensors["projection"], case.features
        log_w = torch.zeros(groups, m, dtype=torch.float64)
        maps = []
        for side in ("query", "key"):
            x = torch.eye(dim, dtype=torch.float64).expand(groups, dim, dim)
            if root is not None and case.weights == "unweighted":
                x = root
            own = "key_geometry" if side == "key" and "key_geometry" in tensors else "geometry"
            for name in (own, f"{side}_balance"):
                x = x @ tensors[name] if name in tensors else x
            maps.append(x)
        if root is not None and case.weights == "weighted":
            drawn = omega @ root
            log_w = torch.linalg.slogdet(root).logabsdet[:, None] + (omega.square() - drawn.square()).sum(-1) / 2
            omega = drawn
        yq = (q - b[:, None, None]) @ maps[0][:, None].mT
        yk = (k - c[:, None]) @ maps[1].mT
        norm_q, norm_k = yq.square().sum(-1) / 2, yk.square().sum(-1) / 2
        dot_q, dot_k = yq @ omega[:, None].mT, yk @ omega.mT
        linear_q, linear_k = (q * c[:, None, None]).sum(-1), (k * b[:, None]).sum(-1)
        kernel = (dot_q[:, :, :, None] + dot_k[:, None, None] + log_w[:, None, None, None]).logsumexp(-1) - math.log(m)
        kernel = kernel - norm_k[:, None, None] + linear_k[:, None, None] - (b * c).sum(-1)[:, None, None, None] + bias
        own = linear_q - norm_q  # cancels where all keys are far
        kernel = kernel + (own[..., None] if case.window + case.sinks else 0.0)
        size_q = dot_q.abs().amax(-1) + (norm_q + linear_q.abs() if case.window + case.sinks else 0.0)
        far = size_q[..., None] + (norm_k + dot_k.abs().amax(-1) + linear_k.abs())[:, None, None]
        sizes = torch.where(near, sizes, far)
        lk = dot_k - norm_k[..., None] + linear_k[..., None] + (log_w[:, None] - math.log(m)) / 2
        key_sizes = dot_k.abs() + (norm_k + linear_k.abs())[..., None]
    weight = torch.where(near, logits, kernel) if lk.shape[-1] else logits
    visible = seen & near if not lk.shape[-1] else seen
    weight = weight.masked_fill(~visible, -torch.inf)
    share = weight.softmax(-1)
    gone = (t >= case.sinks) & (t < n - case.window)
    key_sizes = lk.abs() if key_sizes is None else key_sizes
    lk = lk.masked_fill(~gone[:, None], LOG_ZERO)
    log_scale = lk.amax(1).detach()
    entering = (lk - log_scale[:, None]).exp() * gone[:, None]
    key_size = (key_sizes * (entering > 1e-8)).amax(1).detach()
    ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    # Without causality `chunked` merges two passes, each of which may have to refuse what the other one outweighs.
    shown = share > 1e-8 if case.causal else visible.expand_as(share)
    top = torch.maximum(weight.amax(-1).abs(), (sizes * shown).amax(-1))
    size = (torch.where(near, terms, sizes) * (share > 1e-8)).amax(-1)
    return Expected(
        (share @ v[:, None]).flatten(0, 1), entering.mT @ ones, log_scale, key_size, size.flatten(0, 1).detach(),
        top.flatten(0, 1).detach(),
    )  # fmt: skip


def far_part(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """Stands in for flash-linear-attention."""
    rows = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, :, None].exp() + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, :, None] * state).sum(-2))
    return torch.stack(rows, 1)


def near_part(
    q: Tensor, k: Tensor, v: Tensor, seen: Callable[..., Tensor], scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Stands in for FlexAttention."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    b, t, j = (torch.arange(n) for n in (len(q), q.shape[2], k.shape[2]))
    mask = seen(b[:, None, None], b[:0], t[:, None], j)[:, None]
    logits = torch.where(mask, q @ k.mT * scaling, 0.0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = torch.where(mask, logits, LOG_ZERO)
    return logits.softmax(-1) * mask @ v, torch.where(mask.any(-1), logits.logsumexp(-1), LOG_ZERO)


ASSEMBLED = Backend("assembled", lambda problem: None, lambda problem: assemble(problem, far_part, near_part))


def library(case: Case, x: Inputs, leaves: list[Tensor]) -> tuple[Tensor, Any]:
    """Output (B, H, L, d_v) and the last state as the library computes them, in the case's pieces or steps."""
    backend = "recurrent" if case.backend == "step" else case.backend
    options: dict[str, Any] = {"softcap": case.softcap, "is_causal": case.causal}
    mask = None if case.padding == "none" else x.mask
    if not case.causal:
        return darkformer.attention(*leaves, x.feature_map, key_mask=mask, backend=backend, **options), None
    steps = case.backend in ("step", "recurrent")
    cuts = range(case.length + 1) if steps else [case.length * i // case.pieces for i in range(case.pieces + 1)]
    state, step, outputs = None, None, []
    for start, stop in itertools.pairwise(cuts):
        tokens = [y[:, :, start:stop] for y in leaves]
        if step is not None:
            outputs.append(step(*tokens))
            continue
        output, state = darkformer.attention(
            *tokens, x.feature_map, key_mask=None if mask is None else mask[:, start:stop], initial_state=state,
            return_state=True, backend=backend, **options,
        )  # fmt: skip
        outputs.append(output)
        if case.backend == "step":
            step = native.Step(state, x.feature_map, scaling=case.dim**-0.5, softcap=case.softcap)
    return torch.cat(outputs, 2), step.state() if step is not None else state


def worst(got: Tensor, want: Tensor, allowed: Tensor | float) -> float:
    """The largest error as a multiple of what is allowed; infinite for NaN."""
    limit = torch.as_tensor(allowed, dtype=torch.float64)
    excess = (got.detach().double() - want.detach()).abs() / limit
    excess = excess.nan_to_num(math.inf, math.inf).where(limit.isfinite(), 0)
    return excess.max().item() if excess.numel() else 0.0


def check(case: Case) -> str:
    """Runs a case. Returns "right", "refused", or what is wrong."""
    x = make_inputs(case)
    fm, dtype, differentiable = x.feature_map, getattr(torch, case.dtype), case.backend not in ("step", "recurrent")
    leaves = [y.clone().requires_grad_(differentiable) for y in x[:3]]
    learned = {name: y for name in LEARNED if (y := fm.learned(name)) is not None}
    names = [name for name in learned if getattr(fm, f"{name}_offset") is not None]
    tensors = {name: y.detach().double().requires_grad_(name in names) for name, y in learned.items()}
    root = None if fm.proposal_root is None else fm.proposal_root.double()
    exact_leaves = [y.double().requires_grad_() for y in x[:3]]
    rows = [
        formula(case, tensors, root, *(y[b, :, x.mask[b]] for y in exact_leaves)) if x.mask[b].any() else None
        for b in range(case.batch)
    ]
    largest = max((row.top.max().item() for row in rows if row is not None), default=0.0)
    beyond = largest > HUGE or (case.huge != "none" and case.power > 1e15)
    try:
        with torch.set_grad_enabled(differentiable):
            output, state = library(case, x, leaves)
            sums = None if state is None or case.method == "exact" else state
            loss = (output * x.grad_output).sum()
            wanted = [*leaves, *(getattr(fm, f"{name}_offset") for name in names)]
            grads = torch.autograd.grad(loss, wanted, allow_unused=True) if differentiable else ()
    except darkformer.errors.NonFiniteError as error:
        return "refused" if beyond else f"refused with logits up to {largest:.1e}: {error}"
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    if case.backend == "native" and dtype == torch.bfloat16:
        eps = 2.0**-16  # of logarithms: maps are sums of two bfloat16 matrices
    if case.backend == "assembled":
        eps *= 3  # products of decays, and two log-normalisers
    exact_loss, hull = torch.zeros((), dtype=torch.float64), x.value.double().abs().max().item()
    for b, row in enumerate(rows):
        if not bool((output[b, :, ~x.mask[b]] == 0).all()):
            return "the output at pads is not 0"
        if row is None:
            continue
        got = output[b, :, x.mask[b]]
        if not bool(got.isfinite().all()):
            return "the output is not finite"
        if got.abs().max().item() > 1.02 * hull:
            return f"the output {got.abs().max().item():.3g} is no mean of values up to {hull:.3g}"
        lost = eps * (8 + 8 * row.size)  # what a logit of this size loses, and so its weight
        allowed = torch.where(lost < 0.05, ROUNDING[dtype] + lost, torch.inf)[..., None] * hull
        if (error := worst(got, row.output, allowed)) > 1:
            return f"the output is wrong by {error:.1f} times what rounding explains"
        exact_loss = exact_loss + (row.output * x.grad_output[b, :, x.mask[b]].double()).sum()
        if sums is not None and case.method != "local":
            unit = (sums.log_scale[b].double() - row.log_scale).exp()[..., None]
            total = torch.cat([sums.feature_values[b], sums.feature_sum[b][..., None]], -1).double() * unit
            terms = torch.maximum(row.log_scale.abs().clamp_max(-LOG_ZERO / 2), row.key_size)
            lost = eps * (16 + 8 * terms)[..., None]  # as a logit loses
            size = row.sums[..., -1:].detach() * max(hull, 1)
            allowed = torch.where(lost < 0.05, ROUNDING[dtype] + lost, torch.inf) * size.clamp_min(1e-30)
            empty = row.log_scale == LOG_ZERO
            if not bool((sums.feature_sum[b][empty] == 0).all()) or worst(total, row.sums, allowed) > 1:
                return "the state is wrong"
    if not differentiable:
        return "right"
    if not any(row is not None for row in rows):
        return "right" if all(g is None or bool((g == 0).all()) for g in grads) else "pads have a gradient"
    size_of_rows = max(row.size.max().item() for row in rows if row is not None)
    tokens, tokens_size = x.mask.numel(), sum(y.abs().max().item() for y in x[:2])
    want = torch.autograd.grad(exact_loss, [*exact_leaves, *(tensors[name] for name in names)], allow_unused=True)
    for name, leaf, g, w in zip(["query", "key", "value", *names], wanted, grads, want, strict=True):
        g = torch.zeros_like(leaf) if g is None else g
        if not bool(g.isfinite().all()):
            return f"the gradient of {name} is not finite"
        w = torch.zeros_like(g, dtype=torch.float64) if w is None else w
        if name in ("query", "key", "value") and not bool((g[(~x.mask)[:, None].expand(g.shape[:3])] == 0).all()):
            return f"the gradient of {name} at pads is not 0"
        lost = eps * (32 + 32 * size_of_rows)
        # The terms that a gradient is the difference of: of a logit, times tokens and draws, in each of them.
        reach = 1.0 if name == "value" else 1 + tokens_size * case.dim**0.5
        floor = (
            1e-2 * x.grad_output.abs().max().item() * hull * reach * (tokens * case.dim if name in names else 1) ** 0.5
        )
        allowed = (ROUNDING[dtype] * 4 + lost) * max(w.abs().max().item(), floor)
        if lost < 0.02 and (error := worst(g, w, allowed)) > 1:
            return f"the gradient of {name} is wrong by {error:.1f} times what rounding explains"
    return "right"


def run_case(case: Case) -> str:
    """`check`, with any other exception as its words."""
    try:
        return check(case)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def run(seed: int, numbers: Iterable[int], record: dict[str, Any], before: Callable[[int], None] | None = None) -> None:
    """Runs these cases and adds them to the record's cases, refused, classes and faults."""
    BACKENDS["assembled"], original = ASSEMBLED, BACKENDS["assembled"]
    classes = Counter(record["classes"])
    try:
        for number in numbers:
            if before is not None:
                before(number)
            case = make_case(seed, number)
            answer = run_case(case)
            record["cases"] += 1
            record["refused"] += answer == "refused"
            classes.update(case.classes)
            if answer not in ("right", "refused"):
                record["faults"].append({"answer": answer, **asdict(case)})
            record["classes"] = dict(sorted(classes.items()))
    finally:
        BACKENDS["assembled"] = original


def new_record(seed: int) -> dict[str, Any]:
    """A record without cases."""
    return {"benchmark": "fuzz", "seed": seed, "cases": 0, "refused": 0, "seconds": 0.0, "classes": {}, "faults": []}


def sanitized(kind: str, arguments: list[str]) -> int:
    """Runs this program with a library that was built to notice what it does to memory."""
    changed = {"DARKFORMER_NATIVE_SANITIZE": kind, "ASAN_OPTIONS": "detect_leaks=0"}
    if kind == "address":
        found = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        changed["LD_PRELOAD"] = found.stdout.strip()
    return subprocess.run([sys.executable, __file__, *arguments], env=os.environ | changed, check=False).returncode


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="Cases in all, those of an earlier run included.")
    parser.add_argument("--seed", type=int, default=0, help="Of the cases.")
    parser.add_argument("--only", type=int, help="Runs this case alone and prints it.")
    parser.add_argument("--sanitize", choices=["pages", "address"], help="Builds the library with checks of memory.")
    parser.add_argument("--out", type=Path, help="Where to write the record (JSON); without it, print only.")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if options.sanitize and not os.environ.get("DARKFORMER_NATIVE_SANITIZE"):
        return sanitized(options.sanitize, sys.argv[1:])
    torch.set_num_threads(1)
    if reason := native.unavailable():
        raise SystemExit(f"the compiled attention is not available: {reason}")
    record = new_record(options.seed) | {"environment": environment(), "sanitize": options.sanitize}
    if options.only is not None:
        run(options.seed, [options.only], record)
        print(json.dumps(record["faults"] or asdict(make_case(options.seed, options.only)), indent=1))
        return bool(record["faults"])
    mark = None if options.out is None else options.out.with_suffix(".case")
    if options.out is not None and options.out.exists():
        earlier = json.loads(options.out.read_text(encoding="utf-8"))
        same = all(earlier[name] == record[name] for name in ("seed", "sanitize"))
        if not same or earlier["environment"]["commit"] != record["environment"]["commit"]:
            raise SystemExit(f"{options.out} is of another commit, seed or build: delete it or name another file.")
        record = earlier
    if mark is not None and mark.exists():  # the process ended in this case: did the case end it?
        number = int(mark.read_text())
        words = [sys.executable, __file__, "--seed", str(options.seed), "--only", str(number)]
        code = subprocess.run(words, capture_output=True, check=False).returncode
        if code not in (0, 1) and number >= record["cases"]:
            run(options.seed, range(record["cases"], number), record)
            record["cases"] += 1
            answer = f"the process ended with {code}"
            record["faults"].append({"answer": answer, **asdict(make_case(options.seed, number))})
    for start in range(record["cases"], options.cases, 500):
        began = time.monotonic()
        numbers = range(start, min(start + 500, options.cases))
        run(options.seed, numbers, record, None if mark is None else lambda n: mark.write_text(str(n)) and None)
        record["seconds"] = round(record["seconds"] + time.monotonic() - began, 1)
        print(f"{record['cases']} cases, {record['refused']} refused, {len(record['faults'])} faults", flush=True)
        if options.out is not None:
            part = options.out.with_suffix(".part")
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            part.replace(options.out)
    if mark is not None:
        mark.unlink(missing_ok=True)
    return bool(record["faults"])


if __name__ == "__main__":
    sys.exit(main())
