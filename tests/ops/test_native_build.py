"""Building and loading the compiled backend: no compiler, failed, interrupted, stale builds, a wrong library, a wheel.

Whatever happens, the answer is right, one line says why, and nothing crashes.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hang import HANG_SECONDS
from torch import Tensor

from darkformer.ops.native import load, selftest
from darkformer.ops.native.build import NEEDS, BuildError, instruction_set, library_path

from .cases import needs_native

build_module = sys.modules["darkformer.ops.native.build"]  # the package exports a function of this name


@needs_native
def test_a_wrong_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the self-test: a result that is off by a thousandth."""
    right = load.forward

    def wrong(*arguments: object) -> tuple[Tensor, ...]:
        output, *rest = right(*arguments)  # type: ignore[arg-type]
        return output * 1.001, *rest

    selftest.selftest()
    monkeypatch.setattr(load, "forward", wrong)
    with pytest.raises(BuildError, match="self-test failed"):
        selftest.selftest()


FALLBACK = """
import torch, darkformer
from darkformer.ops import native
made = darkformer.feature_map(darkformer.DarkConfig(num_features=8), num_heads=2, num_kv_heads=1, head_dim=8)
x = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
first, second = darkformer.attention(*x, made), darkformer.attention(*x, made)
want = darkformer.attention(*x, made, backend="chunked")
assert torch.allclose(first, want, atol=1e-5) and torch.equal(first, second)
print(native.unavailable())
"""


