"""How much of the far field any m features could bring: attention of SmolLM2-135M with its far part cut to rank m.

python benchmarks/far_rank.py --out benchmarks/records/far-rank.json

A head with m features weighs every far key by a sum of m products, whatever the features are: where all queries of
a block see all of its keys, the block's weights have rank m at most. Taken are the queries of a sequence's second half
and the keys of its first half beyond the window, with the query heads that share a key's features side by side. In
place of their weights stand

- rank m: the nearest matrix of that rank (in squares; a truncated singular value decomposition, made for this very
  sequence, its signs free), which no m features can be nearer to the weights than;
- m clusters: the block's keys merged into so many of their own;
- m fixed features: chosen in advance, the first singular functions of these weights on other text;
- m drawn features: the default form with none switched off, calibrated on other text;
- softmax in the six heads of the 10 % budget, nothing in others.

Everything else stays softmax, nothing is trained. Recovery is (loss of nothing - loss) / (loss of nothing - loss of
softmax), over the second half. Sequences that are finished are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from tqdm import tqdm
from transformers import AttentionInterface

from darkformer import DarkConfig, calibrate, convert, load_model
from darkformer.features.affine import key_log_features, query_log_features
from darkformer.hf.layers import dark_layers
from darkformer.hf.load import demo_model_path, load_tokenizer
from darkformer.records import environment, read_json, write_json
from darkformer.train.data import load_documents, token_blocks

RECORD = Path(__file__).parent / "records" / "far-rank.json"
CONTEXT, SINKS, WINDOW = 2048, 4, 256
HALF = CONTEXT // 2
KEYS = slice(SINKS, HALF - WINDOW)  # far from every query of the second half
#: Queries, and keys, of other text that fixed features are made from; the clusters' rounds of Lloyd's algorithm.
LANDMARKS, LLOYD_STEPS = 1024, 12
#: The six heads of the 10 % budget (docs/budget.md), as (layer, kv head).
EXACT = ((7, 2), (8, 0), (17, 1), (18, 2), (20, 2), (23, 0))


class Block(NamedTuple):
    """The far part of one layer that is replaced, the query heads of a kv head side by side."""

    layer: int
    weights: Tensor  # (G, rows, keys), of softmax
    log_normalizer: Tensor  # (G, rows), of softmax over every key
    query: Tensor  # (G, rows, d), times √s
    key: Tensor  # (G, keys, d), times √s


Far = Callable[[Block], Tensor]


def of_rank(weights: Tensor, rank: int) -> Tensor:
    """The nearest matrices of a rank to (…, rows, keys), in squares."""
    keys = weights.shape[-1]
    if not 0 < rank < keys:
        return weights if rank else torch.zeros_like(weights)
    vectors = torch.linalg.eigh(weights.mT @ weights)[1][..., keys - rank :]
    return weights @ vectors @ vectors.mT


def every_head(rank: int) -> Far:
    """The block of every head cut to a rank."""
    return lambda block: of_rank(block.weights, rank)


def six_heads() -> Far:
    """Softmax in the heads of `EXACT`, nothing in the blocks of the others."""

    def far(block: Block) -> Tensor:
        found = torch.zeros_like(block.weights)
        for layer, head in EXACT:
            if layer == block.layer:
                found[head] = block.weights[head]
        return found

    return far


def drawn(num_features: int, blocks: Tensor) -> Far:
    """The default form's features beside this window, none switched off, calibrated on `blocks` (N, CONTEXT)."""
    model = load_model(str(demo_model_path()))
    convert(model, DarkConfig(window=WINDOW, sinks=SINKS, num_features=num_features, drop_features=False))
    calibrate(model, list(blocks.split(1)), drop=False)
    maps = {fm.layer: fm.parameters_for(torch.float64) for fm in dark_layers(model)}

    def far(block: Block) -> Tensor:
        parameters, rows = maps[block.layer], block.query.shape[1]
        at = torch.zeros(1, 1, dtype=torch.long)  # positions, which this form does not look at
        log_q = query_log_features(parameters, block.query[None].double(), at.expand(1, rows))[0]
        log_k = key_log_features(parameters, block.key[None].double(), at.expand(1, block.key.shape[1]))[0]
        return ((log_q - block.log_normalizer[..., None]).exp() @ log_k.exp().mT).float()

    return far


