"""Compiles the C++ sources in csrc/: one compiler call, no headers but the compiler's own, cached for each CPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ...errors import DarkformerError

SOURCES = Path(__file__).parent / "csrc"
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
#: Compiler flags of each instruction set, best first. `DARKFORMER_NATIVE_ISA` chooses one by name.
ISAS = {
    "amx_bf16": ["-mamx-tile", "-mamx-bf16", *_AVX512, "-mavx512bf16"],
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    "avx512": _AVX512,
    "avx2": ["-mavx2", "-mfma"],
}
_AVX512_CPU = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"}
#: What the CPU must have for each, as Linux spells it.
NEEDS = {
    "amx_bf16": {"amx_tile", "amx_bf16", *_AVX512_CPU, "avx512_bf16"},
    "avx512_bf16": {*_AVX512_CPU, "avx512_bf16"},
    "avx512": _AVX512_CPU,
    "avx2": {"avx2", "fma"},
}
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=fast", "-fno-math-errno", "-w"]
#: Seconds that the compiler may take.
COMPILE_TIMEOUT = 120


class BuildError(DarkformerError):
    """The native backend cannot be built or loaded here; the message says why."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Feature names of this CPU as Linux spells them; empty where they are not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _request_amx() -> bool:
    """Asks Linux to let this process use AMX's tiles; False where it does not (before 5.16)."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data) == 0


@functools.cache
def _compiler_knows(isa: str, command: tuple[str, ...]) -> bool:
    """Whether the compiler accepts the flags, which for AMX those before 2021 do not. Compiles nothing."""
    arguments = [*command, *ISAS[isa], "-x", "c++", "-fsyntax-only", os.devnull]
    try:
        return not subprocess.run(arguments, capture_output=True, timeout=COMPILE_TIMEOUT, check=False).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def usable(isa: str) -> bool:
    """Whether this CPU, Linux and the compiler support the instruction set, a key of `ISAS`.

    Raises:
        BuildError: there is no compiler.
    """
    if not cpu_flags() >= NEEDS[isa]:
        return False
    if isa != "amx_bf16":
        return True
    # Asking the compiler takes some milliseconds: only where there is no library yet.
    return _request_amx() and (_path(isa, compiler()).exists() or _compiler_knows(isa, tuple(compiler())))


def instruction_set() -> str:
    """The best instruction set of this CPU, or the one that DARKFORMER_NATIVE_ISA names.

    Raises:
        BuildError: the CPU has none of them, or not the named one.
    """
    wanted = os.environ.get("DARKFORMER_NATIVE_ISA", "")
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"it is written for Linux on x86-64, this is {platform.system()} on {platform.machine()}")
    if wanted and wanted not in ISAS:
        raise BuildError(f"DARKFORMER_NATIVE_ISA={wanted!r} is unknown: choose {', '.join(ISAS)}")
    for name in [wanted] if wanted else ISAS:
        if usable(name):
            return name
    needs = sorted(NEEDS[wanted or "avx2"])
    if cpu_flags() >= set(needs):
        raise BuildError(f"the CPU has {wanted}, but Linux or the compiler {compiler()[0]} does not know it")
    raise BuildError(f"the CPU lacks instructions of {wanted or 'avx2'}, which needs {', '.join(needs)}")


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else $CC, else c++, g++ or clang++ on the path.

    Raises:
        BuildError: there is none.
    """
    for variable in ("CXX", "CC"):
        if command := os.environ.get(variable, "").strip():
            return shlex.split(command)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("there is no C++ compiler (looked for $CXX, $CC, c++, g++, clang++); on Debian: apt install g++")


def check_compiler() -> None:
    """Asks the compiler for its version, which costs little and detects one that does not run.

    Raises:
        BuildError: it does not answer.
    """
    command = compiler()
    try:
        run = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler {command[0]} does not run: {error}") from error
    if run.returncode:
        raise BuildError(
            f"the compiler {command[0]} does not run: `{command[0]} --version` ended with {run.returncode}"
        )


def cache_folder() -> Path:
    """$DARKFORMER_NATIVE_CACHE, else darkformer/native in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("DARKFORMER_NATIVE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darkformer" / "native"


def _flags(isa: str) -> list[str]:
    # Scratch memory filled with NaN before use: for tests of the sources themselves.
    return [*FLAGS, *ISAS[isa], *(["-DPOISON"] if os.environ.get("DARKFORMER_NATIVE_POISON") else [])]


def _key(isa: str, command: list[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    executable = shutil.which(command[0]) or command[0]
    stat = os.stat(executable) if os.path.exists(executable) else None
    digest.update(repr((_flags(isa), command, stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return digest.hexdigest()[:16]


def _path(isa: str, command: list[str]) -> Path:
    return cache_folder() / f"attention-{isa}-{_key(isa, command)}.so"


def library_path() -> Path:
    """Where the library for this CPU, compiler and these sources is, or will be."""
    return _path(instruction_set(), compiler())


def build(force: bool = False) -> Path:
    """Compiles unless the library is there already. Two processes may do so at once: the file appears in one step.

    Raises:
        BuildError: no compiler, no such instructions, an unwritable cache, or the compiler failed; with its words.
    """
    path = library_path()
    if path.exists() and not force:
        return path
    command = [*compiler(), *_flags(instruction_set()), str(SOURCES / "attention.cpp")]
    print(f"darkformer: compiling the native attention once into {path.parent} …", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
            output = Path(folder) / path.name
            run = subprocess.run(
                [*command, "-o", str(output)], capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False
            )
            if run.returncode or not output.exists():
                message = (run.stderr or run.stdout).strip().splitlines()
                raise BuildError(
                    f"{command[0]} failed ({run.returncode}): {message[0] if message else 'it wrote no library'}"
                )
            os.replace(output, path)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {COMPILE_TIMEOUT} s") from error
    except OSError as error:
        raise BuildError(f"{error.strerror or error}: {error.filename or command[0]}") from error
    print(f"darkformer: compiled in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return path
