"""Checks of output paths, atomic writes, and reading of text files."""

import os
import pathlib
import tempfile

from gemfilter_jax.errors import UserError


def check_writable(path: str, flag: str) -> None:
    """Raise a `UserError` that names `flag` if a file cannot be written to `path`; leaves no file behind."""
    target = pathlib.Path(path)
    if target.is_dir():
        raise UserError(f"--{flag}={path}: is a folder; give a file name")
    if not target.parent.is_dir():
        raise UserError(f"--{flag}={path}: folder {target.parent} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UserError(f"--{flag}={path}: cannot be written ({error.strerror})") from error


def check_new_folder(folder: pathlib.Path) -> None:
    """Raise a `UserError` if `folder` exists or its parent does not."""
    if folder.exists():
        raise UserError(f"--output={folder}: exists already; give a new folder")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"--output={folder}: folder {folder.parent} does not exist; create it first")


def write_whole(path: str, content: str | bytes) -> None:
    """Write a temporary file, with text as UTF-8, and rename it to `path`."""
    target = pathlib.Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        aside = pathlib.Path(file.name)
        try:
            file.write(data)
        except BaseException:
            aside.unlink()
            raise
    aside.chmod(0o666 & ~_umask())
    aside.replace(target)


def read_text(path: pathlib.Path, name: str) -> str:
    """The text of a file, which error messages call `name`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # the path contains a NUL
        raise UserError(f"{name}: cannot be read ({error})") from error
    return decoded(data, name)


def decoded(data: bytes, name: str) -> str:
    """UTF-8 bytes as text; error messages call the source `name`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
