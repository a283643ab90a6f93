"""The paths `darkformer bench` compares: this library's backends, torch's softmax, and peers if installed."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DarkConfig
from ..features.feature_map import FeatureMap
from ..ops import attention as door

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Largest ‖error‖/‖value‖ of a float32 path against float64; bfloat16: this many times the error of torch's softmax.
FLOAT32_ERROR, BFLOAT16_FACTOR = 5e-6, 1.3
#: Tokens of the parity check: several chunks and a ragged end. `reference` takes 3 GB at 331 and d = m = 256.
PARITY_LENGTH = 201

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """One operator: heads, sizes and window."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    features: int
    window: int

    def feature_map(self) -> FeatureMap:
        """The paper's form with window 0, else the library's own without sinks."""
        config = DarkConfig.paper(self.features)
        if self.window:
            config = DarkConfig(num_features=self.features, window=self.window, sinks=0)
        return FeatureMap(config, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.dim)

    def inputs(self, length: int, dtype: str, grad: bool = False) -> list[Tensor]:
        """Seeded query, key and value of one sequence."""
        generator = torch.Generator().manual_seed(length)
        made = []
        for heads in (self.heads, self.kv_heads, self.kv_heads):
            x = torch.randn(1, heads, length, self.dim, generator=generator).to(DTYPES[dtype])
            made.append(x.requires_grad_(grad))
        return made


class Path(NamedTuple):
    """A way to compute attention. `make` prepares a callable for a shape."""

    name: str
    make: Callable[[Shape], Call]
    peer: bool = False
    longest: int = 1 << 30  # tokens above which it would not fit or not end
    dtypes: tuple[str, ...] = tuple(DTYPES)


def _softmax(shape: Shape) -> Call:
    grouped = shape.heads != shape.kv_heads
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def _backend(name: str) -> Callable[[Shape], Call]:
    def make(shape: Shape) -> Call:
        made = shape.feature_map()
        return lambda q, k, v: door.attention(q, k, v, made, backend=name)  # type: ignore[return-value]

    return make


def _repeated(shape: Shape, call: Call) -> Call:
    """Peers take as many kv heads as query heads."""
    times = shape.heads // shape.kv_heads
    return lambda q, k, v: call(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))


def _darkformer_pytorch(shape: Shape) -> Call:
    package = importlib.import_module("darkformer_pytorch.attention")
    made = package.DarkformerKernelAttention(shape.dim, shape.heads, num_features=shape.features, causal=True)
    return _repeated(shape, lambda q, k, v: made(q, k, v))


def _performer_pytorch(shape: Shape) -> Call:
    package = importlib.import_module("performer_pytorch")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it found no CUDA code
        made = package.FastAttention(dim_heads=shape.dim, nb_features=shape.features, causal=True)
    return _repeated(shape, made)


def _fast_transformers(shape: Shape) -> Call:
    maps = importlib.import_module("fast_transformers.feature_maps")
    product = importlib.import_module("fast_transformers.causal_product").causal_dot_product
    favor = maps.Favor.factory(n_dims=2 * shape.features)(shape.dim)
    favor.new_feature_map("cpu")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fq, fk = favor.forward_queries(q), favor.forward_keys(k)
        normaliser = 1 / (torch.einsum("nhli,nhli->nhl", fq, fk.cumsum(2)) + 1e-6)
        return product(fq, fk, v) * normaliser[..., None]

    return _repeated(shape, call)


SOFTMAX = Path("sdpa", _softmax)
PEERS = (
    Path("darkformer-pytorch", _darkformer_pytorch, peer=True, longest=16384, dtypes=("float32",)),
    Path("performer-pytorch", _performer_pytorch, peer=True, longest=4096, dtypes=("float32",)),
    Path("pytorch-fast-transformers", _fast_transformers, peer=True, longest=16384, dtypes=("float32",)),
)


def own_paths() -> list[Path]:
    """The linear backends there are, fastest first: `native` only where it is registered."""
    return [Path(name, _backend(name)) for name in ("native", "chunked") if name in door.BACKENDS]


def why_not(path: Path, shape: Shape, dtype: str) -> str | None:
    """Why a path cannot be measured here, found by a call on 64 tokens; None if it can."""
    if dtype not in path.dtypes:
        return f"not offered in {dtype}"
    try:
        output = path.make(shape)(*shape.inputs(64, dtype))
    except Exception as error:  # whatever a foreign package raises is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None if bool(torch.isfinite(output).all()) else "its output holds NaN or infinity"


def _solve(call: Call, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Output and gradients, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = call(*leaves)
    output.backward(cotangent.to(output.dtype))
    return [x.detach().double() for x in (output, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def _errors(found: list[Tensor], want: list[Tensor]) -> dict[str, float]:
    names = ("output", "query", "key", "value")
    pairs = zip(names, found, want, strict=True)
    return {name: float((x - y).norm() / y.norm()) for name, x, y in pairs}


def parity(path: Path, shape: Shape, dtype: str) -> dict[str, Any]:
    """Compares output and gradients with `reference` in float64 on a small case.

    Returns:
        `errors` per tensor, `allowed` per tensor, and `passed`. A peer draws other features, so it has nothing to be
        compared with: `passed` is None.
    """
    if path.peer:
        return {"passed": None, "errors": {}, "allowed": {}}
    inputs = shape.inputs(PARITY_LENGTH, dtype)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(1, shape.heads, PARITY_LENGTH, shape.dim, generator=generator).to(DTYPES[dtype]).double()
    exact = [x.double() for x in inputs]
    softmax = _softmax(shape)
    if path is SOFTMAX:
        want = _solve(softmax, exact, cotangent)
    else:
        want = _solve(_backend("reference")(shape), exact, cotangent)
    allowed = dict.fromkeys(("output", "query", "key", "value"), FLOAT32_ERROR)
    if dtype == "bfloat16":
        own = _errors(_solve(softmax, inputs, cotangent), _solve(softmax, exact, cotangent))
        allowed = {name: BFLOAT16_FACTOR * error for name, error in own.items()}
    errors = _errors(_solve(path.make(shape), inputs, cotangent), want)
    return {"passed": all(errors[name] <= allowed[name] for name in errors), "errors": errors, "allowed": allowed}
