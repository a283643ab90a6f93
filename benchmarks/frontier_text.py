"""Text of three kinds that every machine with this library has, for scores on what nothing was chosen or calibrated on.

python benchmarks/frontier_text.py runs/text   # then: darkformer budget MODEL --held-out 'runs/text/*.txt' …
"""

from __future__ import annotations

import argparse
import importlib.util
import sysconfig
from importlib.metadata import files
from pathlib import Path

#: Modules of the standard library whose source code is read, and pages of Perl's documentation, if there are any.
MODULES = ("argparse", "tarfile", "statistics", "zipfile", "mailbox")
PERL = Path("/usr/share/perl")


def source_code() -> str:
    """Python source code: the standard library's own."""
    specs = [importlib.util.find_spec(name) for name in MODULES]
    return "\n\n".join(Path(spec.origin).read_text("utf-8") for spec in specs if spec and spec.origin)


def licences() -> str:
    """Legal prose: licences that come with installed packages."""
    found = [Path(str(file.locate())) for name in ("torch", "numpy", "matplotlib") for file in files(name) or ()]
    chosen = [path for path in found if "LICENSE" in path.name.upper() or "NOTICE" in path.name.upper()]
    return "\n\n".join(path.read_text("utf-8", errors="replace") for path in sorted(chosen))


def documentation() -> str:
    """Documentation of another language, Perl's; else the docstrings of modules that `pydoc` topics do not hold."""
    pages = sorted(PERL.rglob("*.pod"))
    if pages:
        return "\n\n".join(page.read_text("utf-8", errors="replace") for page in pages)
    library = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join(page.read_text("utf-8", errors="replace") for page in sorted(library.glob("*.txt")))


def main() -> None:
    """Writes the three files, of `--characters` each, from a part in the middle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", type=int, default=36_000, help="of each kind")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for make in (documentation, licences, source_code):
        text = make()
        start = max(0, (len(text) - arguments.characters) // 2)
        file = arguments.out / f"{make.__name__}.txt"
        file.write_text(text[start : start + arguments.characters], encoding="utf-8")
        print(f"{file}: {len(text):,} characters, {arguments.characters:,} of them written")


if __name__ == "__main__":
    main()
