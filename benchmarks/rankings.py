"""Five ways to rank the kv heads of SmolLM2-135M for softmax, and what each choice is worth on other text and numbers.

python benchmarks/rankings.py --out benchmarks/records/rankings.json

Elimination, slopes halfway and single ablations (`darkformer.sensitivity`); the error of a head's own output without
its far field, which calibration measures anyway; and gates trained on recall alone, as in DuoAttention (arXiv
2410.10819). Each order is scored with its first heads exact and window 256 elsewhere, on rows of `heads.py`. The first
two are made from a second text as well, to see how stable a choice is. What stands in the record is not computed again.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from heads import CONTEXT, DOMAINS, SINKS, Test, correlation, score
from torch import Tensor

from darkformer.calibration.mixed import EXACT, MixedAttention, checkpointed, decoder_layers
from darkformer.calibration.rows import Rows, recall_rows, text_rows
from darkformer.calibration.sensitivity import frozen, sensitivity
from darkformer.hf.load import demo_model_path, load_model, load_tokenizer
from darkformer.records import environment, read_json, write_json
from darkformer.train.data import load_documents, token_blocks

WINDOW = 256
#: Texts that heads are chosen on; the second is of a kind that the scores contain as well (other pages of it).
TEXTS = {"python documentation": ["pydoc"], "source code": [str(Path(os.__file__).parent / "unittest" / "*.py")]}
Order = list[list[int]]
TITLES = {"gradient": "slopes halfway"}


class OutputError(MixedAttention):
    """Exact attention that adds up, per kv head, what the residual stream would lose without the head's far field."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, SINKS)
        self.errors = [torch.zeros(layer.num_kv_heads, dtype=torch.float64) for layer in self.layers]

    def _mixed(self, index: int, received: Any) -> Tensor:
        groups = received.key.shape[1]
        masks = (None, None)
        full, local = (
            self._attend(w, list(range(groups)), received, masks) for w in (EXACT, WINDOW)
        )  # (B, G, R, L, d)
        weight = self.modules[index].o_proj.weight.float()
        parts = weight.unflatten(1, (groups, -1))  # (D, G, R·d)
        lost = (full - local).float().permute(0, 1, 3, 2, 4).flatten(3)  # (B, G, L, R·d)
        self.errors[index] += torch.einsum("bgld,ogd->gblo", lost, parts).square().flatten(1).sum(1).double()
        return full.flatten(1, 2)


@torch.no_grad()
def output_error(model: Any, rows: Rows) -> Order:
    """Heads by the squared error of what they add to the residual stream."""
    mixed = OutputError(model)
    with mixed.active(), torch.autocast("cpu", torch.bfloat16):
        for i in range(len(rows)):
            model.model(input_ids=rows.ids[i : i + 1], use_cache=False)
    values = {
        (layer.layer, g): float(mixed.errors[i][g])
        for i, layer in enumerate(mixed.layers)
        for g in range(layer.num_kv_heads)
    }
    return [list(head) for head in sorted(values, key=lambda head: -values[head])]


