"""What lies on disk: who may have written it, and compilers, folders and files that are not as they should be."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvbuffer_compile.codegen import build
from kvbuffer_compile.codegen.cpp import compiler, cpp
from kvbuffer_compile.codegen.triton import load, triton
from kvbuffer_compile.errors import EmitError
from kvbuffer_compile.guard import dispatch_watch
from kvbuffer_compile.process import disk
from kvbuffer_compile.runtime import access
from kvbuffer_compile.steps import ops, targets
from tests.kernels.test_targets import B, H, K, V
from tests.runtime.test_runtime import draw, step
from tests.support.programs import NAMED
from tests.support.sessions import make_plan

SOURCE = 'extern "C" int answer() { return 42; }\n'
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process that has built, said and found out nothing yet; gives the place of its folder, which is not there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(disk, "_told", set())
    monkeypatch.setattr(disk, "_temporary", None)
    monkeypatch.setattr(compiler, "_hung", {})
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(targets, "_said", set())
    for cached in (build._version, ops.use_cpp, targets._built):
        cached.cache_clear()
    yield tmp_path / "cache" / "kvbuffer"
    for cached in (build._version, ops.use_cpp, targets._built):
        cached.cache_clear()


def told(found: Callable[[], object]) -> list[str]:
    """Our warnings while something is done."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found()
    return [str(w.message) for w in seen if "kvbuffer" in str(w.message)]


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file or folder belong to someone else, or look as if where only root may do so."""
    with suppress(PermissionError):
        os.chown(path, 12345, -1)
        return
    node, asked = path.stat().st_ino, os.fstat

    def fstat(handle: int) -> os.stat_result:
        found = asked(handle)
        return os.stat_result([*found[:4], found.st_uid + 1, *found[5:10]]) if found.st_ino == node else found

    monkeypatch.setattr(os, "fstat", fstat)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ------------------------------------------------------------------------------------------------ folders


def test_a_new_folder_is_ours_alone(cache: Path) -> None:
    before = os.umask(0)
    try:
        assert not told(disk.folder) and disk.folder() == cache and mode(cache) == 0o700
        disk.write(cache / "file", b"x")
    finally:
        os.umask(before)
    assert mode(cache / "file") == 0o600


@pytest.mark.parametrize("readers", [0o755, 0o750, 0o711])
def test_one_that_others_may_read_is_closed_to_them(cache: Path, readers: int) -> None:
    cache.mkdir(parents=True)
    cache.chmod(readers)
    assert not told(disk.folder) and disk.folder() == cache and mode(cache) == 0o700


def _open_to_all(path: Path, _: pytest.MonkeyPatch) -> None:
    path.chmod(0o777)


def _open_to_a_group(path: Path, _: pytest.MonkeyPatch) -> None:
    path.chmod(0o770)


def _behind_a_link(path: Path, _: pytest.MonkeyPatch) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _a_file(path: Path, _: pytest.MonkeyPatch) -> None:
    for inside in path.iterdir():
        inside.unlink()
    path.rmdir()
    path.write_text("")


HARM = {
    "all": (_open_to_all, "other users could write in"),
    "group": (_open_to_a_group, "other users could write in"),
    "link": (_behind_a_link, "is a link or a file"),
    "file": (_a_file, "is a link or a file"),
    "stranger": (give_away, "belongs to user"),
}


@pytest.mark.parametrize(("harm", "why"), HARM.values(), ids=HARM)
def test_one_that_a_stranger_may_have_filled_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path, pytest.MonkeyPatch], None], why: str
) -> None:
    """Not even a library that is whole: whoever can write a library can write its checksum."""
    log = fake(monkeypatch, cache.parent)
    left = build.library(SOURCE)
    harm(cache, monkeypatch)
    (message,) = told(lambda: [build.library(SOURCE) for _ in range(3)])
    built = build.library(SOURCE)
    assert built.parent != left.parent and build.is_whole(built) and not build.is_whole(left)
    assert len(log.read_text().split()) == 2, "built once more, and then kept"
    assert str(cache) in message and why in message and "set TORCHINDUCTOR_CACHE_DIR" in message
    assert mode(built.parent) == 0o700


@needs_compiler
def test_a_library_that_a_stranger_may_have_written_is_not_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.library(SOURCE)
    path.chmod(0o666)
    with pytest.raises(OSError, match="was changed"):
        build.loaded(path, ctypes.CDLL)
    path.chmod(0o600)
    build.loaded(path, ctypes.CDLL)
    cache.chmod(0o777)
    with pytest.raises(OSError, match="other users"):
        build.loaded(path, ctypes.CDLL)


def test_a_library_is_that_of_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel's library under the name of another is a whole file."""
    fake(monkeypatch, cache.parent)
    one, other = build.library(SOURCE), build.library(SOURCE + "// other")
    os.replace(other, one)
    assert not build.is_whole(one) and build.is_whole(build.library(SOURCE))


