"""Verdicts follow from records by the stated rules; pictures' numbers; the full size's launch file parses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GemmaConfig
from transformers.models.gemma import modeling_gemma
from typer.main import get_command

from darkformer.cli import app
from darkformer.research.reproduce import figure1, figure5, verdicts
from darkformer.research.reproduce.curves import accuracy_panel, gap_closed, score_table
from darkformer.research.reproduce.mechanism import shape_distance
from darkformer.research.reproduce.scales import FULL

ROOT = Path(__file__).parents[2]


def points(figure: str, base: str, ends: dict[str, float], seeds: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
    """A record: accuracy 0 at the start, half of the end's at step 5, `ends` at step 10."""
    return [
        {"kind": "point", "figure": figure, "base": base, "method": method, "seed": seed, "grid": False, "lr": 1e-3,
         "steps": 10, "step": step, "accuracy": share * end, "loss": 5 - share * end}
        for method, end in ends.items() for seed in seeds for step, share in ((0, 0.0), (5, 0.5), (10, 1.0))
    ]  # fmt: skip


def bands(**losses: list[float]) -> list[dict[str, Any]]:
    """Figure 5: every rate calm, but for the losses given as `method_rate-index`."""
    lines = []
    for method in figure5.TWO:
        for i, rate in enumerate(figure5.RATES):
            values = losses.get(f"{method}_{i}", [3.0] * 40)
            lines.append(
                {"kind": "run", "base": "grown", "method": method, "lr": rate, "losses": values, "diverged": None}
            )
    return lines


def costs(exponent: float) -> list[dict[str, Any]]:
    shape = figure1.WIDE._asdict()
    return [
        {"path": path, "length": n, "shape": shape, "seconds": (n / 1e4) ** power, "scratch_bytes": n}
        for path, power in (("sdpa", 2.0), ("chunked", exponent)) for n in (2048, 4096, 8192)
    ]  # fmt: skip


TOP = points("2-top", "small", {"exact": 0.5, "dark": 0.33, "performer": 0.3, "lfk": 0.32})
BOTTOM = points("2-bottom", "smollm2", {"exact": 0.5, "dark": 0.4, "performer": 0.3, "lfk": 0.35}, seeds=(0, 1))


def judged(letter: str, **records: Any) -> str:
    names = {"top": "2-top", "bottom": "2-bottom", "long": "3", "qkv": "4", "band": "5", "cost": "1"}
    found = verdicts.verdicts({names[key]: lines for key, lines in records.items()})
    return next(v.verdict for v in found if v.letter == letter)


def test_without_records_nothing_is_claimed() -> None:
    assert {v.verdict for v in verdicts.verdicts({})} == {"not finished"}
    assert judged("a", top=TOP) == "not finished"


def test_the_gap() -> None:
    assert gap_closed(BOTTOM, "smollm2") == pytest.approx(0.5)
    assert judged("a", top=TOP, bottom=BOTTOM) == "reproduced"
    worse = points("2-bottom", "smollm2", {"exact": 0.5, "dark": 0.305, "performer": 0.3})
    assert judged("a", top=TOP, bottom=worse) == "partly"
    none = points("2-top", "small", {"exact": 0.5, "dark": 0.3, "performer": 0.3})
    assert judged("a", top=none, bottom=points("2-bottom", "b", {"exact": 0.5, "dark": 0.2, "performer": 0.3})) == (
        "not reproduced"
    )


def test_a_diverged_run_gives_no_number() -> None:
    lines = [{**line, "accuracy": None} if line["method"] == "dark" and line["step"] == 10 else line for line in TOP]
    assert gap_closed(lines, "small") is None and judged("a", top=lines, bottom=BOTTOM) == "not finished"
    assert any("diverged" in cell for row in score_table(lines) for cell in row)


def test_lfk() -> None:
    assert judged("b", top=TOP, bottom=BOTTOM) == "reproduced"
    better = points("2-bottom", "smollm2", {"dark": 0.3, "lfk": 0.35})
    assert judged("b", top=TOP, bottom=better) == "partly"


def test_long_finetuning() -> None:
    assert judged("c", long=points("3", "grown", {"dark": 0.4, "performer": 0.3})) == "reproduced"
    assert judged("c", long=points("3", "grown", {"dark": 0.3, "performer": 0.4})) == "not reproduced"
    crossing = points("3", "grown", {"dark": 0.4, "performer": 0.3})
    crossing = [{**x, "accuracy": 0.1} if x["method"] == "dark" and x["step"] == 5 else x for x in crossing]
    assert judged("c", long=crossing) == "partly"


