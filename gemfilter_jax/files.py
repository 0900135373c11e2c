"""Files: checks of output paths, atomic writes, files that grow by lines, bounded reading of text."""

import contextlib
import errno
import fcntl
import io
import os
import pathlib
import re
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO

from gemfilter_jax.errors import UserError, reason

_LARGEST = 1 << 28  # bytes of a text that is read, 256 MiB: some 60 million tokens
_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"(?:/dev|/proc/self)/fd/(\d{1,4})", re.ASCII)
_ASIDE = ".gemfilter.", ".part"  # how the names of unfinished files begin and end
_ATTEMPTS = 20
_asides: set[pathlib.Path] = set()
_changing = threading.RLock()  # held while unfinished files come and go, and for ever once the process is being ended


def check_writable(path: str, flag: str) -> None:
    """Raise a `UserError` that names `flag` if a file cannot be written to `path`; leaves no file behind."""
    try:
        target = _target(path)
        if target.is_dir():
            raise UserError(f"--{flag}={path}: is a folder; give a file name")
        if _is_stream(path):
            return
        if target.exists() and not os.access(target, os.W_OK):
            raise UserError(f"--{flag}={path}: cannot be written (Permission denied)")
        if _is_special(target):
            return
        if not target.parent.is_dir():
            raise UserError(f"--{flag}={path}: folder {target.parent} does not exist; create it first")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UserError(f"--{flag}={path}: cannot be written ({error.strerror or error})") from error


def check_folder(path: str, flag: str) -> None:
    """Raise a `UserError` that names `flag` if a folder cannot be written or made; makes none."""
    try:
        folder = _target(path)
        there = next(one for one in (folder, *folder.parents) if one.exists())
        if not there.is_dir():
            raise UserError(f"--{flag}={path}: {there} is no folder; give one")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"--{flag}={path}: cannot be written ({error.strerror or error})") from error


def check_new_folder(folder: pathlib.Path) -> None:
    """Raise a `UserError` if `folder` exists, or cannot be made."""
    try:
        if folder.exists() or folder.is_symlink():
            raise UserError(f"--output={folder}: exists already; give a new folder")
        if not folder.absolute().parent.is_dir():
            raise UserError(f"--output={folder}: folder {folder.parent} does not exist; create it first")
        with tempfile.TemporaryFile(dir=folder.absolute().parent):
            pass
    except OSError as error:
        raise UserError(f"--output={folder}: cannot be made ({error.strerror or error})") from error


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file, with text as UTF-8.

    A plain file appears whole or not at all, and one that exists keeps its mode. Symbolic links are followed. Devices,
    FIFOs and /dev/stdout are written through.

    Raises:
      UserError: it cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with _told(path):
        target = _target(path)
        if _is_stream(path) or _is_special(target):
            with io.BufferedWriter(_opened_through(path)) as file:
                file.write(data)
        else:
            with aside(target) as file:
                file.write(data)


@contextlib.contextmanager
def aside(target: pathlib.Path, *, mode: int | None = None) -> Iterator[BinaryIO]:
    """A new file beside a plain file, which it replaces at the end of the block; discarded if the block fails.

    Args:
      mode: of the new file; None for the mode of the file that it replaces, or that of any new file.
    """
    with _changing:
        descriptor, name = tempfile.mkstemp(dir=target.absolute().parent, prefix=_ASIDE[0], suffix=_ASIDE[1])
        path = pathlib.Path(name)
        _asides.add(path)
    os.close(descriptor)
    try:
        with path.open("wb") as file:
            _try_lock(file)
            yield file
            file.flush()
            if mode is None:
                mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask()
            os.fchmod(file.fileno(), mode)
        with _changing:
            path.replace(target)
    finally:
        with _changing:
            path.unlink(missing_ok=True)
            _asides.discard(path)


@contextlib.contextmanager
def folder_aside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside a path, which it is renamed to at the end of the block; discarded if the block fails."""
    with _changing:
        path = pathlib.Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=_ASIDE[0], suffix=_ASIDE[1]))
        _asides.add(path)
    try:
        yield path
        path.chmod(0o777 & ~_umask())
        with _changing:
            path.rename(target)
    finally:
        with _changing:
            shutil.rmtree(path, ignore_errors=True)
            _asides.discard(path)


def discard_asides() -> None:
    """Remove the unfinished files and folders of this process, which is about to be ended, and begin no others."""
    _changing.acquire()
    for path in tuple(_asides):
        if path.is_dir():
            for _ in range(_ATTEMPTS):  # other threads may still write there
                shutil.rmtree(path, ignore_errors=True)
                if not path.exists():
                    break
        else:
            path.unlink(missing_ok=True)


def sweep(folder: pathlib.Path) -> None:
    """Remove unfinished files from a folder that belongs to this project, if no process writes them any more."""
    for path in folder.glob("*".join(_ASIDE)):
        with contextlib.suppress(OSError), path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class GrowingFile:
    """An open file that grows by whole lines; see `growing`.

    Attributes:
      path: as given.
      held: reads what the file holds so far; nothing if it is no plain file.
    """

    def __init__(self, path: pathlib.Path, file: io.FileIO, held: BinaryIO | None = None):
        self.path, self._file, self._plain = path, file, held is not None
        self.held = held or io.BytesIO()

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes of a plain file."""
        if self._plain:
            with _told(self.path):
                self._file.truncate(size)

    def append(self, data: bytes) -> None:
        """Add lines and sync them to disk. If they cannot all be written, none is.

        Raises:
          UserError: they cannot be written.
        """
        with _told(self.path):
            size = self._file.seek(0, os.SEEK_END) if self._plain else 0
            left = memoryview(data)
            try:
                while left:
                    left = left[self._file.write(left) :]
                if self._plain:
                    os.fsync(self._file.fileno())
            except OSError:
                if self._plain:
                    self._file.truncate(size)
                raise