def _folder(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def _link(path: Path) -> None:
    path.with_name("target").write_bytes(b"data")
    path.symlink_to("target")


def _writable(path: Path) -> None:
    path.write_bytes(b"data")
    path.chmod(0o602)


def _long(path: Path) -> None:
    path.write_bytes(b"data" * 100)


@pytest.mark.parametrize("make", [_folder, _pipe, _link, _writable, _long])
def test_what_is_no_file_of_ours_is_not_read(cache: Path, make: Callable[[Path], None]) -> None:
    path = disk.folder() / "file"
    make(path)
    assert disk.read(path, 10) is None
    if make is not _folder:
        disk.write(path, b"ours")
        assert disk.read(path, 10) == b"ours"


def test_a_file_of_a_stranger_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    path = disk.folder() / "file"
    disk.write(path, b"data")
    assert disk.read(path, 10) == b"data"
    give_away(path, monkeypatch)
    assert disk.read(path, 10) is None


def test_a_temporary_folder_goes_with_its_process() -> None:
    path = disk._temporary_folder()
    disk._remove(os.getpid() + 1, path)
    assert path.is_dir(), "a forked child leaves it to its parent"
    disk._remove(os.getpid(), path)
    assert not path.exists() and disk._temporary_folder().is_dir()


def full(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """No room in these folders."""
    write = disk.write

    def refuse(path: Path, data: bytes) -> None:
        if not paths or path.parent in paths:
            raise OSError(errno.ENOSPC, "No space left on device", f"{path.name}.{os.urandom(4).hex()}.part")
        write(path, data)

    monkeypatch.setattr(disk, "write", refuse)


def test_a_full_disk_leaves_the_temporary_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, cache.parent)
    full(monkeypatch, cache)
    (message,) = told(lambda: [build.library(SOURCE), build.library(SOURCE + "// other")])
    assert f"No space left on device: {cache}" in message
    assert build.is_whole(build.library(SOURCE)) and not list(cache.iterdir())


def test_what_is_written_in_part_is_taken_away(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = disk.folder() / "file"
    disk.write(path, b"old")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        disk.write(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in cache.iterdir()] == ["file"]


# ---------------------------------------------------------------------------------------------- compilers


BUILDS = 'echo $$ >> "$LOG"; while [ "$1" != -o ]; do shift; done; printf library > "$2"'


def fake(monkeypatch: pytest.MonkeyPatch, folder: Path, build: str = BUILDS, version: str = "echo fake 1") -> Path:
    """Let CXX be a script; gives the file that BUILDS writes a line to."""
    folder.mkdir(parents=True, exist_ok=True)
    script, log = folder / f"cxx{abs(hash((build, version)))}", folder / "log"
    script.write_bytes(f'#!/bin/sh\n[ "$1" = --version ] && {{ {version}; exit; }}\n{build}\n'.encode("latin-1"))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("LOG", str(log))
    return log


def decode(options: dict[str, object] | None = None) -> None:
    """Steps of a compiled graph, compared with eager ones."""
    ours = torch.randn(B, H, K, V)
    theirs = ours.clone()
    compiled = torch.compile(step, backend="kvbuffer", options={"inner": "eager", "flush": 4, **(options or {})})
    with torch.no_grad():
        for _ in range(6):
            inputs = draw()
            torch.testing.assert_close(compiled(ours, *inputs), step(theirs, *inputs))
        torch.testing.assert_close(ours + 0, theirs)


def build_two() -> None:
    """The kernels of two layers that differ, as the backend asks for them."""
    if targets.resolve("auto", torch.device("cpu")) == "cpp":
        assert [targets.build(make_plan(NAMED[name])) for name in ("gdn", "gla")] == ["aten", "aten"]


BROKEN = {
    "fails": ("printf 'erreur: caract\xe8re' >&2; exit 1", "echo 1", "caract\ufffdre"),
    "is killed": ("kill -9 $$", "echo 1", "signal 9"),
    "does nothing": ("exit 0", "echo 1", "wrote no library"),
    "writes anything": (BUILDS, "echo 1", "cannot be loaded"),
    "hangs": ("exec sleep 100", "echo 1", "did not end"),
    "goes on for ever": ("while :; do echo word; done", "echo 1", "did not end"),
    "has no version": ("exit 0", "exit 3", "exit code 3"),
    "hangs at once": ("exit 0", "sleep 100", "did not end"),
}


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "IDLE", 0.6)
    monkeypatch.setattr(compiler, "LOOK", 0.2)
    monkeypatch.setenv("KVBUFFER_COMPILE_TIMEOUT", "3")


@pytest.mark.parametrize(("build", "version", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_compiler_costs_one_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch, hurry: None, build: str, version: str, why: str
) -> None:
    fake(monkeypatch, cache.parent, build, version)
    (message,) = told(build_two)
    assert why in message and "slower composite steps" in message and "in CXX" in message


@pytest.mark.parametrize("kind", ["fails", "hangs at once"])
def test_a_broken_compiler_changes_no_number(
    cache: Path, monkeypatch: pytest.MonkeyPatch, hurry: None, records: list, kind: str
) -> None:
    dispatch_watch.watch(access.touched_below)  # built once for a process, and not by a broken compiler
    fake(monkeypatch, cache.parent, *BROKEN[kind][:2])
    (message,) = told(lambda: decode({"target": "cpp", "on_decline": "raise"}))
    assert "slower composite steps" in message
    assert {plan.target for record in records for _, plan in record.rewritten} == {"aten"}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("CXX", "g++ 'x", 'CXX="g++ \'x" cannot be read'),
        ("CXX", "no-such-compiler", "there is no C++ compiler"),
        ("CXX", "/", "there is no C++ compiler"),
        ("KVBUFFER_COMPILE_TIMEOUT", "soon", "must be seconds"),
        ("KVBUFFER_COMPILE_TIMEOUT", "nan", "must be seconds"),
        ("KVBUFFER_COMPILE_TIMEOUT", "-1", "must be seconds"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    fake(monkeypatch, cache.parent)
    monkeypatch.setenv(name, value)
    (message,) = told(build_two)
    assert says in message and "slower composite steps" in message


def test_a_slow_compiler_is_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine it takes long, and does something all the time."""
    fake(monkeypatch, cache.parent, f"( i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done ); {BUILDS}")
    monkeypatch.setattr(compiler, "IDLE", 0.2)
    monkeypatch.setattr(compiler, "LOOK", 0.05)
    assert build.is_whole(build.library(SOURCE))


def test_a_compiler_that_leaves_a_server_behind_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, cache.parent, f"sleep 5 & {BUILDS}; exit 0")
    assert build.is_whole(build.library(SOURCE))


def test_a_disk_that_is_full_everywhere_costs_one_warning(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, cache.parent)
    full(monkeypatch)
    (message,) = told(build_two)
    assert "No space left on device" in message and "TORCHINDUCTOR_CACHE_DIR" in message


@needs_compiler
@pytest.mark.parametrize("what", ["read-only", "nothing at all"])
def test_no_folder_costs_one_warning(cache: Path, monkeypatch: pytest.MonkeyPatch, records: list, what: str) -> None:
    """A file system that is read-only, no home, no temporary folder."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(cache))

    monkeypatch.setattr(disk, "_wanted", refuse)
    if what != "read-only":
        monkeypatch.setattr(disk.tempfile, "mkdtemp", refuse)
    (message,) = told(decode)
    assert "Read-only file system" in message and "TORCHINDUCTOR_CACHE_DIR" in message
    expected = {"cpp"} if what == "read-only" else {"aten"}
    assert {plan.target for record in records for _, plan in record.rewritten} == expected


# ------------------------------------------------------------------------------------------ many at once


def _race(ready, found) -> None:
    ready.wait()
    found.put(build.is_whole(build.library(SOURCE)))


@pytest.mark.parametrize("locks", [True, False])
def test_eight_processes_that_want_one_kernel(cache: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    log = fake(monkeypatch, cache.parent, f"sleep 0.3; {BUILDS}")
    if not locks:
        monkeypatch.setattr(disk.fcntl, "flock", refuse)
    context = multiprocessing.get_context("fork")
    ready, found = context.Barrier(8), context.Queue()
    workers = [context.Process(target=_race, args=(ready, found)) for _ in range(8)]
    for worker in workers:
        worker.start()
    assert all(found.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(list(cache.glob("*.so"))) == 1 and not list(cache.glob("*.part"))
    assert len(log.read_text().split()) == 1 if locks else log.exists()


def test_a_lock_that_nobody_gives_back_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with disk.alone("x", 5), disk.alone("y", 5), disk.alone("x", 0.1):
        pass
    assert not list(cache.iterdir())


# ------------------------------------------------------------------------------------- sources and dumps


def test_what_was_measured_is_not_part_of_a_kernel() -> None:
    """One plan, one text, one library, whatever the machine that predicted its time."""
    for target, emit in (("cpp", cpp.emit), ("triton", triton.emit)):
        plan = replace(make_plan(NAMED["gdn"]), target=target)
        first, second = (emit(replace(plan, why=f"{n} us predicted")) for n in (12, 13))
        assert first == second and "buffered L=4" in first
    assert "12 us" in str(replace(plan, why="12 us predicted"))


def test_python_runs_the_text_and_not_the_file(cache: Path) -> None:
    source = "def launch():\n    return 42\n"
    module = load.load(source)
    path = Path(module.__file__)
    assert path.parent == cache and path.read_text() == source and module.launch() == 42
    del load.sys.modules[module.__name__]
    path.write_text("def launch():\n    return 13\n")
    assert load.load(source).launch() == 42 and path.read_text() == source
    assert not list(cache.rglob("*.pyc"))
    del load.sys.modules[module.__name__]


@pytest.mark.parametrize(("how", "bad"), [("option", "file/dump"), ("environment", "x" * 300), ("option", "zero\0")])
def test_a_dump_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list, how: str, bad: str
) -> None:
    (tmp_path / "file").touch()
    folder = str(tmp_path / bad)
    options = {"target": "aten", "on_decline": "raise"}
    if how == "option":
        options["dump"] = folder
    else:
        monkeypatch.setenv("KVBUFFER_DUMP", folder)
    (message,) = told(lambda: decode(options))
    assert folder in message and "dump" in message and "KVBUFFER_DUMP" in message
    assert all(record.rewritten for record in records)


def test_why_a_compiler_is_missing_reaches_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ 'x")
    assert build.compiler() is None and "cannot be read" in build.no_compiler()
    with pytest.raises(EmitError, match="cannot be read"):
        build.library(SOURCE)