def fixed(rank: int, model: Any, attention: FarCut, blocks: Tensor) -> Far:
    """Features that are chosen in advance: singular functions of the weights on other text, `blocks`.

    Weights between `LANDMARKS` queries and as many keys of that text have a singular value decomposition; its first
    singular vectors, continued to other queries and keys (Nyström's way), are the features.
    """
    seen: dict[int, list[Block]] = {}
    generator, count = torch.Generator().manual_seed(0), LANDMARKS // len(blocks)

    def collect(block: Block) -> Tensor:
        rows = torch.randperm(block.query.shape[1], generator=generator)[:count]
        keys = torch.randperm(block.key.shape[1], generator=generator)[:count]
        chosen = block._replace(
            query=block.query[:, rows], key=block.key[:, keys], log_normalizer=block.log_normalizer[:, rows]
        )
        seen.setdefault(block.layer, []).append(chosen)
        return block.weights

    attention.far = collect
    with torch.inference_mode():
        for row in blocks:
            model.model(row[None], use_cache=False)
    maps = {}
    for layer, parts in seen.items():
        query, key = (torch.cat([getattr(x, name) for x in parts], 1) for name in ("query", "key"))
        log_z = torch.cat([x.log_normalizer for x in parts], 1)
        weights = (query @ key.mT - log_z[..., None]).double().exp()
        squares, vectors = torch.linalg.eigh(weights.mT @ weights)
        squares, vectors = squares[:, -rank:].clamp(min=1e-12), vectors[..., -rank:]
        maps[layer] = query, key, log_z, vectors, weights @ vectors / squares[:, None]

    def far(block: Block) -> Tensor:
        query, key, log_z, vectors, left = maps[block.layer]
        phi = (block.query @ key.mT - block.log_normalizer[..., None]).double().exp() @ vectors
        psi = left.mT @ (query @ block.key.mT - log_z[..., None]).double().exp()
        return (phi @ psi).float()

    return far


def clusters(count: int) -> Far:
    """The keys of the block merged into clusters of this sequence's own: one mean key each, and all their values."""

    def far(block: Block) -> Tensor:
        key, generator = block.key, torch.Generator().manual_seed(block.layer)
        center = key[:, torch.randperm(key.shape[1], generator=generator)[:count]].clone()
        for _ in range(LLOYD_STEPS):
            member = one_hot(torch.cdist(key, center).argmin(-1), count).float()
            size = member.sum(1)[..., None]
            center = torch.where(size > 0, member.mT @ key / size.clamp(min=1), center)
        return (block.query @ (member @ center).mT - block.log_normalizer[..., None]).exp()

    return far


class FarCut:
    """Softmax attention with its far block replaced."""

    name = "far-cut"

    def __init__(self) -> None:
        self.far: Far | None = None
        AttentionInterface.register(self.name, self)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """(1, H, L, d) and (1, G, L, d) → (1, L, H, d)."""
        groups, length = key.shape[1], key.shape[2]
        q, k, v = query[0].unflatten(0, (groups, -1)) * scaling**0.5, key[0] * scaling**0.5, value[0]
        logits = torch.einsum("grtd,gjd->grtj", q, k)
        logits.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        log_normalizer = logits.logsumexp(-1)
        weights = logits.sub_(log_normalizer[..., None]).exp_()
        if self.far is not None:
            rows, heads = slice(HALF, length), q.shape[1]
            block = Block(
                module.layer_idx, weights[:, :, rows, KEYS].flatten(1, 2), log_normalizer[:, :, rows].flatten(1, 2),
                q[:, :, rows].flatten(1, 2), k[:, KEYS],
            )  # fmt: skip
            near = 1 - block.weights.sum(-1)
            weights[:, :, rows, KEYS] = found = self.far(block).unflatten(1, (heads, -1))
            # Signs are free, and a block that takes more than it gives would turn the output around.
            total = near.unflatten(1, (heads, -1)) + found.sum(-1).clamp(min=0)
            weights[:, :, rows] /= total[..., None]
        return torch.einsum("grtj,gjd->tgrd", weights, v).flatten(1, 2)[None], None


