"""A model folder brings data, never code."""

import json
import os
import subprocess
import sys

from model_files import tokenizer

_LOAD = """
import pathlib, sys
from gemfilter_jax.checkpoints import tokenizer_folder
from gemfilter_jax.errors import UserError
folder = pathlib.Path(sys.argv[1])
try:
    print("loaded", type(tokenizer_folder.load(folder, folder)).__name__)
except UserError as error:
    print("refused", error)
print("left in standard input:", sys.stdin.read())
"""
_CODE = """
import pathlib
from transformers import PreTrainedTokenizerFast

pathlib.Path(__file__).with_name("it_ran").touch()
pathlib.Path({witness!r}).touch()

class Mine(PreTrainedTokenizerFast):
    pass
"""


def test_code_of_a_folder_is_neither_run_nor_asked_about(tmp_path):
    folder, witness = tmp_path / "model", tmp_path / "it_ran"
    tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    fields |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    path.write_text(json.dumps(fields))
    (folder / "mine.py").write_text(_CODE.format(witness=str(witness)))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _LOAD, str(folder)]
    done = subprocess.run(command, input="y\n", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outcome, left, _ = done.stdout.split("\n", 2)
    assert outcome.startswith(("loaded", f"refused {folder}: no usable tokenizer ("))
    assert left == "left in standard input: y"
    assert not witness.exists()
    assert not list(folder.glob("it_ran"))