def run_in(cache: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with these words, an own cache folder and environment; FALLBACK where none are given."""
    changed = {**os.environ, "DARKFORMER_NATIVE_CACHE": str(cache), **environment}
    command = [sys.executable, *(words or ("-c", FALLBACK))]
    return subprocess.run(command, env=changed, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CC": "/bin/false", "CXX": ""}, "/bin/false failed"),
        ({"CXX": "/nowhere/c++"}, "No such file"),
        ({"CXX": 'c++ "'}, "is not a command: No closing quotation"),
        ({"DARKFORMER_NATIVE_CACHE": "/proc/darkformer"}, "No such file or directory: /proc/darkformer"),
        ({"DARKFORMER_NATIVE": "0"}, "switches it off"),
        ({"DARKFORMER_NATIVE_ISA": "mmx"}, "unknown"),
    ],
)
def test_without_a_compiler_chunked_works(environment: dict[str, str], says: str, tmp_path: Path) -> None:
    run = run_in(tmp_path, **environment)
    assert run.returncode == 0, run.stderr
    assert says in run.stdout
    assert run.stderr.count("not available") == (0 if "DARKFORMER_NATIVE" in environment else 1)
    assert not list(tmp_path.glob("**/*.so"))


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CC": "/bin/false", "CXX": ""}, "/bin/false does not run"),
        ({"DARKFORMER_NATIVE": "0"}, "DARKFORMER_NATIVE=0 switches it off"),
    ],
)
def test_status_says_why(environment: dict[str, str], says: str, tmp_path: Path) -> None:
    run = run_in(tmp_path, "-m", "darkformer.cli", "native", "status", **environment)
    assert run.returncode == 0 and f"not available: {says}" in run.stdout.replace("the compiler ", ""), run.stdout
    assert not list(tmp_path.iterdir())  # status builds nothing


def library_in(cache: Path, **environment: str) -> Path:
    """Where the library would be."""
    code = "from darkformer.ops.native.build import library_path; print(library_path())"
    return Path(run_in(cache, "-c", code, **environment).stdout.strip())


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A CPU with everything, a Linux and a compiler that know it, whatever is here."""
    monkeypatch.setattr(build_module, "cpu_flags", lambda: frozenset.union(*map(frozenset, NEEDS.values())))
    monkeypatch.setattr(build_module, "_request_amx", lambda: True)
    monkeypatch.setattr(build_module, "_compiler_knows", lambda isa, command: True)
    monkeypatch.setenv("DARKFORMER_NATIVE_CACHE", str(tmp_path))
    monkeypatch.delenv("DARKFORMER_NATIVE_ISA", raising=False)
    return monkeypatch


@needs_native
def test_the_matrix_unit_is_taken_where_all_agree(amx: pytest.MonkeyPatch) -> None:
    assert instruction_set() == "amx_bf16"
    amx.setenv("DARKFORMER_NATIVE_ISA", "avx2")
    assert instruction_set() == "avx2"


@needs_native
@pytest.mark.parametrize("who", ["_request_amx", "_compiler_knows"])
def test_without_the_matrix_unit_the_next_best_is_taken(who: str, amx: pytest.MonkeyPatch) -> None:
    amx.setattr(build_module, who, lambda *words: False)
    assert instruction_set() == "avx512_bf16"
    amx.setenv("DARKFORMER_NATIVE_ISA", "amx_bf16")
    with pytest.raises(BuildError, match="has amx_bf16, but Linux or the compiler"):
        instruction_set()


@needs_native
def test_a_compiler_without_amx_is_found_out(tmp_path: Path) -> None:
    """As gcc 10 answers; the one that built the library knows its own flags."""
    old = tmp_path / "c++"
    old.write_text("#!/bin/sh\necho \"error: unrecognized command-line option '-mamx-tile'\" >&2\nexit 1\n")
    old.chmod(0o755)
    assert not build_module._compiler_knows("amx_bf16", (str(old),))
    assert not build_module._compiler_knows("amx_bf16", (str(tmp_path / "none"),))
    assert build_module._compiler_knows(instruction_set(), tuple(build_module.compiler()))


def place(path: Path, content: bytes) -> None:
    """A file of the cache as `build` writes it: the content and its digest."""
    path.write_bytes(content + hashlib.sha256(content).digest())


@needs_native
def test_a_broken_cache_is_refused(tmp_path: Path) -> None:
    """A file that is no library: one line, torch's operators do the work."""
    place(library_in(tmp_path), b"x")
    run = run_in(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "cannot be loaded" in run.stdout and run.stderr.count("not available") == 1


@needs_native
@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "int darkformer_call_size() { return 8; } int darkformer_step_call_size() { return STEP_CALL; }",
            "made for another interface (Call has 8 bytes",
        ),
        (
            "int darkformer_call_size() { return CALL; } int darkformer_step_call_size() { return 8; }",
            "made for another interface (StepCall has 8 bytes",
        ),
        ("int something_else() { return 0; }", "cannot be loaded"),
    ],
)
def test_a_stale_library_is_refused(source: str, says: str, tmp_path: Path) -> None:
    """Its name follows sources, flags and compiler; nothing of torch is in it. What lies there is checked anyway."""
    (tmp_path / "stale.c").write_text(source)
    sizes = [f"-DCALL={ctypes.sizeof(load.Call)}", f"-DSTEP_CALL={ctypes.sizeof(load.StepCall)}"]
    subprocess.run(["cc", "-shared", "-fPIC", *sizes, "-o", tmp_path / "stale", tmp_path / "stale.c"], check=True)
    place(library_in(tmp_path), (tmp_path / "stale").read_bytes())
    run = run_in(tmp_path)
    assert run.returncode == 0, run.stderr
    assert says in run.stdout and run.stderr.count("not available") == 1


def copying_compiler(folder: Path) -> Path:
    """A compiler that copies the library that exists instead of making one."""
    path = folder / "copying-c++"
    path.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do [ $# -gt 0 ] || exit 0; shift; done\n' + f'cp {library_path()} "$2"\n'
    )
    path.chmod(0o755)
    return path


@needs_native
def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    """Loading half a library, or one with a bit flipped, would kill the process or give wrong numbers."""
    compiler, cache = str(copying_compiler(tmp_path)), tmp_path / "cache"
    assert run_in(cache, CXX=compiler).stdout.strip() == "None"
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 and not path.stat().st_mode & 0o022
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], bytes(flipped), b""):
        path.write_bytes(content)
        run = run_in(cache, CXX=compiler)
        assert run.returncode == 0 and run.stdout.strip() == "None", run.stdout + run.stderr
        assert path.read_bytes() == whole and "compiling" in run.stderr


