"""Flags of every command with hostile values: one line and status 2, or the command's work, which is replaced here."""

import copy
import importlib
import io
import os
import sys

import jax
import pytest
from hostile.attacks import NUMBERS, STRINGS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemfilter_jax.cli import options
from gemfilter_jax.cli.main import COMMANDS
from gemfilter_jax.errors import UserError

_REACHED = "the work is reached"
_NEEDED = {
    "generate": ["--prompt_file={text}"],
    "select": ["--prompt_file={text}"],
    "chat": ["--prompt_file={text}"],
    "convert": ["--output={new}"],
    "plan": ["--model=llama-3.1-8b", "--tokens=4096", "--topology=v5e:1x1"],
}
"""What a command cannot do without; later flags win."""
_OF_PROCESSES = ("distributed", "coordinator", "processes", "process")  # these would join other processes
_EXAMPLES = 1_200
_LITTLE_MEMORY = (
    "gemfilter generate: memory is too small for this; give a shorter text, a smaller model or --weights=int8\n"
)


def _modules():
    return {name: importlib.import_module(f"gemfilter_jax.cli.{name}") for name in COMMANDS}


def _flags() -> list[tuple[str, str]]:
    """Each flag of each command."""
    return [(name, flag) for name, module in _modules().items() for flag in module.FLAGS if flag not in _OF_PROCESSES]


class _Streams:
    """Standard streams in memory."""

    def __init__(self, typed: bytes = b"ab 12"):
        self.stdin = io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
        self.stdout, self.stderr = io.StringIO(), io.StringIO()


def _raise(*_: object, **__: object) -> None:
    raise UserError(_REACHED)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command line; returns its status and what it says."""
    (tmp_path / "text.txt").write_text("ab 12 " * 50)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "load_pipeline", _raise)
    monkeypatch.setattr("gemfilter_jax.checkpoints.load_checkpoint", _raise)
    monkeypatch.setattr("gemfilter_jax.checkpoints.embedded.fetch", _raise)
    monkeypatch.setattr("gemfilter_jax.checkpoints.hub.cached_or_downloaded", _raise)
    monkeypatch.setattr("gemfilter_jax.planning.plan.make", _raise)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # the streams of the tests stay as they are
    originals = {name: module.FLAGS for name, module in _modules().items()}
    text, new = tmp_path / "text.txt", tmp_path / "new"

    def running(name: str, *given: str) -> tuple[int, str]:
        module = _modules()[name]
        needed = [one.format(text=text, new=new) for one in _NEEDED.get(name, [])]
        streams, status = _Streams(), 0
        with monkeypatch.context() as patch:
            patch.setattr(module, "FLAGS", copy.deepcopy(originals[name]))
            patch.setattr(sys, "argv", [f"gemfilter {name}", *needed, *given])
            for stream in ("stdin", "stdout", "stderr"):
                patch.setattr(sys, stream, getattr(streams, stream))
            try:
                module.run()
            except SystemExit as ended:
                status = int(ended.code or 0)
        return status, streams.stderr.getvalue()

    return running


def _check(run, name: str, *given: str) -> None:
    before = sorted(os.listdir())
    status, told = run(name, *given)
    assert status == 2, (given, told)
    assert told.startswith(f"gemfilter {name}: ")
    assert told.endswith("\n")
    assert told[:-1].isprintable(), told
    assert len(told) < 20_000
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(("name", "flag"), _flags())
def test_every_flag_with_every_value(run, name, flag):
    for value in dict.fromkeys([*NUMBERS, *STRINGS]):
        _check(run, name, f"--{flag}={value}")


def _drawn(examples: int):
    @settings(
        derandomize=True,
        deadline=None,
        max_examples=examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(data=st.data())
    def test(run, data):
        name, flag = data.draw(st.sampled_from(_flags()))
        values = st.one_of(
            st.sampled_from([*NUMBERS, *STRINGS]),
            st.text(st.characters(exclude_characters="\0"), max_size=40),
            st.integers().map(str),
            st.floats().map(str),
        )
        others = [other for owner, other in _flags() if owner == name]
        given = [f"--{flag}={data.draw(values)}"]
        if data.draw(st.booleans()):
            given.append(f"--{data.draw(st.sampled_from(others))}={data.draw(values)}")
        _check(run, name, *given)

    return test


test_flags_that_were_drawn = _drawn(_EXAMPLES)
test_many_flags_that_were_drawn = pytest.mark.exhaustive(_drawn(20 * _EXAMPLES))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("argument", ["\udcff", "--model=\udcff", "--no_such_flag", "---", "--=", "stray\x1b[2J", "-x"])
def test_arguments_that_are_no_flags(run, name, argument):
    if name == "fetch" and not argument.startswith("-") and argument.isprintable():
        return
    _check(run, name, argument, "stray")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 1 byte")],
    ids=repr,
)
def test_too_little_memory(run, monkeypatch, error):
    def too_little(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(options, "load_pipeline", too_little)
    assert run("generate") == (2, _LITTLE_MEMORY)
