"""The command line: a table of verbs. Every option's help is the help of the configuration's field."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from ..config import DarkConfig, DemoConfig, TrainConfig, field_help, layer_windows_of  # fmt: skip
from ..errors import ConfigError, DarkformerError, import_problem

try:
    import typer
    from rich.console import Console
    from typer.core import TyperGroup

    from .native import app as native_app
except Exception as error:  # pragma: no cover - exercised in a bare environment
    if problem := import_problem(error, "the command line needs", "pip install 'darkformer[all]'"):
        raise problem from error
    raise

from .bench import register as register_bench
from .budget import register as register_budget
from .diagnose import register as register_diagnose
from .reproduce import register as register_reproduce

DARK, TRAIN, DEMO = DarkConfig(), TrainConfig(), DemoConfig()
console = Console()
errors = Console(stderr=True, highlight=False, markup=False)  # messages may hold brackets


class _Verbs(TyperGroup):
    """Says how to go on after Ctrl-C; typer alone would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            errors.print(f"{str(interrupt) or 'interrupted'}")
            errors.print("Run the same command again to continue (budget, linearize and reproduce: with --resume).")
            raise typer.Exit(130) from interrupt


app = typer.Typer(
    name="darkformer",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    help="Linear attention for pretrained transformers: convert, finetune, generate with constant-size state.",
    pretty_exceptions_enable=False,
)
app.add_typer(native_app, name="native")


def _dark(name: str, *flags: str) -> Any:
    return typer.Option(*flags, help=field_help(DarkConfig, name), rich_help_panel="Attention")


def _train(name: str, *flags: str) -> Any:
    return typer.Option(*flags, help=field_help(TrainConfig, name), rich_help_panel="Finetuning")


def _bench(flag: str, text: str, **options: Any) -> Any:
    return typer.Option(flag, help=text, rich_help_panel="Benchmarks", **options)