def _writable_file(path: Path) -> None:
    path.touch()
    path.chmod(0o666)


def _foreign_file(path: Path) -> None:
    path.touch()
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 12345, 12345)


def _symbolic_link(path: Path) -> None:
    path.symlink_to(library_path())


def _writable_folder(path: Path) -> None:
    shutil.copy(library_path(), path)
    path.parent.chmod(0o1777)


@needs_native
@pytest.mark.parametrize(
    ("arrange", "says"),
    [
        (os.mkfifo, "is no regular file"),
        (_writable_file, "is no regular file that only this user or root can write to"),
        (_foreign_file, "is no regular file that only this user or root can write to"),
        (_symbolic_link, "Too many levels of symbolic links"),
        (_writable_folder, "others can write to"),
    ],
)
def test_a_library_that_others_could_have_written_is_not_loaded(
    arrange: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    arrange(library_in(cache))
    run = run_in(cache)
    assert run.returncode == 0, run.stderr
    assert says in run.stdout and run.stderr.count("not available") == 1


def test_a_folder_of_ours_loses_rights_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As earlier versions made it under a lax umask; a folder that the user names is left as it is."""
    folder = tmp_path / "darkformer" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o775)
    monkeypatch.setenv("DARKFORMER_NATIVE_CACHE", str(folder))
    with pytest.raises(BuildError, match="others can write"):
        build_module._prepare_folder(folder)
    monkeypatch.delenv("DARKFORMER_NATIVE_CACHE")
    build_module._prepare_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@needs_native
def test_what_killed_builds_left_is_removed(tmp_path: Path) -> None:
    cache, old, recent = tmp_path / "cache", tmp_path / "cache/build-old", tmp_path / "cache/build-recent"
    for folder in (old, recent):
        folder.mkdir(parents=True)
        (folder / "part.so").touch()
    os.utime(old, (0, 0))
    assert run_in(cache, CXX=str(copying_compiler(tmp_path))).stdout.strip() == "None"
    assert not old.exists() and recent.exists()


def test_without_a_home_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("DARKFORMER_NATIVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(BuildError, match="no home directory"):
        build_module.cache_folder()


@needs_native
def test_a_compiler_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "c++"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setenv("DARKFORMER_NATIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build_module, "COMPILE_TIMEOUT", 0.2)
    with pytest.raises(BuildError, match="took longer than"):
        build_module.build()


def test_with_stderr_closed_it_still_answers(tmp_path: Path) -> None:
    command = 'exec "$0" -c "$1" 2>&-'
    environment = {**os.environ, "DARKFORMER_NATIVE_CACHE": str(tmp_path), "CXX": "/nowhere/c++"}
    run = subprocess.run(
        ["sh", "-c", command, sys.executable, FALLBACK], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert run.stdout.startswith("No such file")


class SlowCompiler:
    """A compiler that says when it is called and waits until it may go on; it copies the library that exists.

    Both pipes have a name, so the build need not hand them down, and both ends are open here: nobody waits for the
    other to open one, and what is written stays.
    """

    def __init__(self, folder: Path) -> None:
        for name in ("called", "may_go_on"):
            os.mkfifo(folder / name)
        self.called, self.may_go_on = (os.open(folder / name, os.O_RDWR) for name in ("called", "may_go_on"))
        self.path = folder / "c++"
        self.path.write_text(
            '#!/bin/sh\nwhile [ "$1" != -o ]; do [ $# -gt 0 ] || exit 0; shift; done\n'  # asked about itself
            f'echo >> {folder}/called\nread line < {folder}/may_go_on\ncp {library_path()} "$2"\n'
        )
        self.path.chmod(0o755)

    def builds(self, cache: Path, number: int) -> list[subprocess.Popen[str]]:
        """Processes that are all in the middle of a build, each in a process group of its own."""
        environment = {**os.environ, "DARKFORMER_NATIVE_CACHE": str(cache), "CXX": str(self.path)}
        processes, alive = [], []
        for _ in range(number):
            ended, held = os.pipe()  # the process holds this end as long as it lives
            processes.append(subprocess.Popen(
                [sys.executable, "-c", FALLBACK], env=environment, start_new_session=True, text=True, pass_fds=(held,),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
            ))  # fmt: skip
            os.close(held)
            alive.append(ended)
        for _ in processes:
            ready, _, _ = select.select([self.called, *alive], [], [], HANG_SECONDS)
            if self.called not in ready:
                for process in processes:
                    os.killpg(process.pid, signal.SIGKILL)
                pytest.fail(f"no build began: {[process.communicate() for process in processes]}")
            os.read(self.called, 1)
        for ended in alive:
            os.close(ended)
        return processes

    def go_on(self, calls: int) -> None:
        """As many calls go on, those to come included."""
        os.write(self.may_go_on, b"\n" * calls)


@pytest.fixture
def slow_compiler(tmp_path: Path) -> Iterator[SlowCompiler]:
    compiler = SlowCompiler(tmp_path)
    yield compiler
    os.close(compiler.called)
    os.close(compiler.may_go_on)


@needs_native
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_an_interrupted_build_leaves_nothing_half(number: int, tmp_path: Path, slow_compiler: SlowCompiler) -> None:
    (process,) = slow_compiler.builds(tmp_path / "cache", 1)
    os.killpg(process.pid, number)
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode != 0 and not list(tmp_path.glob("cache/*.so"))
    slow_compiler.go_on(1)
    run = run_in(tmp_path / "cache", CXX=str(slow_compiler.path))
    assert run.returncode == 0 and run.stdout.strip() == "None", run.stdout + run.stderr  # nothing against it


@needs_native
def test_two_processes_may_build_at_once(tmp_path: Path, slow_compiler: SlowCompiler) -> None:
    processes = slow_compiler.builds(tmp_path / "cache", 2)
    slow_compiler.go_on(2)
    for process in processes:
        out, err = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0 and out.strip() == "None", out + err
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="building a wheel needs hatchling")
def test_a_wheel_works_without_a_compiler(tmp_path: Path) -> None:
    """Built, installed in a fresh environment that sees this one's packages, CC and CXX false, an empty cache."""
    root = Path(__file__).parents[2]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", "-w", tmp_path, root], check=True)
    (wheel,) = tmp_path.glob("darkformer-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh"], check=True)
    python, (folder,) = tmp_path / "fresh/bin/python", (tmp_path / "fresh").glob("lib/*/site-packages")
    # A .pth file that this folder's own .pth file names is not read: an editable install stays out of sight.
    (folder / "packages.pth").write_text(sysconfig.get_paths()["purelib"])
    subprocess.run([*pip, "--python", python, "install", *options, wheel], check=True)
    environment = {**os.environ, "DARKFORMER_NATIVE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ""}

    def call(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, *words], env=environment | more, cwd=tmp_path, capture_output=True, text=True, check=True
        )

    false = {"CC": "/bin/false", "CXX": "/bin/false"}
    where = Path(call("-c", "import darkformer; print(darkformer.__file__)").stdout.strip())
    assert where.is_relative_to(folder) and (where.parent / "ops/native/csrc/attention.cpp").is_file()
    run = call("-c", FALLBACK, **false)
    assert "/bin/false failed" in run.stdout
    assert [line for line in run.stderr.splitlines() if "not available, torch's operators do the work" in line]
    assert (
        "not available: the compiler /bin/false does not run"
        in call("-m", "darkformer.cli", "native", "status", **false).stdout
    )
    if library_path().exists():  # with a compiler, here and today: the sources in the wheel are these
        assert call("-c", FALLBACK, DARKFORMER_NATIVE_CACHE=str(library_path().parent)).stdout.strip() == "None"