def test_qkv_only() -> None:
    assert judged("d", bottom=BOTTOM, qkv=points("4", "smollm2", {"dark": 0.45, "performer": 0.3})) == "reproduced"
    assert judged("d", bottom=BOTTOM, qkv=points("4", "smollm2", {"dark": 0.35, "performer": 0.3})) == "partly"
    assert judged("d", bottom=BOTTOM, qkv=points("4", "smollm2", {"dark": 0.3, "performer": 0.3})) == "not reproduced"


def test_missing_runs_are_said() -> None:
    long = points("3", "grown", {"dark": 0.4, "performer": 0.3})
    found = {v.letter: v for v in verdicts.verdicts({"3": long}, {"3": ["smollm2"], "4": ["smollm2"]})}
    assert found["c"].verdict == "so far: reproduced" and found["c"].numbers.endswith("; runs missing: 3 smollm2")
    assert found["d"].verdict == "not finished" and found["d"].numbers == "runs missing: 4 smollm2"
    assert found["e"].verdict == "not finished" and not found["e"].numbers


def test_stability() -> None:
    spiky = [3.0] * 30 + [6.0] + [3.0] * 9
    assert judged("e", band=bands(performer_3=spiky, dark_6=[])) == "reproduced"
    assert judged("e", band=bands(performer_3=spiky, performer_4=spiky, dark_5=spiky)) == "partly"
    assert judged("e", band=bands(dark_2=spiky)) == "not reproduced"
    assert judged("e", band=bands()[:-1]) == "not finished"


def test_cost() -> None:
    assert judged("f", cost=costs(1.05)) == "reproduced"
    assert judged("f", cost=costs(1.5)) == "partly"
    assert figure1.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_the_bands_of_a_curve_are_its_seeds() -> None:
    lines = BOTTOM + [{**x, "seed": 2, "accuracy": x["accuracy"] + 0.1} for x in BOTTOM if x["seed"] == 0]
    (curve,) = [c for c in accuracy_panel(lines, "smollm2").curves if c.title == "DARK"]
    assert curve.x == [0, 5, 10] and curve.band is not None
    assert curve.y[-1] == pytest.approx(100 * (0.4 + 0.1 / 3))
    assert (curve.band[0][-1], curve.band[1][-1]) == pytest.approx((40, 50))
    assert accuracy_panel(lines, "smollm2", log_x=True).curves[0].x == [5, 10]  # no step 0 on a logarithmic axis


def test_shape_distance() -> None:
    x = torch.randn(3, 8, 20, dtype=torch.float64)
    a, b = x @ x.mT, torch.eye(8, dtype=torch.float64).expand(3, -1, -1)
    assert torch.allclose(shape_distance(a, 7 * a), torch.zeros(3, dtype=torch.float64), atol=1e-3)  # scale is no shape
    assert torch.allclose(shape_distance(a, b), shape_distance(b, a), rtol=1e-3)
    spread = torch.linalg.eigvalsh(a).log().std(-1, correction=0)
    assert torch.allclose(shape_distance(b, a), spread, rtol=1e-2)


class TestFullSize:
    def test_the_launch_file(self) -> None:
        text = (ROOT / "recipes" / "reproduce-full.yaml").read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
        from accelerate.commands.config.config_args import ClusterConfig

        ClusterConfig(**settings)  # accelerate's own reading
        assert hasattr(modeling_gemma, settings["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"])
        for base in FULL.bases.values():
            assert base.batch_size % settings["num_processes"] == 0
        command = next(line for line in text.splitlines() if "accelerate launch" in line)
        words = command.split("darkformer.cli ")[1].split()
        flags = {flag for p in get_command(app).commands[words[0]].params for flag in p.opts}  # type: ignore[attr-defined]
        assert {word for word in words if word.startswith("--")} <= flags

    def test_its_attention_can_be_converted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # The same family at a hundredth of the width, through the same builder: nothing is downloaded.
        from darkformer import convert
        from darkformer.research.reproduce import bases
        from darkformer.research.reproduce.plan import form, planned

        small = GemmaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=8,
        )  # fmt: skip
        monkeypatch.setattr(bases.AutoConfig, "from_pretrained", lambda name: small)
        model = bases.make_model(FULL.bases["scratch"], 0, FULL, tmp_path)
        run = next(r for r in planned(FULL, ("2-top",)) if r.method == "dark")
        config = form(run, 16)
        assert config is not None
        convert(model, config)
        assert bool(torch.isfinite(model(input_ids=torch.arange(20)[None]).logits).all())
