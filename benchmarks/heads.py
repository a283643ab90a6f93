"""Which kv heads of SmolLM2-135M keep softmax: what each way to choose them is worth on other text and other numbers.

python benchmarks/heads.py --out benchmarks/records/heads.json

Nothing is converted and no features are used: the chosen heads compute softmax, all others see a window and 4 sinks.
Heads are chosen on Python's documentation and scored on rows of 2,048 tokens of other domains, each of which tells
three numbers 1,900, 1,024 and 512 tokens before it asks for them, in words that the choice has not seen. What stands in
the record is not computed again.
"""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from darkformer.calibration.mixed import EXACT, MixedAttention
from darkformer.calibration.sensitivity import Sensitivity, sensitivity
from darkformer.calibration.window_changes import WindowChange, window_changes
from darkformer.hf.load import demo_model_path, load_model, load_tokenizer
from darkformer.records import environment, read_json, write_json
from darkformer.train.data import load_documents, token_blocks

CONTEXT, SINKS, CACHE = 2048, 4, 8192
DISTANCES = (1900, 1024, 512)
WORDINGS = (
    ("The pass key is {number}. Remember it.", " What is the pass key? The pass key is"),
    ("Our phone number is {number}, call any time.", " What is our phone number? Our phone number is"),
    (
        "The treasure was found on page {number} of the book.",
        " Where was the treasure found? The treasure was found on page",
    ),
)
#: Other domains than the choice's: documentation of perl, source code, licences. Blocks that are used of each.
DOMAINS: dict[str, tuple[str, slice]] = {
    "perl documentation": ("/usr/share/perl/*/**/*.pod", slice(20, 80)),
    "source code": (str(Path(os.__file__).parent / "email" / "*.py"), slice(4, 40)),
    "licences": ("/usr/share/common-licenses/[AG]*", slice(0, 8)),
}


class Test:
    """Rows with numbers in text of the domains in turn.

    Attributes:
        ids: (N, L). labels: (N, L), a token that is scored, else -1. kind: (N, L), the distance of a number's token,
            0 for text.
    """

    def __init__(self, tokenizer: Any, streams: Sequence[Tensor], rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(limit: int) -> int:
            return int(torch.randint(limit, (1,), generator=generator))

        def tokens(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False).input_ids)

        shape = (rows, CONTEXT)
        self.ids, self.labels, self.kind = (torch.full(shape, x) for x in (-1, -1, 0))
        for r in range(rows):
            ids, labels, kind = self.ids[r], self.labels[r], self.kind[r]
            numbers = [tokens(" " + "".join(str(draw(10)) for _ in range(5))) for _ in DISTANCES]
            said = [WORDINGS[i] for i in torch.randperm(len(WORDINGS), generator=generator).tolist()]
            questions = [tokens("\n\n" + asking) for _, asking in said]
            start = at = CONTEXT - sum(map(len, questions)) - sum(map(len, numbers))
            for i in torch.randperm(len(DISTANCES), generator=generator).tolist():
                asked = at + len(questions[i])
                ids[at:asked] = torch.tensor(questions[i])
                at = asked + len(numbers[i])
                ids[asked:at] = labels[asked:at] = torch.tensor(numbers[i])
                kind[asked:at] = DISTANCES[i]
                before, after = said[i][0].split(" {number}")
                head = tokens("\n\n" + before) + numbers[i]
                fact = head + tokens(after + "\n\n")
                place = asked - DISTANCES[i] - len(head)
                ids[place : place + len(fact)] = torch.tensor(fact)
            ids[0] = tokenizer.bos_token_id
            free = (ids < 0).nonzero()[:, 0]
            stream = streams[r % len(streams)]
            first = draw(len(stream) - len(free))
            ids[free] = stream[first : first + len(free)]
            follows = free[1:][free[1:] - free[:-1] == 1]  # text behind text
            labels[follows[follows < start]] = ids[follows[follows < start]]