@contextlib.contextmanager
def growing(path: pathlib.Path) -> Iterator[GrowingFile]:
    """A file that grows by lines; no other run may write it meanwhile, where its file system has locks.

    Symbolic links are followed. Devices, FIFOs and /dev/stdout are written through. No empty file is left.

    Raises:
      UserError: it cannot be written, or another run is writing it; the message has the process that does.
    """
    with _told(path):
        through = _opened_through(path) if _is_stream(path) or _is_special(_target(path)) else None
    if through:
        with through:
            yield GrowingFile(path, through)
        return
    with _told(path):
        target, is_new = _target(path), False
        try:
            descriptor = os.open(target, os.O_RDWR)
        except FileNotFoundError:
            descriptor, is_new = os.open(target, os.O_RDWR | os.O_CREAT, 0o666), True
    with io.FileIO(descriptor, "r+") as file, os.fdopen(os.dup(descriptor), "rb") as held:
        # A run that has just ended may have removed the file, which was empty, after this one opened it.
        if not _try_lock(file) or not _is_at(descriptor, target):
            raise UserError(f"{path}: {_holder(file)} is writing it; wait for that, or give a new file")
        try:
            yield GrowingFile(path, file, held)
        finally:
            with contextlib.suppress(OSError):
                if is_new and not os.fstat(descriptor).st_size and _is_at(descriptor, target):
                    target.unlink()


def check_plain(path: pathlib.Path, largest: int | None = None, *, name: str = "") -> None:
    """Check a file before it is opened: to read a FIFO or a device may block, or never end.

    Args:
      largest: the most bytes that it may have; None for any number.
      name: what error messages call it; the path if empty.

    Raises:
      UserError: it is no plain file, is too large, or cannot be looked at.
    """
    name = name or str(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or reason(error)})") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{name}: found {_kind(found.st_mode)}, expected a plain file")
    if largest is not None and found.st_size > largest:
        raise UserError(f"{name}: has {found.st_size:,} bytes, expected at most {largest:,}")


def read_text(path: pathlib.Path, name: str, *, plain: bool = False) -> str:
    """The text of a file of at most 256 MiB, which error messages call `name`.

    Args:
      plain: refuse what is no plain file. Reading a FIFO or a device may never end.
    """
    if plain:
        check_plain(path, _LARGEST, name=name)
    try:
        with path.open("rb") as file:
            return read_stream(file, name)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_stream(file: BinaryIO, name: str) -> str:
    """The text of an open file; see `read_text`."""
    data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise UserError(f"{name}: is longer than {_LARGEST >> 20} MiB, expected a text of at most that")
    return decoded(data, name)


def decoded(data: bytes, name: str) -> str:
    """UTF-8 bytes as text, without a byte-order mark; error messages call the source `name`."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})") from error


def _target(path: str | os.PathLike) -> pathlib.Path:
    """Where a path leads, symbolic links followed."""
    if "\0" in os.fspath(path):
        raise OSError(errno.EINVAL, "its name holds a NUL")
    target = pathlib.Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def _is_special(path: pathlib.Path) -> bool:
    """Whether there is something at a path that is no plain file."""
    return path.exists() and not path.is_file()


def is_plain(path: str | os.PathLike) -> bool:
    """Whether `write_whole` makes or replaces a plain file, and does not write through a stream or a device."""
    return not _is_stream(path) and not _is_special(_target(path))


def _is_stream(path: str | os.PathLike) -> bool:
    return _descriptor(path) is not None


def _descriptor(path: str | os.PathLike) -> int | None:
    """The open file that a path such as /dev/stdout stands for; None for the path of a file."""
    named = _DESCRIPTOR.fullmatch(os.fspath(path))
    return int(named[1]) if named else _STREAMS.get(os.fspath(path))


def _opened_through(path: str | os.PathLike) -> io.FileIO:
    descriptor = _descriptor(path)
    if descriptor is None:
        return io.FileIO(path, "w")
    sys.stdout.flush()
    return io.FileIO(os.dup(descriptor), "w")


@contextlib.contextmanager
def _told(path: str | os.PathLike) -> Iterator[None]:
    """Tell that a file cannot be written, unless it is a standard stream whose reader has gone."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_stream(path):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _is_at(descriptor: int, path: pathlib.Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _try_lock(file: BinaryIO | io.FileIO) -> bool:
    """Lock a file until it is closed; False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks
    return True


def _holder(file: io.FileIO) -> str:
    """Who has locked a file, as far as the system tells."""
    number = os.fstat(file.fileno()).st_ino
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "FLOCK" in fields and fields[5].rpartition(":")[2] == str(number):
                return f"another run (process {fields[4]})"
    return "another run"


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _umask() -> int:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0)  # for a moment other threads make files that anyone may write
    os.umask(mask)
    return mask
