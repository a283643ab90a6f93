"""What one training step reads, writes and multiplies, operation by operation, from a shape alone.

Numbers are counted, not bytes: four bytes each in float32. An operation is what torch runs as one or a few kernels; it
reads its inputs and writes its outputs once. What a fused kernel writes and reads in its own buffers, such as a block
of logits, never crosses its border and is a column of its own. The estimate that training time follows these copies is
that of "Time Matters: Scaling Laws for Any Budget" (arXiv 2406.18922); the count is this library's own.

Letters: n tokens of a step, h hidden, f intermediate, H and G heads, d head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from ...config import DarkConfig
from ...cost import Work, linear_attention_work, softmax_attention_work
from .shape import Shape

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
#: Kinds of work that run at different speeds.
PRODUCT, SOFTMAX, LINEAR, ELEMENTWISE = "product", "softmax", "linear", "elementwise"
#: Kernels that make a layer's maps from what was learned, small as they are.
MAPS_FORWARD, MAPS_BACKWARD = 50, 40
#: What a fused attention kernel writes and reads in its own buffers: an exponential's argument and its value, once
#: each way; backward there are the gradients of both as well.
INSIDE_FORWARD, INSIDE_BACKWARD = 4, 8


class Operation(NamedTuple):
    """One line of the account."""

    name: str
    phase: str
    kind: str
    read: float
    written: float
    flops: float = 0.0  # a multiplication and an addition are two; elementwise arithmetic is not counted
    inside: float = 0.0  # numbers that a fused kernel writes and reads in its own buffers
    kernels: float = 1.0  # launches

    def times(self, count: float) -> Operation:
        """The operation, done `count` times."""
        return Operation(*self[:3], *(count * x for x in self[3:]))


class Totals(NamedTuple):
    """Sums over operations: numbers that cross kernels, and that stay inside fused ones; FLOPs by kind; launches."""

    moved: float
    inside: float
    product: float
    softmax: float
    linear: float
    kernels: float

    @property
    def copies(self) -> float:
        """All numbers read and written."""
        return self.moved + self.inside

    @property
    def flops(self) -> float:
        """FLOPs of every kind."""
        return self.product + self.softmax + self.linear


def totals(operations: Iterable[Operation]) -> Totals:
    """What operations come to together."""
    rows = list(operations)

    def flops(kind: str) -> float:
        return sum(row.flops for row in rows if row.kind == kind)

    return Totals(
        moved=sum(row.read + row.written for row in rows),
        inside=sum(row.inside for row in rows),
        product=flops(PRODUCT),
        softmax=flops(SOFTMAX),
        linear=flops(LINEAR),
        kernels=sum(row.kernels for row in rows),
    )


def _elementwise(
    name: str, size: float, forward: tuple[float, float, int], backward: tuple[float, float, int]
) -> list[Operation]:
    """Reads, writes (in multiples of `size` numbers) and kernels of both directions."""
    return [
        Operation(name, phase, ELEMENTWISE, read * size, written * size, kernels=kernels)
        for phase, (read, written, kernels) in ((FORWARD, forward), (BACKWARD, backward))
        if kernels
    ]


def product(name: str, n: float, k: float, p: float) -> list[Operation]:
    """(n, k) times a weight (k, p): y = x·W; then dx = dy·Wᵀ and dW = xᵀ·dy."""
    x, w, y = n * k, k * p, n * p
    return [
        Operation(name, FORWARD, PRODUCT, x + w, y, 2 * n * k * p),
        Operation(name, BACKWARD, PRODUCT, (y + w) + (x + y), x + w, 4 * n * k * p, kernels=2),
    ]


def rms_norm(size: float) -> list[Operation]:
    """x·rsqrt(mean x²)·weight in plain torch, as transformers writes it.

    Forward: x²; its mean; x·r; ·weight. Backward: of the weight, a product and its sum; of x·r, two products and a sum;
    of the mean, one spread over the row; of x², three products; the two gradients of x added up.
    """
    return _elementwise("norm", size, (4, 3, 6), (14, 9, 14))


def rotary(size: float) -> list[Operation]:
    """x·cos + rotate(x)·sin of queries and of keys, `size` numbers together.

    Forward: a product; a negation of one half, joined to the other; a product; their sum. Backward: two products, a
    negation, each half put into zeros of the whole size, three sums.
    """
    return _elementwise("rotary", size, (5.5, 4.5, 10), (8.5, 7.5, 16))


def activation(size: float, gated: bool) -> list[Operation]:
    """act(gate)·up: two kernels forward, three backward; without a gate one each."""
    return _elementwise("activation", size, *(((3, 2, 2), (6, 3, 3)) if gated else ((1, 1, 1), (2, 1, 1))))


def residual(size: float) -> list[Operation]:
    """x + branch(x); backward the gradients of both are added up."""
    return _elementwise("residual", size, (2, 1, 1), (2, 1, 1))


def shared_input(size: float, users: int) -> list[Operation]:
    """The gradients of a tensor that several products read are added up, one after the other."""
    return [
        Operation("shared input", BACKWARD, ELEMENTWISE, 2 * size, size).times(users - 1)
    ] if users > 1 else []  # fmt: skip


def embedding(n: float, shape: Shape) -> list[Operation]:
    """n rows of the table are copied; backward they are summed into a gradient of the whole table.

    Where the table gives the logits too, its two gradients are added up.
    """
    rows, table = n * shape.hidden, shape.vocabulary * shape.hidden
    tied = [Operation("embedding, tied", BACKWARD, ELEMENTWISE, 2 * table, table)] if shape.tied else []
    return [
        Operation("embedding", FORWARD, ELEMENTWISE, rows, rows),
        Operation("embedding", BACKWARD, ELEMENTWISE, rows, table),
        *tied,
    ]


def loss(n: float, shape: Shape) -> list[Operation]:
    """Logits, and their cross-entropy: log-softmax; backward one number a token in zeros, then softmax's gradient."""
    return [
        *product("logits", n, shape.hidden, shape.vocabulary),
        *_elementwise("loss", n * shape.vocabulary, (1, 1, 2), (2, 2, 2)),
    ]