@torch.no_grad()
def score(model: Any, mixed: MixedAttention, test: Test, windows: list[list[int]], rows: int) -> dict[str, Any]:
    """Accuracy and loss of the text by domain, recall by distance: whole numbers, and digits (the blank left out)."""
    weight = model.lm_head.weight.bfloat16()
    text = [[0.0, 0, 0] for _ in DOMAINS]
    recall = {distance: [0, 0, 0, 0] for distance in DISTANCES}
    mixed.reset(windows)
    for r in range(rows):
        with mixed.active(), torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=test.ids[r : r + 1], use_cache=False).last_hidden_state[0, :-1].bfloat16()
        labels, kind = test.labels[r, 1:], test.kind[r, 1:]
        right, losses = torch.zeros_like(labels, dtype=torch.bool), torch.zeros(len(labels))
        for part in (labels >= 0).nonzero()[:, 0].split(256):  # float32 logits are large
            logits = (hidden[part] @ weight.T).float()
            right[part] = logits.argmax(-1) == labels[part]
            losses[part] = F.cross_entropy(logits, labels[part], reduction="none")
        plain = (labels >= 0) & (kind == 0)
        domain = text[r % len(text)]
        domain[0] += float(losses[plain].sum())
        domain[1] += int(right[plain].sum())
        domain[2] += int(plain.sum())
        for distance, counts in recall.items():
            found = right[kind == distance]
            for i, x in enumerate((int(found.all()), 1, int(found[1:].sum()), len(found) - 1)):
                counts[i] += x
    loss, correct, count = (sum(x[i] for x in text) for i in range(3))
    exact = sum(window == EXACT for row in windows for window in row)
    keys = sum(window + SINKS for row in windows for window in row if window != EXACT)
    domains = {name: {"loss": x[0] / x[2], "accuracy": x[1] / x[2]} for name, x in zip(DOMAINS, text, strict=True)}
    return {
        "rows": rows, "exact_heads": exact, "accuracy": correct / count, "loss": loss / count,
        "share_of_cache": (exact + keys / CACHE) / sum(map(len, windows)),
        "domains": domains,
        "recall": {str(d): {"numbers": x[0] / x[1], "digits": x[2] / x[3]} for d, x in recall.items()},
        "windows": windows,
    }  # fmt: skip


