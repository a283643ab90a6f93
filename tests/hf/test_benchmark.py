"""The generation benchmark runs and measures what it says, on a tiny model."""

import importlib.util
from pathlib import Path

from darkformer import DarkConfig, cost
from hf.families import tiny

FILE = Path(__file__).parents[2] / "benchmarks" / "generation.py"


def test_both_rows(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generation_benchmark", FILE)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    tiny("llama").save_pretrained(tmp_path)
    options = benchmark.parse(
        ["--model", str(tmp_path), "--new", "5", "--repeats", "2", "--features", "16", "--window", "8"]
    )
    softmax, ours = (benchmark.measure(options, kind, 70) for kind in benchmark.KINDS)
    assert softmax["cache_bytes_after_prompt"] == 3 * cost.kv_cache_bytes(70, num_kv_heads=2, head_dim=8)
    assert softmax["cache_bytes_after_all"] == 3 * cost.kv_cache_bytes(75, num_kv_heads=2, head_dim=8)
    config = DarkConfig(num_features=16, window=8, sinks=4)
    state = 3 * cost.state_bytes(config, num_kv_heads=2, head_dim=8)
    assert ours["cache_bytes_after_prompt"] == ours["cache_bytes_after_all"] == state
    assert all(row["decode_tokens_per_second"]["runs"] == 2 for row in (softmax, ours))
