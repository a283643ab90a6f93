"""How much memory a large text takes: one file, read and tokenized as `linearize` does it.

    python benchmarks/large_text.py --bytes 1000000000 --out benchmarks/records/large-text.json

The file repeats the documentation of Python's modules. It is one document, in lines or (`--one-line`) without any.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from darkformer.console import RichReporter
from darkformer.hf.load import demo_model_path, load_tokenizer
from darkformer.records import environment, write_json
from darkformer.train.data import load_documents, pydoc_documents, tokens_of


def write_text(file: Path, size: int, *, one_line: bool) -> None:
    """Fills a file with `size` bytes of text."""
    text = "\n\n".join(pydoc_documents())
    piece = (text.replace("\n", " ") if one_line else text).encode("ascii", "ignore")
    with file.open("wb") as stream:
        for start in range(0, size, len(piece)):
            stream.write(piece[: size - start])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1_000_000_000, help="Size of the text.")
    parser.add_argument("--one-line", action="store_true", help="Without a line's end.")
    parser.add_argument("--out", type=Path, help="Where to write the record (JSON).")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "large.txt"
        write_text(file, options.bytes, one_line=options.one_line)
        tokenizer, started = load_tokenizer(str(demo_model_path())), time.perf_counter()
        before = environment()["peak_memory_bytes"]
        with RichReporter().stage("tokenize the text", options.bytes) as advance:
            tokens = tokens_of(tokenizer, load_documents([str(file)]), progress=advance)
    seconds = time.perf_counter() - started
    record = {
        "benchmark": "large_text", "bytes": options.bytes, "one_line": options.one_line, "tokens": len(tokens),
        "seconds": round(seconds, 1), "peak_before_bytes": before, "environment": environment(),
    }  # fmt: skip
    peak = record["environment"]["peak_memory_bytes"]
    print(f"{options.bytes / 1e6:,.0f} MB, {len(tokens):,} tokens, {seconds:,.0f} s, peak {peak / 2**30:.2f} GiB.")
    if options.out:
        write_json(options.out, record)


if __name__ == "__main__":
    main()