def correlation(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Spearman's, of two orders of the same heads."""
    place = {tuple(head): i for i, head in enumerate(second)}
    pairs = torch.tensor([[i, place[tuple(head)]] for i, head in enumerate(first)], dtype=torch.float64)
    return float(torch.corrcoef(pairs.T)[0, 1])


def order_by(found: Sensitivity, value: Callable[[Any], float]) -> list[tuple[int, int]]:
    """Heads by one of the numbers alone."""
    return [(row.layer, row.head) for row in sorted(found.rows, key=value, reverse=True)]


def windows_within(
    changes: Sequence[WindowChange], layers: Sequence[int], gaps: dict[str, float], spare: float, cost: dict[int, float]
) -> dict[int, int]:
    """Layer → 128, 256 or 512 keys: the most is gained within `spare` bytes beside 256 everywhere.

    Layers grow in the order of what they gain a byte, as long as the bytes last or layers that shrink lose less.

    Args:
        changes: of 128 and 512 keys, at the state with 256 everywhere. gaps: what cutting all heads loses.
        spare, cost: bytes, of 256 keys in each layer; any unit.
    """
    total = {(layer, window): 0.0 for layer in layers for window in (128, 512)}
    for x in changes:
        total[x.layer, x.window] += x.text / gaps["text"] + (x.recall or 0.0) / gaps["recall"]
    gain = sorted((total[layer, 512] / cost[layer], layer) for layer in layers if cost[layer])
    loss = sorted((max(total[layer, 128], 0.0) / (cost[layer] / 2), layer) for layer in layers if cost[layer])
    found = dict.fromkeys(layers, 256)
    for value, layer in gain:
        if found[layer] != 256 or value >= 0:
            continue
        shrinking, freed = [], spare
        for lost, other in loss:
            if freed >= cost[layer]:
                break
            if other != layer and found[other] == 256 and lost < -value:
                shrinking.append(other)
                freed += cost[other] / 2
        if freed >= cost[layer]:
            found |= dict.fromkeys(shrinking, 128) | {layer: 512}
            spare = freed - cost[layer]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["elimination", "gradient"], help="Ways to choose.")
    parser.add_argument("--score", nargs="*", help="Orders that are scored; default all.")
    parser.add_argument("--measured-at", type=int, default=256, help="Window of a head that is cut, for the choice.")
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 128, 256], help="Windows of the other heads.")
    parser.add_argument("--heads", type=int, nargs="+", default=[0, 4, 6, 8, 9, 14, 18, 27], help="Exact heads.")
    parser.add_argument(
        "--budgets", nargs="*", default=["6:0.1", "14:0.2"], help="Exact heads : share of the cache, windows by layer."
    )
    parser.add_argument("--rows", type=int, default=15, help="Rows that are scored; each asks for three numbers.")
    parser.add_argument("--work", type=Path, default=Path("runs/heads"), help="Folder of the measurements.")
    parser.add_argument("--out", type=Path, required=True, help="The record (JSON); what is there is kept.")
    options = parser.parse_args()
    model, tokenizer = load_model(str(demo_model_path())), load_tokenizer(str(demo_model_path()))
    blocks = token_blocks(tokenizer, load_documents(["pydoc"]), CONTEXT)
    batches = [blocks[i : i + 1] for i in range(1, len(blocks), len(blocks) // 4)][:4]
    record = read_json(options.out) if options.out.is_file() else {"benchmark": "heads", "orders": {}, "scores": {}}
    orders: dict[str, Any] = record["orders"]
    for method in options.methods:
        if method not in orders:
            found = sensitivity(
                model, batches, tokenizer=tokenizer, method=method, window=options.measured_at,
                folder=options.work / method,
            )  # fmt: skip
            orders[method] = {"order": [list(head) for head in found.order], "sensitivity": found.to_dict()}
            orders[f"{method}, text alone"] = {"order": order_by(found, lambda row: row.text)}
            orders[f"{method}, recall alone"] = {"order": order_by(found, lambda row: row.recall)}
            write_json(options.out, record)
    record["correlation"] = {
        f"{a} | {b}": round(correlation(orders[a]["order"], orders[b]["order"]), 3)
        for a in orders for b in orders if a < b
    }  # fmt: skip
    streams = []
    for pattern, part in DOMAINS.values():
        texts = [Path(path).read_text(errors="ignore") for path in sorted(glob.glob(pattern, recursive=True))]
        streams.append(token_blocks(tokenizer, texts, CONTEXT)[part].flatten())
    test, mixed = Test(tokenizer, streams, options.rows, seed=777), MixedAttention(model, SINKS)
    heads, layers = mixed.layers[0].num_kv_heads, [layer.layer for layer in mixed.layers]
    plans = {"softmax": [[EXACT] * heads for _ in layers]}
    best, counts = options.methods[0], [int(text.split(":")[0]) for text in options.budgets]
    if counts and "changes" not in record:
        changes = window_changes(
            model, batches[:2], exact=map(tuple, orders[best]["order"][: counts[0]]), windows=256, others=[128, 512],
            tokenizer=tokenizer, seed=1,
        )  # fmt: skip
        record["changes"] = [asdict(x) for x in changes]
        write_json(options.out, record)
    for count, text in zip(counts, options.budgets, strict=True):
        exact = set(map(tuple, orders[best]["order"][:count]))
        measured = Sensitivity.from_dict(orders[best]["sensitivity"])
        gaps = {name: measured.cut[name] - measured.exact[name] for name in measured.exact}
        cost = {layer: 256 / CACHE * sum((layer, g) not in exact for g in range(heads)) for layer in layers}
        rest = len(layers) * heads - count
        spare = float(text.split(":")[1]) * len(layers) * heads - count - rest * SINKS / CACHE - sum(cost.values())
        changes = [WindowChange(**x) for x in record["changes"] if (x["layer"], x["head"]) not in exact]
        chosen = windows_within(changes, layers, gaps, spare, cost)
        plans[f"{best}, {count} exact, windows by layer"] = [
            [EXACT if (layer, g) in exact else chosen[layer] for g in range(heads)] for layer in layers
        ]
    for window in options.windows:
        for count in options.heads:
            for name in options.score or orders if count else ["no head"]:
                plans[f"{name}, {count} exact, window {window}"] = state = [[window] * heads for _ in layers]
                for layer, head in orders[name]["order"][:count] if count else ():
                    state[layers.index(layer)][head] = EXACT
    for name, windows in plans.items():
        if name not in record["scores"]:
            record["scores"][name] = found = score(model, mixed, test, windows, options.rows)
            record["environment"] = environment()
            write_json(options.out, record)
            print(name, {k: v for k, v in found.items() if k != "windows"}, flush=True)


if __name__ == "__main__":
    main()
