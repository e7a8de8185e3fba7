"""Files that outlive a process, in a folder that nobody else can write.

What lies here is run (libraries) or believed (measurements), and Inductor's cache, above it, may be shared with others.
So the folder and each file in it must be ours: owned by the user of this process, and writable by nobody else. That is
what keeps strangers out. A checksum beside the data cannot, because whoever can write one can write the other; it only
tells that a file is whole.

All is done relative to a descriptor of the folder that was checked. Someone who may rename things above it can put
another folder in its place, and be noticed, but not between the check and the use.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvbuffer_compile.process import callers

OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
ADVICE = "set TORCHINDUCTOR_CACHE_DIR to a folder of your own with room in it"
POLL = 0.05  # seconds between two looks at a lock

_told: set[str] = set()
_temporary: tuple[int, Path] | None = None  # and the process it belongs to: a forked child must not remove it


# ------------------------------------------------------------------------------------------------ folders


def folder() -> Path:
    """Where we keep files: under Inductor's cache folder, which TORCHINDUCTOR_CACHE_DIR moves.

    Where that cannot be had, or another user could write there, one that lasts as long as the process, with a warning:
    what is kept is only time, and kernels built anew are still several times faster than steps without them. OSError
    when there can be no folder at all.
    """
    try:
        return _ours(_wanted())
    except OSError as error:
        path = _temporary_folder()
        _tell_of_it(str(error) if error.strerror is None else f"{error.strerror}: {error.filename}")
        return path


def places() -> list[Path]:
    """The folders that may hold what was kept: `folder`, and the temporary one if there is one."""
    first = folder()
    return [first] if _temporary is None or first == _temporary[1] else [first, _temporary[1]]


def keep(name: str, data: bytes) -> Path:
    """Write a file where there is room for it: in `folder`, else in the temporary one. OSError when in neither."""
    first = folder()
    try:
        write(first / name, data)
        return first / name
    except OSError as error:
        second = _temporary_folder()
        if second == first:
            raise
        write(second / name, data)
        _tell_of_it(f"{error.strerror}: {first}")
    return second / name


def _wanted() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "kvbuffer"


def _ours(path: Path) -> Path:
    with suppress(FileExistsError):
        path.mkdir(0o700)
    with opened(path):
        return path


def _tell_of_it(why: str) -> None:
    what = "what it builds and measures is in a temporary folder, and the next process does it again"
    tell(f"kvbuffer has no folder to keep files in: {what} ({why}); {ADVICE}")


def _temporary_folder() -> Path:
    global _temporary
    if _temporary is None or _temporary[0] != os.getpid() or not _temporary[1].is_dir():
        _temporary = os.getpid(), Path(tempfile.mkdtemp(prefix="kvbuffer_"))
        atexit.register(_remove, *_temporary)
    return _temporary[1]


def _remove(process: int, path: Path) -> None:
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a folder that is ours alone. OSError, with what to do, when there is none or others have a say.

    One that others may read is closed to them. One that others may write is refused: what they left there stays.
    """
    try:
        place = os.open(path, os.O_RDONLY | os.O_DIRECTORY | FLAGS)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise NotADirectoryError(f"{path} is a link or a file, delete it") from error
        raise
    try:
        found = os.fstat(place)
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{path} belongs to user {found.st_uid}, and this process runs as {os.geteuid()}")
        if found.st_mode & OTHERS_MAY_WRITE:
            raise PermissionError(f"other users could write in {path}, delete it")
        if stat.S_IMODE(found.st_mode) != 0o700:
            with suppress(OSError):  # a cache that is mounted read-only
                os.fchmod(place, 0o700)
        yield place
    finally:
        os.close(place)


# -------------------------------------------------------------------------------------------------- files


def read(path: Path, at_most: int) -> bytes | None:
    """The bytes of a file in a folder of ours; None when there is none that is ours, or it has more than `at_most`."""
    try:
        with opened(path.parent) as place:
            return read_in(place, path.name, at_most)
    except OSError:
        return None


def read_in(place: int, name: str, at_most: int) -> bytes | None:
    """The same of a folder that was opened; OSError when there is no file."""
    handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | FLAGS, dir_fd=place)  # non-blocking: it may be a pipe
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > at_most:
            return None
        if found.st_uid != os.geteuid() or found.st_mode & OTHERS_MAY_WRITE:
            return None
        with open(handle, "rb", closefd=False) as file:
            return file.read(at_most)
    finally:
        os.close(handle)


def write(path: Path, data: bytes) -> None:
    """Write a file in a folder of ours; it appears whole or not at all, whoever else writes it. OSError."""
    with opened(path.parent) as place:
        part = f"{path.name}.{secrets.token_hex(8)}.part"
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FLAGS, 0o600, dir_fd=place)
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(part, path.name, src_dir_fd=place, dst_dir_fd=place)
        except BaseException:
            with suppress(OSError):
                os.unlink(part, dir_fd=place)
            raise


@contextmanager
def alone(name: str, seconds: float) -> Iterator[None]:
    """Only one process or thread at a time is in here with a name; the others wait, but no longer than so many seconds.

    A lock saves time and nothing else: where there can be none, or its owner sleeps, everyone goes on.
    """
    try:
        with opened(folder()) as place:
            handle = os.open(f"{name}.lock", os.O_RDWR | os.O_CREAT | FLAGS, 0o600, dir_fd=place)
    except OSError:
        yield
        return
    try:
        locked = _locked(handle, time.monotonic() + seconds)
        try:
            yield
        finally:
            if locked:  # who waits holds the file still, and finds the work done when it has the lock
                _unlink(f"{name}.lock")
    finally:
        os.close(handle)


def _locked(handle: int, end: float) -> bool:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(POLL)
        except OSError:  # a file system without locks
            return False


def _unlink(name: str) -> None:
    with suppress(OSError), opened(folder()) as place:
        os.unlink(name, dir_fd=place)


def tell(message: str) -> None:
    """Warn, once a process."""
    if message not in _told:
        _told.add(message)
        callers.warn(message)