def gates(
    model: Any, rows: Rows, *, steps: int, rate: float = 0.05, penalty: float = 0.05, checkpoint: Path | None = None
) -> tuple[Order, dict[str, Any]]:
    """DuoAttention's gates: α per head, output = α·softmax + (1 - α)·window, α from 1 on pulled to 0 by its mean.

    The loss is the squared error of the last hidden states where numbers are recalled, relative to their square.
    """
    mixed = MixedAttention(model, SINKS)
    blocks = decoder_layers(model, mixed.modules) or ()
    scored = [(rows.labels[i] >= 0).nonzero()[:, 0] - 1 for i in range(len(rows))]

    def hidden(i: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.model(input_ids=rows.ids[i : i + 1], use_cache=False).last_hidden_state[0, scored[i]].float()

    heads = [layer.num_kv_heads for layer in mixed.layers]
    alpha = torch.ones(sum(heads), requires_grad=True)
    optimizer = torch.optim.Adam([alpha], lr=rate)
    first, history = 0, []
    if checkpoint is not None and checkpoint.is_file():
        kept = torch.load(checkpoint, weights_only=True)
        first, history = kept["step"], kept["history"]
        optimizer.load_state_dict(kept["optimizer"])
        with torch.no_grad():
            alpha.copy_(kept["alpha"])
    with torch.no_grad(), mixed.active():
        targets = [hidden(i) for i in range(len(rows))]
    for step in range(first, steps):
        i = step % len(rows)
        mixed.reset()
        for state, part in zip(mixed.states, alpha.split(heads), strict=True):
            state.others[WINDOW], state.gates[WINDOW] = list(range(len(part))), 1 - part
        with mixed.active(), checkpointed(mixed, blocks):
            error = (hidden(i) - targets[i]).square().sum() / targets[i].square().sum()
            loss = error + penalty * alpha.abs().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        with torch.no_grad():
            alpha.clamp_(0, 1)
        history.append([float(error.detach()), float(alpha.detach().mean())])
        print(f"gates, step {step + 1}: error {history[-1][0]:.4f}, mean gate {history[-1][1]:.3f}", flush=True)
        if checkpoint is not None and (step % 10 == 9 or step == steps - 1):
            torch.save(
                {"step": step + 1, "history": history, "alpha": alpha.detach(), "optimizer": optimizer.state_dict()},
                checkpoint,
            )
    mixed.reset()
    places = [[layer.layer, g] for layer in mixed.layers for g in range(layer.num_kv_heads)]
    values = alpha.detach().tolist()
    order = sorted(range(len(places)), key=lambda n: -values[n])
    return [places[n] for n in order], {"gates": [round(values[n], 4) for n in order], "history": history}


def shared(first: Sequence[Any], second: Sequence[Any], count: int) -> int:
    """Heads that are among the first `count` of both orders."""
    return len(set(map(tuple, first[:count])) & set(map(tuple, second[:count])))


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table: softmax's share and recalled numbers with the first heads of each order."""
    softmax, counts = (
        record["scores"]["softmax"],
        sorted({int(x) for x in next(iter(record["agreement"].values()))["shared"]}),
    )
    distances = sorted(softmax["recall"], key=int)

    def cells(name: str) -> list[str]:
        found = record["scores"].get(name)
        if found is None:
            return ["", ""]
        recalled = " / ".join(f"{found['recall'][d]['numbers']:.0%}" for d in distances)
        return [f"{found['accuracy'] / softmax['accuracy']:.1%}", recalled]

    heads = [x for count in counts for x in (f"{count} heads: accuracy", f"numbers at {', '.join(distances)}")]
    lines = [
        "| " + " | ".join(["order", "chosen on", "ρ with elimination", *heads]) + " |",
        "|---" * (3 + len(heads)) + "|",
    ]
    for name in record["orders"]:
        method, text = name.split(", ")
        with_elimination = " | ".join(sorted((name, f"elimination, {text}")))
        rank = record["agreement"].get(with_elimination, {"spearman": 1.0})["spearman"]
        row = [x for count in counts for x in cells(f"{name}, {count} heads")]
        lines.append("| " + " | ".join([TITLES.get(method, method), text, f"{rank:.2f}", *row]) + " |")
    for name in ("no head", "softmax"):
        row = cells(name) * len(counts)
        lines.append("| " + " | ".join([name, "", "", *row]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[6, 10, 16], help="Exact heads that are scored.")
    parser.add_argument("--steps", type=int, default=80, help="Steps of the gates, one row each.")
    parser.add_argument("--rows", type=int, default=12, help="Rows that are scored; each asks for three numbers.")
    parser.add_argument("--work", type=Path, default=Path("runs/rankings"), help="Folder of partial results.")
    parser.add_argument("--out", type=Path, required=True, help="The record (JSON); what is there is kept.")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(str(demo_model_path())), load_tokenizer(str(demo_model_path()))
    record = read_json(options.out) if options.out.is_file() else {"benchmark": "rankings", "orders": {}, "scores": {}}
    orders: dict[str, Any] = record["orders"]

    def order(name: str, make: Callable[[], tuple[Order, dict[str, Any]]]) -> None:
        if name not in orders:
            started = time.perf_counter()
            found, more = make()
            orders[name] = {"order": found, "seconds": round(time.perf_counter() - started, 1), **more}
            record["environment"] = environment()
            write_json(options.out, record)
            print(name, orders[name]["seconds"], "s", found[:10], flush=True)

    for number, (text, sources) in enumerate(TEXTS.items()):
        blocks = token_blocks(tokenizer, load_documents(sources), CONTEXT)
        batches = [blocks[i : i + 1] for i in range(1, len(blocks), max(1, len(blocks) // 4))][:4]

        def measured(method: str, rows: int, batches: Any = batches, text: str = text) -> tuple[Order, dict[str, Any]]:
            found = sensitivity(
                model, batches[:rows], tokenizer=tokenizer, method=method, window=WINDOW, prompts=rows,
                folder=options.work / f"{method} {text}",
            )  # fmt: skip
            return [list(head) for head in found.order], {"rows": rows}

        order(f"gradient, {text}", lambda: measured("gradient", 1))
        order(f"elimination, {text}", lambda: measured("elimination", 4))
        rows = text_rows(batches)
        order(f"output error, {text}", lambda rows=rows: (output_error(model, rows), {"rows": len(rows)}))
        if number == 0:
            order(f"ablation, {text}", lambda: measured("ablation", 1))
            prompts = recall_rows(tokenizer, rows, CONTEXT, 8, seed=3)
            with frozen(model):
                order(
                    f"gates, {text}",
                    lambda prompts=prompts: gates(
                        model, prompts, steps=options.steps, checkpoint=options.work / "gates.pt"
                    ),
                )
    record["agreement"] = {
        f"{a} | {b}": {
            "spearman": round(correlation(orders[a]["order"], orders[b]["order"]), 3),
            "shared": {str(n): shared(orders[a]["order"], orders[b]["order"], n) for n in options.heads},
        }
        for a in orders for b in orders if a < b
    }  # fmt: skip
    streams = []
    for pattern, part in DOMAINS.values():
        streams.append(token_blocks(tokenizer, load_documents([pattern]), CONTEXT)[part].flatten())
    test, mixed = Test(tokenizer, streams, options.rows, seed=4711), MixedAttention(model, SINKS)
    layers = [layer.layer for layer in mixed.layers]
    every = [layer.num_kv_heads for layer in mixed.layers]
    plans = {"softmax": [[EXACT] * n for n in every], "no head": [[WINDOW] * n for n in every]}
    for count in options.heads:
        for name in orders:
            plans[f"{name}, {count} heads"] = state = [[WINDOW] * n for n in every]
            for layer, head in orders[name]["order"][:count]:
                state[layers.index(layer)][head] = EXACT
    for name, windows in plans.items():
        if name not in record["scores"]:
            record["scores"][name] = found = score(model, mixed, test, windows, options.rows)
            record["environment"] = environment()
            write_json(options.out, record)
            print(name, {k: v for k, v in found.items() if k in ("accuracy", "loss", "recall")}, flush=True)


if __name__ == "__main__":
    main()