Method = Annotated[str, _dark("method", "--method")]
Features = Annotated[int, _dark("num_features", "--features")]
Window = Annotated[int, _dark("window", "--window")]
Sinks = Annotated[int, _dark("sinks", "--sinks")]
Center = Annotated[bool, _dark("center", "--center/--no-center")]
Balance = Annotated[bool, _dark("balance", "--balance/--no-balance")]
Tied = Annotated[bool, _dark("tied", "--tied/--untied")]
Draw = Annotated[str, _dark("draw", "--draw")]
Proposal = Annotated[str, _dark("proposal", "--proposal")]
ProposalWeights = Annotated[bool, _dark("proposal_weights", "--proposal-weights/--no-proposal-weights")]
ColdStart = Annotated[bool, _dark("cold_start", "--cold-start/--no-cold-start")]
FarBias = Annotated[bool, _dark("far_bias", "--far-bias/--no-far-bias")]
ConvertSliding = Annotated[bool, _dark("convert_sliding", "--convert-sliding/--keep-sliding")]
KeepExact = Annotated[list[str], _dark("keep_exact", "--keep-exact")]
NoFeatures = Annotated[list[str], _dark("no_features", "--no-features")]
LayerWindows = Annotated[list[str], _dark("layer_windows", "--layer-window")]
DropFeatures = Annotated[bool, _dark("drop_features", "--drop-features/--keep-features")]
BUDGET_HELP = (
    "Bytes one sequence may keep: a share of the softmax cache (10%), a size (64MB), or 0 for constant state. Which "
    "heads keep softmax, and the windows of the others, are chosen to lose least; --window does not count then."
)
Context = Annotated[
    int,
    typer.Option("--context", help="Tokens of the sequences that calibration, choice of heads and scores use.", min=2),
]
BudgetAt = Annotated[
    int, typer.Option("--budget-at", help="Tokens that a budget is counted at; 0: the most the model reads.", min=0)
]
Train = Annotated[str, _train("train", "--train")]
Steps = Annotated[int, _train("steps", "--steps")]
Lr = Annotated[float, _train("lr", "--lr")]
GeometryLr = Annotated[float, _train("geometry_lr", "--geometry-lr")]
SeqLen = Annotated[int, _train("seq_len", "--seq-len")]
BatchSize = Annotated[int, _train("batch_size", "--batch-size")]
SaveEvery = Annotated[int, _train("save_every", "--save-every")]
Dtype = Annotated[str, _train("dtype", "--dtype")]
RedrawEvery = Annotated[int, _train("redraw_every", "--redraw-every")]
Seed = Annotated[int, typer.Option(help="Seed of the projections and of the data order.")]
Paper = Annotated[
    bool,
    typer.Option(
        "--paper",
        help="The paper's exact form: window 0, sinks 0, no change of variables, M from the identity. Of the other "
        "attention options only --method, --features, --draw, --convert-sliding and --keep-exact count beside it.",
        rich_help_panel="Attention",
    ),
]
DATA_HELP = field_help(DemoConfig, "data")
Data = Annotated[list[str], typer.Option("--data", help=DATA_HELP)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output folder and start afresh.")]


@app.command()
def linearize(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or .gguf file of a decoder.", metavar="MODEL")],
    out: Annotated[Path, typer.Option("--out", help="Run folder: the model goes to OUT/model.")],
    data: Data = ["pydoc"],  # noqa: B006 - typer copies it
    held_out: Annotated[list[str], typer.Option("--held-out", help=f"Evaluation text. {DATA_HELP}")] = [],  # noqa: B006
    paper: Paper = False,
    method: Method = DARK.method,
    features: Features = DARK.num_features,
    window: Window = DARK.window,
    sinks: Sinks = DARK.sinks,
    center: Center = DARK.center,
    balance: Balance = DARK.balance,
    tied: Tied = DARK.tied,
    draw: Draw = DARK.draw,
    proposal: Proposal = DARK.proposal,
    proposal_weights: ProposalWeights = DARK.proposal_weights,
    cold_start: ColdStart = DARK.cold_start,
    far_bias: FarBias = DARK.far_bias,
    convert_sliding: ConvertSliding = DARK.convert_sliding,
    keep_exact: KeepExact = [],  # noqa: B006
    no_features: NoFeatures = [],  # noqa: B006
    layer_windows: LayerWindows = [],  # noqa: B006
    drop_features: DropFeatures = DARK.drop_features,
    memory: Annotated[str, typer.Option("--budget", help=BUDGET_HELP, rich_help_panel="Attention")] = "",
    budget_at: BudgetAt = 0,
    frontier: Annotated[
        bool,
        typer.Option("--frontier/--no-frontier", help="With --budget: measure and print other budgets first."),
    ] = True,
    context: Context = 2048,
    train: Train = TRAIN.train,
    steps: Steps = TRAIN.steps,
    lr: Lr = TRAIN.lr,
    geometry_lr: GeometryLr = TRAIN.geometry_lr,
    seq_len: SeqLen = TRAIN.seq_len,
    batch_size: BatchSize = TRAIN.batch_size,
    save_every: SaveEvery = TRAIN.save_every,
    dtype: Dtype = TrainConfig.dtype,
    redraw_every: RedrawEvery = TRAIN.redraw_every,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Replace a decoder's softmax attention by linear attention: convert, calibrate, finetune, save.

    Example: darkformer linearize HuggingFaceTB/SmolLM2-135M --data 'books/*.txt' --steps 500 --out runs/smol
    """
    from ..console import RichReporter
    from ..train.linearize import linearize as run

    if paper and memory:
        raise ConfigError("--paper with --budget: the paper's form has no exact part that a budget could choose.")
    if paper:
        config = DarkConfig.paper(
            features, method=method, draw=draw, seed=seed, convert_sliding=convert_sliding, keep_exact=tuple(keep_exact)
        )
    else:
        config = DarkConfig(
            method=method, num_features=features, window=window, sinks=sinks, center=center, balance=balance, tied=tied,
            draw=draw, proposal=proposal, proposal_weights=proposal_weights, cold_start=cold_start, far_bias=far_bias,
            convert_sliding=convert_sliding, keep_exact=tuple(keep_exact), no_features=tuple(no_features),
            layer_windows=layer_windows_of(layer_windows), drop_features=drop_features, seed=seed,
        )  # fmt: skip
    budget = TrainConfig(
        train=train, steps=steps, lr=lr, geometry_lr=geometry_lr, seq_len=seq_len, batch_size=batch_size,
        save_every=save_every, dtype=dtype, redraw_every=redraw_every, seed=seed,
    )  # fmt: skip
    before = _frontier(config, context, budget_at, dtype) if memory and frontier else None
    record = run(
        model, out, data=data, held_out=held_out, config=config, budget=budget, context=context, memory=memory or None,
        memory_at=budget_at or None, before=before, resume=resume, overwrite=overwrite, reporter=RichReporter(),
    )  # fmt: skip
    _print_scores(record["scores"])
    console.print(f"The model is in {out / 'model'}: darkformer generate {out} --prompt '…'", markup=False)


def _print_scores(scores: dict[str, dict[str, Any]], **options: Any) -> None:
    from ..evaluation.compare import print_scores

    print_scores(scores, console, **options)


def _frontier(config: DarkConfig, context: int, at: int, dtype: str) -> Any:
    """What `linearize` does before it trains: other budgets measured and printed."""
    from ..console import RichReporter
    from ..evaluation.budget import PICTURE, BudgetTask, measure_budgets
    from ..evaluation.frontier import FrontierSettings
    from ..evaluation.frontier_report import frontier_notes, frontier_table

    def before(model: Any, tokenizer: Any, blocks: Any, held_out: Any, out: Path) -> dict[str, Any]:
        task = BudgetTask(at=at or None, context=context)
        record = measure_budgets(
            model, tokenizer, blocks, held_out, out / "frontier", task, config, FrontierSettings(dtype=dtype),
            folder=out / "sensitivity", reporter=RichReporter(),
        )  # fmt: skip
        console.print(frontier_table(record))
        for note in frontier_notes(record):
            console.print(note, style="dim", markup=False)
        console.print(f"Picture: {out / 'frontier' / PICTURE}", markup=False)
        return record

    return before


def _model_folder(folder: str) -> str:
    """A run folder stands for the model inside it."""
    inner = Path(folder) / "model"
    return str(inner) if (inner / "config.json").is_file() else folder


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a run or model, hub id, or .gguf file.", metavar="DIR")],
    against: Annotated[str, typer.Option("--against", help="A second model to score on the same text.")] = "",
    data: Data = ["pydoc"],  # noqa: B006
    context: Annotated[int, typer.Option("--context", "--seq-len", help="Tokens of a scored sequence.", min=2)] = 2048,
    max_tokens: Annotated[int, typer.Option(help="Tokens to score at most; 0 takes all there are.", min=0)] = 8192,
    whole: Annotated[bool, typer.Option("--whole", help="Score all of --data, not its held-out eighth only.")] = False,
    dtype: Dtype = TrainConfig.dtype,
    tasks: Annotated[list[str], _bench("--tasks", "lm-eval task, group, tag, wildcard or YAML file. Repeat.")] = [],  # noqa: B006
    include_path: Annotated[str, _bench("--include-path", "Folder with lm-eval tasks of your own.")] = "",
    limit: Annotated[int, _bench("--limit", "Documents of an lm-eval task at most; 0 takes all.", min=0)] = 0,
    passkey: Annotated[bool, _bench("--recall", "Passkey recall against distance. Needs no data.")] = False,
    distances: Annotated[list[int], _bench("--distance", "Tokens from the number to its question. Repeat.")] = [],  # noqa: B006
    trials: Annotated[int, _bench("--trials", "Numbers asked for at each distance.", min=1)] = 20,
    batch_size: Annotated[int, _bench("--batch-size", "Prompts in one forward pass.", min=1)] = 4,
    out: Annotated[Path, _bench("--out", "Folder of evaluation.json and the plot.")] = Path("runs/evaluate"),
) -> None:
    """Loss, perplexity and next-token accuracy on text that linearize held out (every eighth document of --data).

    In all and by the token's position in its sequence, as tables, a plot and a record in --out. With --tasks or
    --recall: those benchmarks instead.
    """
    from ..console import RichReporter
    from ..evaluation import compare as evaluation
    from ..evaluation.recall import DISTANCES, RecallTask

    reporter, names = RichReporter(), [_model_folder(name) for name in (model, against) if name]
    if not tasks and not passkey:
        record = evaluation.text_scores(
            names, data, out, reporter, context=context, dtype=dtype, max_tokens=max_tokens, whole=whole
        )
        scores = {name: row["text"] for name, row in record["models"].items()}
        _print_scores(scores, positions=True)
        console.print(f"Record: {out / evaluation.RECORD}", markup=False)
        return
    chosen = {"tasks": tasks, "include_path": include_path, "batch_size": batch_size, "limit": limit}
    asked = RecallTask(tuple(distances) or DISTANCES, trials, batch_size=batch_size) if passkey else None
    record = evaluation.benchmark(names, out, reporter, tasks=chosen if tasks else None, asked=asked)
    evaluation.print_benchmark(record, console)
    console.print(f"Record: {out / evaluation.RECORD}", markup=False)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder of a run or model, hub id, or .gguf file.", metavar="DIR")],
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to generate at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt, token by token as they come; only softmax that was kept makes the state grow."""
    import torch
    from transformers import TextStreamer

    from ..evaluation.generation import generate_text
    from ..hf.load import load_model, load_tokenizer

    folder = _model_folder(model)
    tokenizer = load_tokenizer(folder)
    network = load_model(folder)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    done = generate_text(network, tokenizer, prompt, max_new_tokens, streamer=streamer, **sampling)
    console.print(
        f"[dim]{done['tokens']} tokens, {done['tokens_per_second']:.1f} tokens/s, "
        f"cache {done['cache_bytes'] / 1e6:.2f} MB[/dim]"
    )


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Run folder of linearize.", metavar="RUN")],
    repo: Annotated[str, typer.Argument(help="Name on the hub: ACCOUNT/NAME.", metavar="REPO")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a run's model to the Hugging Face hub, with a model card written from its record."""
    from ..train.card import push_run

    console.print(push_run(run, repo, private=private), markup=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/demo"),
    model: Annotated[str, typer.Option("--model", help=field_help(DemoConfig, "model"))] = DEMO.model,
    data: Data = ["pydoc"],  # noqa: B006
    context: Annotated[int, typer.Option(help=field_help(DemoConfig, "context"), min=2)] = DEMO.context,
    attention_budget: Annotated[str, typer.Option("--budget", help=field_help(DemoConfig, "budget"))] = DEMO.budget,
    eval_tokens: Annotated[int, typer.Option(help=field_help(DemoConfig, "eval_tokens"), min=1)] = DEMO.eval_tokens,
    prompt: Annotated[str, typer.Option(help=field_help(DemoConfig, "prompt"))] = DEMO.prompt,
    new_tokens: Annotated[int, typer.Option(help=field_help(DemoConfig, "new_tokens"), min=1)] = DEMO.new_tokens,
    features: Features = DARK.num_features,
    sinks: Sinks = DARK.sinks,
    train: Train = TRAIN.train,
    steps: Steps = 0,
    lr: Lr = TRAIN.lr,
    geometry_lr: GeometryLr = TRAIN.geometry_lr,
    seq_len: SeqLen = TRAIN.seq_len,
    batch_size: BatchSize = TRAIN.batch_size,
    dtype: Dtype = TrainConfig.dtype,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Linearize a real pretrained model within budgets and compare with softmax: table, plots, report, saved model.

    Nothing trains unless --steps says so. Ctrl-C stops at the next step; running it again continues there.
    """
    from ..console import RichReporter
    from ..evaluation.demo import Demo
    from ..evaluation.demo_report import print_demo

    budget = TrainConfig(
        train=train, steps=steps, lr=lr, geometry_lr=geometry_lr, seq_len=seq_len, batch_size=batch_size, dtype=dtype,
        seed=seed,
    )  # fmt: skip
    default = DarkConfig(num_features=features, sinks=sinks, seed=seed)
    settings = DemoConfig(model, tuple(data), context, attention_budget, eval_tokens, prompt, new_tokens)
    record = Demo(settings, default, budget, out, RichReporter()).run(overwrite=overwrite)
    print_demo(record, console)
    console.print(
        f"Report: {out / 'report.html'}   record: {out / 'record.json'}   model: {out / 'model'}", markup=False
    )


register_bench(app, console)
register_budget(app, console)
register_diagnose(app, console)
register_reproduce(app, console)


def main() -> None:
    """Entry point: one clear line for errors of this library."""
    try:
        app()
    except DarkformerError as error:
        errors.print(f"error: {error}")
        sys.exit(1)
    except ImportError as error:
        problem = import_problem(error, "this command needs the package", "pip install 'darkformer[all]'")
        if problem is None:
            raise
        errors.print(f"error: {problem}")
        sys.exit(1)


if __name__ == "__main__":
    main()
