"""What is wrong or hostile in a model folder ends in one line, soon, and without running the folder's code."""

import collections
import copy
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import tensorstore
from hostile.model_folders import (
    CODE,
    DOORS,
    MANIFESTS,
    MESSAGE,
    ROPE_SCALING,
    SPECIAL,
    TEMPLATES,
    TOKENIZERS,
    change,
    load,
    tokenizer_jsons,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import tokenizer
from refusals import places, refusal

from gemfilter_jax.checkpoints import tokenizer_folder
from gemfilter_jax.checkpoints.orbax_folder import MANIFEST, OrbaxFolder
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.text import chat_template, prompt

pytestmark = pytest.mark.timeout(60)

MUTATIONS = 500  # of each file, in the normal suite
ALL_MUTATIONS = 10_000
MEMORY = 1 << 30


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A good folder of each kind, which is never changed."""
    base = tmp_path_factory.mktemp("good")
    for name, door in DOORS.items():
        door.make(base / name)
    return {name: base / name for name in DOORS}


@pytest.fixture(params=DOORS)
def door(request, good, tmp_path):
    """A kind of folder, and a copy to be damaged."""
    return DOORS[request.param], pathlib.Path(shutil.copytree(good[request.param], tmp_path / "model"))


def refused(words: str, function, *args) -> None:
    message = refusal(function, *args)
    assert message is not None
    assert re.search(words, message), message


_RUN = """
import json, pathlib, sys
from hostile.model_folders import DOORS
from gemfilter_jax.errors import UserError

for line in json.loads(sys.argv[1]):
    name, folder = line
    try:
        opened = DOORS[name].open(pathlib.Path(folder))
        opened.tokenizer(), opened.stop_tokens()
        print(json.dumps("loads"))
    except UserError as error:
        print(json.dumps(str(error)))
print(json.dumps(sys.stdin.read()))
"""
_MINE = """
import pathlib
from transformers import PretrainedConfig

pathlib.Path({witness!r}).touch()
Mine = PretrainedConfig
"""


def python(program: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run a program that imports what tests import."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    options = {"capture_output": True, "text": True, "timeout": 100, "env": environment} | options
    return subprocess.run([sys.executable, "-P", "-c", program, *arguments], **options)


@pytest.mark.timeout(120)
def test_code_of_a_folder_is_neither_run_nor_asked_about(good, tmp_path):
    witness, folders, expected = tmp_path / "it_ran", [], []
    for name, door in DOORS.items():
        for index, (changes, words) in enumerate(CODE.values()):
            folder = pathlib.Path(shutil.copytree(good[name], tmp_path / f"{name}{index}"))
            for where in {folder, folder / door.tokenizer}:
                (where / "mine.py").write_text(_MINE.format(witness=str(witness)))
            for file, fields in changes.items():
                change(folder / door.tokenizer / file, fields)
            folders.append((name, str(folder)))
            expected.append(words)
    trusting = {"TRUST_REMOTE_CODE": "1", "HF_HUB_TRUST_REMOTE_CODE": "1", "TRANSFORMERS_TRUST_REMOTE_CODE": "1"}
    environment = os.environ | trusting | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "cache")}
    done = python(_RUN, json.dumps(folders), input="y\n" * 99, env=environment, cwd=folders[0][1])
    assert done.returncode == 0, done.stderr
    *outcomes, left = [json.loads(line) for line in done.stdout.splitlines()]
    for folder, words, outcome in zip(folders, expected, outcomes, strict=True):
        assert re.search(words, outcome), (folder, outcome)
    assert left == "y\n" * 99
    assert not witness.exists()
    assert "code" not in done.stderr


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_files(door, name):
    kind, folder = door
    changes, words = TOKENIZERS[name]
    for file, content in changes.items():
        change(folder / kind.tokenizer / file, content)
    opened = kind.open(folder)
    if words is None:
        opened.tokenizer()
    else:
        refused(words, opened.tokenizer)


@pytest.mark.parametrize(("content", "words"), MANIFESTS, ids=lambda value: str(value)[:60])
def test_manifest(good, tmp_path, content, words):
    folder = pathlib.Path(shutil.copytree(good["converted"], tmp_path / "model"))
    change(folder / MANIFEST, content)
    refused(words, load, DOORS["converted"], folder)


def fifo(path: pathlib.Path) -> None:
    os.mkfifo(path)


def device(path: pathlib.Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: pathlib.Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def directory(path: pathlib.Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("replacement", [fifo, device, sparse, directory])
def test_files_that_are_no_plain_files(door, replacement, tmp_path):
    """Each file of a folder in turn. What is not needed, or may be missing, need not be refused."""
    kind, folder = door
    needed = {folder / kind.config[0], folder / kind.tokenizer / "tokenizer.json", folder / "model.safetensors"}
    needed |= {folder / "weights" / name for name in ("_METADATA", "manifest.ocdbt")}
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file()]:
        path.rename(tmp_path / "aside")
        replacement(path)
        message = refusal(load, kind, folder)
        assert message is not None or path not in needed, path
        if replacement in (fifo, device):
            assert message is not None, path
            assert f"{path.name}: found a " in message
        path.rmdir() if replacement is directory else path.unlink()
        (tmp_path / "aside").rename(path)
    load(kind, folder)


_MEASURE = """
import pathlib, resource, sys
from hostile.model_folders import DOORS, load
from gemfilter_jax.errors import UserError

name, good, bad, limit = sys.argv[1:]
load(DOORS[name], pathlib.Path(good))  # what the runtime itself takes
status = pathlib.Path("/proc/self/status")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
try:
    load(DOORS[name], pathlib.Path(bad))
    print("loaded")
except UserError as error:
    print(str(error))
lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
print(int(lines["VmHWM"].split()[0]) * 1024)
"""


def peak(name: str, good: pathlib.Path, bad: pathlib.Path) -> tuple[str, int]:
    """What opening a folder ends in, and the most memory that the process held, in bytes."""
    done = python(_MEASURE, name, str(good), str(bad), str(MEMORY))
    assert done.returncode == 0, done.stderr
    outcome, size = done.stdout.splitlines()
    return outcome, int(size)


def sizes_of_the_config(kind, folder: pathlib.Path) -> str:
    file, field = kind.config
    change(folder / file, {field: kind.sizes} if field else kind.sizes)
    return "do not fit"


def array_without_chunks(kind, folder: pathlib.Path) -> str:
    array = stored(folder, "embedding")
    array.resize(inclusive_min=None, exclusive_max=[100_000_000, 48]).result()
    change(folder / MANIFEST, {"config": {"vocab": 100_000_000}})
    return "the arrays take 19,2.* bytes"


def array_of_one_huge_chunk(kind, folder: pathlib.Path) -> str:
    spec = stored(folder, "embedding").spec().to_json()
    spec["metadata"] |= {"chunks": [128, 4_000_000]}
    spec.pop("transform")
    tensorstore.open(spec, create=True, delete_existing=True).result()[0, 0].write(1.0).result()
    return r"embedding of shape \[128, 48\] has larger chunks"


def stored(folder: pathlib.Path, name: str):
    store = {"driver": "ocdbt", "base": f"file://{folder}/weights", "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("name", DOORS)
def test_sizes_of_the_config_take_no_memory(good, tmp_path, name):
    folder = pathlib.Path(shutil.copytree(good[name], tmp_path / "model"))
    words = sizes_of_the_config(DOORS[name], folder)
    outcome, size = peak(name, good[name], folder)
    assert re.search(words, outcome)
    assert size < MEMORY


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("claim", [array_without_chunks, array_of_one_huge_chunk])
def test_claims_of_arrays_take_no_memory(good, tmp_path, claim):
    folder = pathlib.Path(shutil.copytree(good["converted"], tmp_path / "model"))
    words = claim(DOORS["converted"], folder)
    outcome, size = peak("converted", good["converted"], folder)
    assert re.search(words, outcome)
    assert size < MEMORY


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template(name):
    template, words = TEMPLATES[name]
    hostile = tokenizer()
    hostile.chat_template = template
    refused(words, prompt.check_format, hostile, True, prompt.MESSAGE_FORMAT)


@pytest.mark.parametrize(("template", "words"), [(5, "it is 5, expected"), ({"a": MESSAGE}, "no default specified")])
def test_chat_template_that_is_none(template, words):
    hostile = tokenizer()
    hostile.chat_template = template
    refused(words, chat_template.around, hostile)


def test_chat_template_is_rendered_as_transformers_does():
    own = tokenizer()
    own.chat_template = (
        "{{ unk_token }}{{ messages[0].role }}: " + MESSAGE + "{% if add_generation_prompt %}!{% endif %}"
    )
    message = [{"role": "user", "content": "|"}]
    rendered = own.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert chat_template.around(own) == tuple(str(rendered).split("|"))


def test_chat_template_is_rendered_once(monkeypatch):
    own = tokenizer()
    own.chat_template = MESSAGE + "once"
    chat_template.around(own)
    monkeypatch.setattr(chat_template.subprocess, "run", None)
    assert chat_template.around(own) == ("", "once")


# Mutations. Each changes one to three values of a good file.

_ODD = [None, True, -1, 0, 1, 2, 3.5, 2**31, 2**32 - 1, 2**64, 10**400, 1e-300, float("nan"), float("inf"), "", "8"]
_ODD += [
    "\0",
    "\ud800",
    "two\nlines",
    "../x",
    "x" * 300,
    [],
    [[]],
    [None],
    {},
    {"a": 1},
    {"type": "Sequence"},
    ["a", "b"],
]


@st.composite
def mutated(draw, goods: list[dict]) -> str:
    """The text of a file: one of some good ones, changed."""
    fields = copy.deepcopy(draw(st.sampled_from(goods)))
    strings = sorted({str(container[key]) for container, key in places(fields)} | {str(k) for _, k in places(fields)})
    for _ in range(draw(st.integers(1, 3))):
        found = places(fields)
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        match draw(st.integers(0, 4)):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[draw(st.sampled_from([*strings, "x", "type"]))] = copy.deepcopy(draw(st.sampled_from(_ODD)))
            case 2:
                container[key] = draw(st.sampled_from(strings))
            case 3:
                other, name = draw(st.sampled_from(found))
                container[key] = copy.deepcopy(other[name])
            case _:
                container[key] = copy.deepcopy(draw(st.sampled_from(_ODD)))
    text = json.dumps(fields)
    cut = draw(st.integers(0, 30))
    return text if cut else text[: draw(st.integers(0, len(text)))]


def manifests(good: dict[str, pathlib.Path]) -> list[dict]:
    plain = json.loads((good["converted"] / MANIFEST).read_text())
    scaled = plain | {"config": plain["config"] | {"rope_scaling": ROPE_SCALING, "sliding_windows": [None, 5, 7]}}
    return [plain, scaled]


def open_manifest(folder: pathlib.Path) -> None:
    opened = OrbaxFolder(folder)
    assert isinstance(opened.config, ModelConfig)
    hash(opened.config)
    assert all(0 <= token < opened.config.vocab for token in opened.stop_tokens())
    assert all(1 <= opened.config.reach(layer) <= opened.config.context for layer in range(opened.config.layers))


def open_tokenizer(folder: pathlib.Path) -> None:
    tokenizer_folder.load(folder, folder)


CONFIGS = [
    {"tokenizer_class": "TokenizersBackend", "unk_token": "?", "model_max_length": 100, "padding_side": "left"},
    {
        "tokenizer_class": "GPT2Tokenizer",
        "auto_map": {"AutoTokenizer": ["mine.Mine", None]},
        "added_tokens_decoder": {"2": SPECIAL | {"content": "?"}},
        "additional_special_tokens": ["?", "new"],
        "chat_template": [{"name": "default", "template": MESSAGE}],
        "fast_tokenizer_files": ["tokenizer.1.0.0.json"],
        "pad_token": {"__type": "AddedToken"} | SPECIAL,
        "clean_up_tokenization_spaces": False,
    },
]
KINDS = {
    MANIFEST: (manifests, open_manifest),
    "tokenizer.json": (lambda _: tokenizer_jsons(), open_tokenizer),
    "tokenizer_config.json": (lambda _: CONFIGS, open_tokenizer),
}


def mutate(good: dict[str, pathlib.Path], folder: pathlib.Path, name: str, examples: int) -> None:
    goods, opened = KINDS[name]
    where = good["converted"] if name == MANIFEST else good["converted"] / "tokenizer"
    folder = pathlib.Path(shutil.copytree(where, folder, ignore=shutil.ignore_patterns("weights")))
    outcomes = collections.Counter()
    for fields in goods(good):
        change(folder / name, json.dumps(fields))
        opened(folder)

    @settings(derandomize=True, deadline=None, max_examples=examples, database=None)
    @given(text=mutated(goods(good)))
    def try_one(text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")
        outcomes[refusal(opened, folder) is None] += 1

    try_one()
    assert min(outcomes[True], outcomes[False]) > 0.02 * examples, outcomes


@pytest.mark.parametrize("name", KINDS)
def test_mutations(good, tmp_path, name):
    mutate(good, tmp_path / "model", name, MUTATIONS)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KINDS)
def test_many_mutations(good, tmp_path, name):
    mutate(good, tmp_path / "model", name, ALL_MUTATIONS)
