"""How much of the far field any m features could bring: attention of SmolLM2-135M with its far part cut to rank m.

python benchmarks/far_rank.py --out benchmarks/records/far-rank.json

A head with m features weighs every far key by a sum of m products, whatever the features are: where all queries of
a block see all of its keys, the block's weights have rank m at most. Taken are the queries of a sequence's second half
and the keys of its first half beyond the window, with the query heads that share a key's features side by side. In
place of their weights stand

- rank m: the nearest matrix of that rank (in squares; a truncated singular value decomposition, made for this very
  sequence, its signs free), which no m features can be nearer to the weights than;
- m clusters: the block's keys merged into so many of their own;
- m fixed features: chosen in advance, the first singular functions of these weights on other text, from so many
  landmarks (queries, and as many keys);
- m own features: the same from landmarks of the very block, which shows what a change of text costs;
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

RECORDS = Path(__file__).parent / "records"
RECORD, FRONTIER = RECORDS / "far-rank.json", RECORDS / "frontier-smollm2.json"
CONTEXT, SINKS, WINDOW = 2048, 4, 256
HALF = CONTEXT // 2
KEYS = slice(SINKS, HALF - WINDOW)  # far from every query of the second half
#: Rounds of Lloyd's algorithm that clusters take.
LLOYD_STEPS = 12


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


def budget_heads() -> Far:
    """Softmax in the heads that the 10 % budget keeps exact (docs/budget.md), nothing in the blocks of the others."""
    (budget,) = (row for row in read_json(FRONTIER)["rows"] if row["name"] == "budget-10")
    config = DarkConfig.from_dict(budget["config"])

    def far(block: Block) -> Tensor:
        found = torch.zeros_like(block.weights)
        for head in config.head_kinds(block.layer, len(found)).exact:
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


class SingularFunctions:
    """The first singular functions of the weights between landmarks, continued to other queries and keys (Nyström).

    Args:
        query, key: (G, n, d) landmarks, times √s. log_normalizer: (G, n), of softmax over every key of the queries.
        ridge: added to the squared singular values, as a share of the largest; small ones are badly determined.
    """

    def __init__(self, query: Tensor, key: Tensor, log_normalizer: Tensor, rank: int, ridge: float) -> None:
        self.query, self.key, self.log_normalizer = query, key, log_normalizer
        weights = (query @ key.mT - log_normalizer[..., None]).double().exp()
        squares, vectors = torch.linalg.eigh(weights.mT @ weights)
        least = squares[:, -1:] * ridge
        squares, self.vectors = squares[:, -rank:].clamp(min=1e-12) + least, vectors[..., -rank:]
        self.left = weights @ self.vectors / squares[:, None]

    def __call__(self, block: Block) -> Tensor:
        """Weights of rank m in place of the block's."""
        phi = (block.query @ self.key.mT - block.log_normalizer[..., None]).double().exp() @ self.vectors
        psi = self.left.mT @ (self.query @ block.key.mT - self.log_normalizer[..., None]).double().exp()
        return (phi @ psi).float()


def landmarks(block: Block, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and log-normalizers of a block, `count` of each at most."""
    rows = torch.randperm(block.query.shape[1], generator=generator)[:count]
    keys = torch.randperm(block.key.shape[1], generator=generator)[:count]
    return block.query[:, rows], block.key[:, keys], block.log_normalizer[:, rows]


def fixed(rank: int, count: int, ridge: float, model: Any, attention: FarCut, blocks: Tensor) -> Far:
    """Features that are chosen in advance, from `count` landmarks of other text, `blocks`."""
    seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    generator = torch.Generator().manual_seed(0)

    def collect(block: Block) -> Tensor:
        seen.setdefault(block.layer, []).append(landmarks(block, count // len(blocks), generator))
        return block.weights

    attention.far = collect
    with torch.inference_mode():
        for row in blocks:
            model.model(row[None], use_cache=False)
    functions = {
        layer: SingularFunctions(*(torch.cat(x, 1) for x in zip(*parts, strict=True)), rank, ridge)
        for layer, parts in seen.items()
    }
    return lambda block: functions[block.layer](block)


def own(rank: int, count: int, ridge: float) -> Far:
    """Features from `count` landmarks of the block itself."""

    def far(block: Block) -> Tensor:
        generator = torch.Generator().manual_seed(block.layer)
        return SingularFunctions(*landmarks(block, count, generator), rank, ridge)(block)

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
    """Markdown: a row for each thing that stands for the far field; recovery in all, and of each text alone."""
    texts = list(record["rows"]["softmax"])
    rows = {way: found for way, found in record["rows"].items() if len(found) == len(texts)}
    losses = {way: [found[text]["loss"] for text in texts] for way, found in rows.items()}
    accuracy = {way: fmean(x["accuracy"] for x in found.values()) for way, found in rows.items()}

    def recovery(way: str, over: slice) -> str:
        nothing, found, softmax = (fmean(losses[name][over]) for name in ("nothing", way, "softmax"))
        return f"{(nothing - found) / (nothing - softmax):.0%}"

    lines = [
        f"| far field | loss | of softmax's accuracy | recovery | {' | '.join(texts)} |",
        "|---|" + "---:|" * (3 + len(texts)),
    ]
    for way in rows:
        parts = [slice(None), *(slice(i, i + 1) for i in range(len(texts)))]
        shares = ["" if way in ("nothing", "softmax") else recovery(way, part) for part in parts]
        cells = [way, f"{fmean(losses[way]):.3f}", f"{accuracy[way] / accuracy['softmax']:.1%}", *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--texts", nargs="+", type=Path, default=sorted(Path("runs/text").glob("*.txt")),
        help="Scored; benchmarks/frontier_text.py writes those of the record.",
    )  # fmt: skip
    parser.add_argument("--blocks", type=int, default=1, help="Sequences of each text.")
    parser.add_argument("--ranks", type=int, nargs="*", default=[32, 128, 512], help="Ranks m.")
    parser.add_argument(
        "--landmarks", type=int, nargs="*", default=[1024, 512, 2048, 512], help="Numbers of landmarks of features."
    )
    parser.add_argument(
        "--ridges", type=float, nargs="*", default=[0.0, 1e-6, 1e-6, 1e-4], help="Ridge of each of these numbers."
    )
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
    for count, ridge in zip(options.landmarks, options.ridges, strict=True):
        for m in (m for m in options.ranks if m <= count // 8):  # more are noise: 512 of 1,024 diverge
            name = f"{count:,} landmarks" + (f", ridge {ridge:g}" if ridge else "")
            ways[f"{m} fixed features, {name}"] = partial(fixed, m, count, ridge, model, attention, text[:4])
            if count <= KEYS.stop - KEYS.start:
                ways[f"{m} own features, {name}"] = partial(own, m, count, ridge)
    for m in options.features:
        ways[f"{m} drawn features"] = partial(drawn, m, text)
    ways["softmax in six heads"] = budget_heads
    record = read_json(options.out) if options.out.is_file() else {"rows": {}, "made": {}}
    record |= {"context": CONTEXT, "window": WINDOW, "sinks": SINKS}
    here = {"data": options.data, "blocks": options.blocks, "environment": environment()}
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
            record["made"][way] = here
        for name, row in tqdm(left.items(), way, leave=False):
            with torch.inference_mode():
                found[name] = losses(model, row)
            write_json(options.out, record)
    print(table(record))


if __name__ == "__main__":
    main()
