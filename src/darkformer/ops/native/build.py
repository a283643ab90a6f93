"""Compiles the C++ sources in csrc/: one compiler call, no headers but the compiler's own, cached for each CPU.

The library is code that runs with the user's rights, so the cache is trusted only if nobody else could have written it,
and a file that was damaged is built again: loading half a library kills the process. Its last 32 bytes are the SHA-256
of those before, which the loader of the system ignores.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
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
#: More of them by the value of `DARKFORMER_NATIVE_SANITIZE`: a page that nobody may touch behind every buffer, or the
#: compiler's own checks, which need its library loaded first (benchmarks/fuzz.py does that).
SANITIZERS = {
    "": [],
    "pages": ["-DSEPARATE_BUFFERS", "-DGUARD_PAGES"],
    "address": ["-DSEPARATE_BUFFERS", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
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
    return _request_amx() and (os.path.exists(_path(isa, compiler())) or _compiler_knows(isa, tuple(compiler())))


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
        BuildError: there is none, or the variable is not a command.
    """
    for variable in ("CXX", "CC"):
        if command := os.environ.get(variable, "").strip():
            try:
                return shlex.split(command)
            except ValueError as error:
                raise BuildError(f"{variable}={command!r} is not a command: {error}") from error
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
    """$DARKFORMER_NATIVE_CACHE, else darkformer/native in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        BuildError: the user has no home directory.
    """
    if own := os.environ.get("DARKFORMER_NATIVE_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darkformer" / "native"
    except RuntimeError as error:
        raise BuildError("the user has no home directory: DARKFORMER_NATIVE_CACHE names another folder") from error


def _prepare_folder(folder: Path) -> None:
    """Creates the cache folder, or checks that only this user or root can write to it.

    Raises:
        BuildError: others can. OSError: it cannot be created.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    info = os.stat(folder)
    if info.st_uid == os.geteuid() and info.st_mode & 0o022 and not os.environ.get("DARKFORMER_NATIVE_CACHE"):
        folder.chmod(0o700)  # made by an earlier version under a lax umask; a folder that the user names is left alone
        info = os.stat(folder)
    if info.st_uid not in (os.geteuid(), 0) or info.st_mode & 0o022:
        raise BuildError(
            f"others can write to {folder} (owner {info.st_uid}, mode {stat.S_IMODE(info.st_mode):o}) and so could "
            "place code there: give it to its user with mode 700, or name another in DARKFORMER_NATIVE_CACHE"
        )


def _intact(path: Path) -> bool:
    """Whether the library is there and complete.

    Raises:
        BuildError: it is no regular file, or others can write to it. OSError: it cannot be read.
    """
    try:  # without blocking: opening a FIFO would wait for a writer
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    with open(file, "rb") as opened:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode) or info.st_uid not in (os.geteuid(), 0) or info.st_mode & 0o022:
            raise BuildError(f"{path} is no regular file that only this user or root can write to: delete it")
        content = opened.read()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _install(library: Path, path: Path) -> None:
    """Appends the digest and moves the library to its place, in one step that survives a loss of power."""
    with open(library, "r+b") as file:
        file.write(hashlib.sha256(file.read()).digest())
        file.flush()
        os.fsync(file.fileno())
    library.chmod(0o755)  # whoever may enter the folder may use it: root can build for all
    os.replace(library, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_stale_builds(folder: Path) -> None:
    """Removes what killed builds left behind."""
    for stale in folder.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > 10 * COMPILE_TIMEOUT:
                shutil.rmtree(stale, ignore_errors=True)


def report(line: str) -> None:
    """One line on stderr, if it is open."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(f"darkformer: {line}", file=sys.stderr, flush=True)


def _flags(isa: str) -> list[str]:
    # For tests of the sources: scratch memory filled with NaN before use, and every access beside it noticed.
    poison = ["-DPOISON"] if os.environ.get("DARKFORMER_NATIVE_POISON") else []
    return [*FLAGS, *ISAS[isa], *poison, *SANITIZERS[os.environ.get("DARKFORMER_NATIVE_SANITIZE", "")]]


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
        BuildError: no compiler, no such instructions, a cache that cannot be written or that others can write to, or
            the compiler failed; with its words.
    """
    try:
        path = library_path()
        _prepare_folder(path.parent)
        if not force and _intact(path):
            return path
        command = [*compiler(), *_flags(instruction_set()), str(SOURCES / "attention.cpp")]
        report(f"compiling the native attention once into {path.parent} …")
        start = time.monotonic()
        _remove_stale_builds(path.parent)
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
            _install(output, path)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{error.cmd[0]} took longer than {error.timeout:.0f} s") from error
    except OSError as error:
        raise BuildError(f"{error.strerror or error}: {error.filename or cache_folder()}") from error
    report(f"compiled in {time.monotonic() - start:.0f} s")
    return path