def optimizer(parameters: float) -> list[Operation]:
    """The gradient's norm; clipping; AdamW: parameter, gradient and two moments read, all but the gradient written."""
    line = partial(Operation, phase=OPTIMIZER, kind=ELEMENTWISE)
    return [
        line("norm of the gradient", read=parameters, written=0.0),
        line("clipping", read=parameters, written=parameters),
        line("AdamW", read=4 * parameters, written=3 * parameters),
    ]


def casts(n: float, shape: Shape, layers: int) -> list[Operation]:
    """Autocast to bfloat16: products read a copy of their float32 input and weight, and give back float32 gradients.

    A weight is copied once a step, an input once for each product that reads it. Queries and keys leave the rotary
    embedding in float32; a residual branch gets its gradient in bfloat16.
    """
    inputs = (3 + shape.mlp_matrices - 1) * n * shape.hidden
    heads = n * (shape.heads + shape.kv_heads) * shape.head_dim
    layer = inputs + shape.layer_weights + heads
    logits = n * shape.hidden + shape.vocabulary * shape.hidden + n * shape.vocabulary
    kernels = 2 * (3 + shape.mlp_matrices) + 2
    return [
        Operation("casts", FORWARD, ELEMENTWISE, layer, layer, kernels=kernels).times(layers),
        Operation("casts", BACKWARD, ELEMENTWISE, *(layer + 2 * n * shape.hidden,) * 2, kernels=kernels).times(layers),
        Operation("logits, casts", FORWARD, ELEMENTWISE, logits, logits, kernels=3),
        Operation("logits, casts", BACKWARD, ELEMENTWISE, logits, logits, kernels=3),
    ]


def _fused(name: str, kind: str, query: float, key: float, works: Sequence[Work]) -> list[Operation]:
    """A kernel of attention: q, k, v in, the output out; backward those and the output's gradient in, three out.

    Args:
        query, key: numbers in the queries and in the keys. works: forward, and both directions together.
    """
    forward, whole = works
    return [
        Operation(
            name, FORWARD, kind, query + 2 * key, query, forward.flops, INSIDE_FORWARD * forward.exps
        ),
        Operation(
            name, BACKWARD, kind, 3 * query + 2 * key, query + 2 * key, whole.flops - forward.flops,
            INSIDE_BACKWARD * (whole.exps - forward.exps),
        ),
    ]  # fmt: skip


