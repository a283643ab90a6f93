"""The house rules: imports flow one way, the core stays light, versions agree."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "darkformer"
MAX_WEIGHTS_BYTES = 1_000_000

# In this order: each may import what stands before it.
ORDER = (
    "_version", "errors", "config", "cost", "features", "ops", "vllm", "hf", "records", "reporting", "console",
    "calibration", "train", "plots", "evaluation", "diagnostics", "research", "cli", "__main__",
)  # fmt: skip
MAY_IMPORT = {name: set(ORDER[:rank]) for rank, name in enumerate(ORDER)}
# "" is the package's own door (`import darkformer`), which pulls in every layer below these.
for _name in ("evaluation", "diagnostics", "research", "cli"):
    MAY_IMPORT[_name].add("")

SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """`src/darkformer/ops/chunked.py` -> `darkformer.ops.chunked`; a package's `__init__` is the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_units(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and top-level module ("" for the package's door) of every import of darkformer, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            targets = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in targets:
            root, _, rest = base.partition(".")
            if root != "darkformer":
                continue
            unit = rest.split(".")[0]
            # `from darkformer import ops` names a module, `from darkformer import convert` goes through the door.
            yield node.lineno, unit or (name if name in MAY_IMPORT else "")


def layer_violations(source: str, module: str, is_package: bool = False) -> list[str]:
    unit = module.split(".")[1]
    assert unit in MAY_IMPORT, f"{module} has no place among the layers: give it one in MAY_IMPORT"
    allowed = MAY_IMPORT[unit] | {unit}
    return [
        f"{module}:{line} ({unit}) imports {f'darkformer.{target}' if target else 'the package darkformer itself'}"
        for line, target in imported_units(source, module, is_package)
        if target not in allowed
    ]


def pinned() -> dict[str, str]:
    """Name -> exact version, from constraints.txt."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): version for name, version in pairs}


def declared() -> list[Requirement]:
    """Every third-party requirement of pyproject.toml, core and extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != "darkformer"]


def test_imports_flow_one_way() -> None:
    found = []
    for path in SOURCES:
        if path != PACKAGE / "__init__.py":
            found += layer_violations(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("darkformer.errors", "from . import config"),
        ("darkformer.evaluation.recall", "from ..research import bench"),
        ("darkformer.features.feature_map", "import darkformer.ops.chunked"),
        ("darkformer.features.feature_map", "from darkformer import hf"),
        ("darkformer.features.feature_map", "from .. import ops"),
        ("darkformer.hf.convert", "def late():\n    from ..train.linearize import linearize"),
        ("darkformer.hf.convert", "from darkformer import convert"),
        ("darkformer.config", "from .features import maps"),
        ("darkformer.cost", "if TYPE_CHECKING:\n    from darkformer.hf import cache"),
        ("darkformer.plots", "from .evaluation import frontier"),
    ],
)
def test_a_violation_is_found(module: str, source: str) -> None:
    assert len(layer_violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "darkformer.hf.convert",
            "import torch\nfrom ..config import DarkConfig\nfrom .cache import X\nfrom . import y",
        ),
        (
            "darkformer.calibration.calibrate",
            "from darkformer import config, ops\nfrom darkformer.hf.convert import walk",
        ),
        ("darkformer.plots", "from .errors import DarkformerError"),
        (
            "darkformer.evaluation.demo",
            "import darkformer\nfrom darkformer import plots, cost\nfrom .. import _version",
        ),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert not layer_violations(source, module)


def test_relative_imports_of_a_package_start_at_the_package() -> None:
    assert list(imported_units("from .maps import phi", "darkformer.features", is_package=True)) == [(1, "features")]
    assert list(imported_units("from ..ops import phi", "darkformer.features", is_package=True)) == [(1, "ops")]


def test_an_unknown_module_is_refused() -> None:
    with pytest.raises(AssertionError, match="no place"):
        layer_violations("", "darkformer.utils")


def test_import_leaves_the_extras_alone() -> None:
    heavy = ["transformers", "datasets", "accelerate", "matplotlib", "typer", "rich"]
    code = f"import sys, darkformer; print(*[name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_constraints_lie_within_the_declared_ranges() -> None:
    pins = pinned()
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is declared in pyproject.toml but has no version in constraints.txt"
        assert pins[name] in requirement.specifier, f"{requirement} does not admit {pins[name]} of constraints.txt"


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_lint_tools_start_at_the_tested_version(tool: str) -> None:
    (requirement,) = [item for item in declared() if item.name == tool]
    lower = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    assert lower == [pinned()[tool]]


def test_citation_has_the_version_of_the_package() -> None:
    version = re.search(r'__version__ = "(.+)"', (PACKAGE / "_version.py").read_text("utf-8"))
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert version and cited and version[1] == cited[1]


def test_no_weights_are_tracked() -> None:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    tracked = [ROOT / name for name in listing.split("\0") if name]
    weights = [path for path in tracked if path.suffix in {".safetensors", ".gguf"} and path.is_file()]
    large = [str(path.relative_to(ROOT)) for path in weights if path.stat().st_size > MAX_WEIGHTS_BYTES]
    assert not large, f"weights do not belong in the repository: {large}"


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_is_there(script: Path) -> None:
    """Scripts run once in a while; a name that was changed since is found here."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "darkformer":
            exec(ast.unparse(node), {})