def losses(model: Any, tokens: Tensor) -> dict[str, float]:
    """Mean loss and accuracy over the second half of one sequence (CONTEXT,)."""
    logits = model(tokens[None], use_cache=False, logits_to_keep=HALF + 1).logits[0, :-1]
    target = tokens[HALF:]
    return {
        "loss": float(cross_entropy(logits, target)),
        "accuracy": float((logits.argmax(-1) == target).float().mean()),
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: a row for each thing that stands for the far field."""
    rows = record["rows"]
    finished = [name for name, found in rows.items() if len(found) == len(rows["softmax"])]
    mean = {
        name: {field: fmean(x[field] for x in rows[name].values()) for field in ("loss", "accuracy")}
        for name in finished
    }
    none, full = mean["nothing"], mean["softmax"]
    lines = ["| far field | loss | of softmax's accuracy | recovery |", "|---|---:|---:|---:|"]
    for name, found in mean.items():
        share = (
            ""
            if name in ("nothing", "softmax")
            else f"{(none['loss'] - found['loss']) / (none['loss'] - full['loss']):.0%}"
        )
        lines.append(f"| {name} | {found['loss']:.3f} | {found['accuracy'] / full['accuracy']:.1%} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--texts", nargs="+", type=Path, default=sorted(Path("runs/text").glob("*.txt")),
        help="Scored; benchmarks/frontier_text.py writes those of the record.",
    )  # fmt: skip
    parser.add_argument("--blocks", type=int, default=1, help="Sequences of each text.")
    parser.add_argument("--ranks", type=int, nargs="*", default=[32, 128, 512], help="Ranks m.")
    parser.add_argument("--features", type=int, nargs="*", default=[128, 1024], help="Numbers of drawn features.")
    parser.add_argument("--data", nargs="+", default=["pydoc"], help="Text that features are calibrated on.")
    parser.add_argument("--out", type=Path, default=RECORD, help="The record; finished sequences are kept.")
    options = parser.parse_args()
    if not options.texts:
        parser.error("no texts to score: give --texts, or put some into runs/text")
    source = str(demo_model_path())
    tokenizer, attention, model = load_tokenizer(source), FarCut(), load_model(source)
    model.set_attn_implementation(attention.name)
    ways: dict[str, Callable[[], Far | None]] = {"softmax": lambda: None, "nothing": lambda: every_head(0)}
    text = token_blocks(tokenizer, load_documents(options.data), CONTEXT)[:6]
    for m in options.ranks:
        ways[f"rank {m}"] = partial(every_head, m)
    for m in options.ranks:
        ways[f"{m} clusters"] = partial(clusters, m)
    for m in (m for m in options.ranks if m <= LANDMARKS // 8):  # more are noise: 512 of 1,024 diverge
        ways[f"{m} fixed features"] = partial(fixed, m, model, attention, text[:4])
    for m in options.features:
        ways[f"{m} drawn features"] = partial(drawn, m, text)
    ways["softmax in six heads"] = six_heads
    record = read_json(options.out) if options.out.is_file() else {"rows": {}}
    record |= {"context": CONTEXT, "window": WINDOW, "sinks": SINKS, "environment": environment()}
    sequences = {
        f"{text.stem} {i}": row
        for text in options.texts
        for i, row in enumerate(token_blocks(tokenizer, load_documents([str(text)]), CONTEXT)[: options.blocks])
    }
    for way, make in tqdm(ways.items(), "ways"):
        found = record["rows"].setdefault(way, {})
        left = {name: row for name, row in sequences.items() if name not in found}
        if left:
            attention.far = make()
        for name, row in tqdm(left.items(), way, leave=False):
            with torch.inference_mode():
                found[name] = losses(model, row)
            write_json(options.out, record)
    print(table(record))


if __name__ == "__main__":
    main()