def attention(shape: Shape, batch: int, seq_len: int, config: DarkConfig | None, layer: int) -> list[Operation]:
    """Attention of one layer: softmax heads, heads of a window alone, heads with features.

    Products and exponentials are those of `darkformer.cost`. A layer whose heads differ copies its output once more to
    join them.

    Args:
        config: of a converted model; None: softmax everywhere. layer: its number.
    """
    group, n, d = shape.heads // shape.kv_heads, batch * seq_len, shape.head_dim
    if config is None or (layer in shape.sliding and not config.convert_sliding):
        config = DarkConfig(method="exact")
    heads = config.head_kinds(layer, shape.kv_heads)
    window = config.window_of(layer) + config.sinks
    rows: list[Operation] = []
    for name, part, features in (
        ("softmax", heads.exact, None),
        ("window", heads.local, 0),
        ("features", heads.features, config.feature_count),
    ):
        if not part:
            continue
        query, key = n * group * len(part) * d, n * len(part) * d
        sizes = {"batch": batch, "num_heads": group * len(part), "num_kv_heads": len(part), "head_dim": d}
        if features is None:
            works = [softmax_attention_work(seq_len, **sizes, backward=backward) for backward in (False, True)]
            rows += _fused(f"attention, {name}", SOFTMAX, query, key, works)
            continue
        works = [
            linear_attention_work(seq_len, **sizes, num_features=features, window=window, backward=backward)
            for backward in (False, True)
        ]
        rows += _fused(f"attention, {name}", LINEAR, query, key, works)
        rows += _elementwise("attention, layout", query, (1, 1, 1), (1, 1, 1))
        rows += _elementwise("attention, maps", 0, (0, 0, MAPS_FORWARD), (0, 0, MAPS_BACKWARD))
    if sum(map(bool, (heads.exact, heads.local, heads.features))) > 1:
        rows += _elementwise("attention, joined", n * shape.heads * d, (2, 2, 2), (2, 2, 2))
    return rows


def layer_operations(shape: Shape, batch: int, seq_len: int) -> list[Operation]:
    """One layer without its attention."""
    n, h, f = batch * seq_len, shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    gated = shape.mlp_matrices == 3
    rows = [row.times(shape.norms) for row in rms_norm(n * h)]
    rows += rms_norm(n * (query + key)) if shape.head_norms else []
    for name, k, p in (("query", h, query), ("key", h, key), ("value", h, key), ("output", query, h)):
        rows += product(name, n, k, p)
    rows += rotary(n * (query + key))
    for name in ("gate", "up")[-shape.mlp_matrices + 1 :]:
        rows += product(name, n, h, f)
    rows += [*product("down", n, f, h), *activation(n * f, gated)]
    rows += [*shared_input(n * h, 3), *shared_input(n * h, shape.mlp_matrices - 1)]
    return rows + [row.times(2) for row in residual(n * h)]


def step_operations(
    shape: Shape, batch: int, seq_len: int, config: DarkConfig | None = None, *, autocast: bool = False
) -> list[Operation]:
    """Every operation of one optimizer step on (batch, seq_len) tokens: forward, backward, AdamW.

    Args:
        config: the converted form of attention; None: softmax.
        autocast: under bfloat16 autocast, with its casts.
    """
    n = batch * seq_len
    rows = embedding(n, shape)
    rows += [row.times(shape.layers) for row in layer_operations(shape, batch, seq_len)]
    for layer in range(shape.layers):
        rows += attention(shape, batch, seq_len, config, layer)
    rows += [*rms_norm(n * shape.hidden), *loss(n, shape)]
    rows += casts(n, shape, shape.layers) if autocast else []
    return rows + optimizer(shape.parameters)


def forward_operations(
    shape: Shape, batch: int, seq_len: int, config: DarkConfig | None = None, *, autocast: bool = False,
    logits: bool = True,
) -> list[Operation]:  # fmt: skip
    """Those of one forward pass, with its logits and their loss or without."""
    rows = step_operations(shape, batch, seq_len, config, autocast=autocast)
    return [row for row in rows if row.phase == FORWARD and (logits or not row.name.startswith(("logits", "loss")))]


def training_bytes(shape: Shape, batch: int, seq_len: int, *, autocast: bool = False) -> float:
    """Bytes that a step holds at its peak: weights, AdamW's moments, gradients, and what backward needs of forward.

    Kept a layer: of each norm its input, the normalised rows and the product's input; q, k, v and the output of
    attention; in the MLP the gate, its activation, the other branch and their product. The loss keeps the
    log-probabilities and, at the start of backward, two gradients of their size; the weights' gradients come after.
    Under autocast products keep bfloat16 copies of inputs and weights.
    """
    n, h = batch * seq_len, shape.hidden
    heads = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    mlp = (4 if shape.mlp_matrices == 3 else 2) * shape.intermediate
    half = 2 if autocast else 4
    inputs = (3 + shape.mlp_matrices - 1 if autocast else 2) * h
    layer = n * (4 * 2 * shape.norms * h + half * (inputs + heads + mlp))
    weights = shape.parameters * (12 + (2 if autocast else 0))
    logits = n * shape.vocabulary * (12 + (2 if autocast else 0))
    return weights + shape.layers * layer + max(logits, 4 * shape.parameters)
