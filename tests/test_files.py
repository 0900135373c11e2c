"""Outputs: whole or not at all, through what is no plain file, and one run at a time."""

import contextlib
import os
import pathlib
import resource
import stat
import subprocess
import sys
import threading

import pytest

from gemfilter_jax import files
from gemfilter_jax.errors import UserError


@contextlib.contextmanager
def file_size_limit(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _reading(path: pathlib.Path) -> tuple[threading.Thread, list[bytes]]:
    """A thread that reads a FIFO to its end."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(path.read_bytes()))
    thread.start()
    return thread, found


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755, 0o640])
def test_a_file_that_exists_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "page.html"
    path.touch()
    path.chmod(mode)
    files.write_whole(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_that_the_mask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_whole(tmp_path / "page.html", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o640


def test_links_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "page.html", tmp_path / "link.html"
    link.symlink_to(target)
    for content in ("first", "second"):  # of a link that leads nowhere yet, too
        files.check_writable(str(link), "report")
        files.write_whole(link, content)
        assert link.is_symlink()
        assert target.read_text() == content
    with files.growing(link) as output:
        output.cut(0)
        output.append(b"third\n")
    assert link.is_symlink()
    assert target.read_text() == "third\n"


def test_a_fifo_is_written_through(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    files.check_writable(str(path), "report")
    thread, found = _reading(path)
    files.write_whole(path, "content")
    thread.join(10)
    assert found == [b"content"]
    thread, found = _reading(path)
    with files.growing(path) as output:
        assert output.held.read() == b""
        output.cut(0)
        output.append(b"1\n")
        output.append(b"2\n")
    thread.join(10)
    assert found == [b"1\n2\n"]
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_devices_are_written_through():
    files.check_writable("/dev/null", "report")
    files.write_whole("/dev/null", "content")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(UserError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        files.write_whole("/dev/full", "content")
    with files.growing(pathlib.Path("/dev/full")) as output, pytest.raises(UserError, match="No space left"):
        output.append(b"1\n")


_TO_STREAMS = """
import pathlib
from gemfilter_jax import files
print("before")
files.check_writable("/dev/stdout", "report")
files.write_whole("/dev/stdout", "content\\n")
files.write_whole("/proc/self/fd/1", "more\\n")
with files.growing(pathlib.Path("/dev/stdout")) as output:
    output.append(b"lines\\n")
files.write_whole("/dev/stderr", "told\\n")
print("after")
"""


def test_standard_streams_are_written_through(tmp_path):
    """Into a file, which goes on where the output stood, and into a pipe."""
    path = tmp_path / "output"
    with path.open("wb") as file:
        done = subprocess.run([sys.executable, "-c", _TO_STREAMS], stdout=file, stderr=subprocess.PIPE, check=True)
    assert path.read_text() == "before\ncontent\nmore\nlines\nafter\n"
    assert done.stderr == b"told\n"
    piped = subprocess.run([sys.executable, "-c", _TO_STREAMS], capture_output=True, check=True)
    assert piped.stdout == path.read_bytes()


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")
    with file_size_limit(1000), pytest.raises(UserError, match="cannot be written"):
        files.write_whole(path, "x" * 5000)
    assert path.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]


def test_a_line_that_does_not_fit_leaves_the_lines_before(tmp_path):
    path = tmp_path / "lines.jsonl"
    with files.growing(path) as output:
        output.append(b"x" * 600 + b"\n")
        with file_size_limit(1000), pytest.raises(UserError, match="cannot be written"):
            output.append(b"y" * 600 + b"\n")
        assert path.read_bytes() == b"x" * 600 + b"\n"
        output.append(b"z\n")
    assert path.read_bytes() == b"x" * 600 + b"\nz\n"


def test_a_file_grows_by_one_run_at_a_time(tmp_path):
    path = tmp_path / "lines.jsonl"
    code = "import pathlib, sys\nfrom gemfilter_jax import files\nwith files.growing(pathlib.Path(sys.argv[1])): ..."
    command = [sys.executable, "-c", code, path]
    with files.growing(path) as output:
        output.append(b"1\n")
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"lines.jsonl: another run (process {os.getpid()}) is writing it" in second.stderr
        assert path.read_bytes() == b"1\n"
    assert subprocess.run(command, check=False).returncode == 0
    assert path.read_bytes() == b"1\n"


def test_no_empty_file_is_left_but_one_that_was_there(tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to("target.jsonl")
    for path in (tmp_path / "lines.jsonl", link):
        with pytest.raises(OSError, match="of something else"), files.growing(path):
            raise OSError("of something else")
    assert [one.name for one in tmp_path.iterdir()] == ["link.jsonl"]
    (tmp_path / "target.jsonl").touch(0o600)
    with files.growing(link):
        pass
    assert {one.name for one in tmp_path.iterdir()} == {"link.jsonl", "target.jsonl"}


def test_a_file_that_was_removed_while_it_was_opened_is_not_grown(tmp_path, monkeypatch):
    """Another run, which leaves no lines, ends between this one's opening and its lock."""
    path, lock = tmp_path / "lines.jsonl", files._try_lock

    def late(file):
        path.unlink()
        return lock(file)

    monkeypatch.setattr(files, "_try_lock", late)
    with pytest.raises(UserError, match=r"another run .*is writing it"), files.growing(path):
        pass


def test_a_fifo_whose_reader_has_gone_is_told(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with files.growing(path) as output:
        os.close(reading)
        with pytest.raises(UserError, match=r"fifo: cannot be written \(Broken pipe\)"):
            output.append(b"1\n")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no/such/page.html", "does not exist"),
        (".", "is a folder"),
        ("file/page.html", "cannot be written|does not exist"),
        ("a" * 300, "File name too long"),
        ("loop", "Too many levels|cannot be written|Symlink loop"),
        ("/proc/page.html", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_beforehand(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=f"--report={path}: .*({said})"):
        files.check_writable(path, "report")
    with pytest.raises(UserError, match="cannot be written"):
        files.write_whole(path, "content")
    with pytest.raises(UserError, match="cannot be written"), files.growing(pathlib.Path(path)):
        pass
    assert {one.name for one in tmp_path.iterdir()} == {"file", "loop"}


@pytest.mark.parametrize("path", ["file", "file/folder", "/proc/folder", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_told_beforehand(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--document_cache={path}: "):
        files.check_folder(path, "document_cache")
    files.check_folder("new/folder", "document_cache")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_only_plain_files_of_bounded_size_are_read_on_request(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, said in ((tmp_path / "fifo", "a FIFO"), (pathlib.Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=f"the text: found {said}, expected a plain file"):
            files.read_text(path, "the text", plain=True)
    with pytest.raises(UserError, match="longer than 256 MiB"):
        files.read_text(pathlib.Path("/dev/zero"), "the text")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="File exists"), files.folder_aside(tmp_path / "model") as folder:
        folder.mkdir()
    assert list(tmp_path.iterdir()) == []
    with files.folder_aside(tmp_path / "model") as folder:
        (folder / "weights").touch()
    assert [one.name for one in tmp_path.iterdir()] == ["model"]
