"""Model folders that attack whoever opens them: for each kind of folder, changes to a good one."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import huggingface_hub
from model_files import FLOAT32, GOLDEN, tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gemfilter_jax import checkpoints
from gemfilter_jax.checkpoints import orbax_folder
from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder

_MODEL = GOLDEN / "llama_gqa_tied"
_SIZES = {
    "vocab_size": 2**31 - 1, "num_hidden_layers": 10_000, "hidden_size": 2**31 - 2, "intermediate_size": 2**31 - 1,
    "max_position_embeddings": 2**31 - 1,
}  # fmt: skip
_CONVERTED_SIZES = {
    "vocab": 2**31 - 1,
    "layers": 10_000,
    "width": 2**31 - 2,
    "mlp_width": 2**31 - 1,
    "context": 2**31 - 1,
}


@dataclasses.dataclass(frozen=True)
class Door:
    """A kind of model folder.

    Attributes:
      make: writes a good folder.
      open: opens a folder as a user would.
      config: the file with the model's settings, and the field that holds them, if one does.
      sizes: fields of the settings, with values beyond any machine.
      tokenizer: the folder of the tokenizer's files.
    """

    make: Callable[[pathlib.Path], Any]
    open: Callable[[pathlib.Path], checkpoints.Opened]
    config: tuple[str, str | None]
    sizes: dict[str, int]
    tokenizer: str


def _hugging_face(folder: pathlib.Path) -> None:
    shutil.copytree(_MODEL, folder, ignore=shutil.ignore_patterns("*.npz"))
    tokenizer().save_pretrained(folder)


def _converted(folder: pathlib.Path) -> None:
    model = HuggingFaceFolder(_MODEL).decoder(FLOAT32)
    orbax_folder.save(folder, "tiny", model, tokenizer(), (2,))


def _open_folder(folder: pathlib.Path) -> checkpoints.Opened:
    return checkpoints.open_checkpoint(str(folder))


def _open_on_hub(folder: pathlib.Path) -> checkpoints.Opened:
    download = huggingface_hub.snapshot_download
    huggingface_hub.snapshot_download = lambda *_, **__: str(folder)
    try:
        return checkpoints.open_checkpoint("owner/name")
    finally:
        huggingface_hub.snapshot_download = download


DOORS = {
    "folder": Door(_hugging_face, _open_folder, ("config.json", None), _SIZES, "."),
    "hub": Door(_hugging_face, _open_on_hub, ("config.json", None), _SIZES, "."),
    "converted": Door(_converted, _open_folder, ("gemfilter.json", "config"), _CONVERTED_SIZES, "tokenizer"),
}


def load(door: Door, folder: pathlib.Path) -> checkpoints.Checkpoint:
    return checkpoints.load_checkpoint(door.open(folder), "float32")


def change(path: pathlib.Path, content: dict | str | bytes | None) -> None:
    """Write a file: an object adds to the object that the file holds, None removes it."""
    if content is None:
        path.unlink(missing_ok=True)
    elif isinstance(content, dict):
        fields = json.loads(path.read_text()) if path.exists() else {}
        for name, value in content.items():
            nested = isinstance(value, dict) and name == "config"
            fields[name] = fields[name] | value if nested else value
        path.write_text(json.dumps(fields))
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


# Code. Each folder also holds mine.py, which leaves a mark when it runs. The tokenizer of those that end with "loads"
# does not need it.

_MAP = {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
CODE: dict[str, tuple[dict[str, dict | None], str]] = {
    "own class": ({"tokenizer_config.json": {"tokenizer_class": "Mine", "auto_map": _MAP}}, "needs code"),
    "own class, repository": (
        {"tokenizer_config.json": {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["a/b--mine.Mine"] * 2}}},
        "needs code",
    ),
    "own class without tokenizer.json": (
        {"tokenizer_config.json": {"tokenizer_class": "Mine", "auto_map": _MAP}, "tokenizer.json": None},
        "needs code",
    ),
    "own class in the old form": (
        {"tokenizer_config.json": {"tokenizer_class": "Mine", "auto_map": _MAP["AutoTokenizer"]}},
        "needs code",
    ),
    "not needed": ({"tokenizer_config.json": {"auto_map": _MAP}}, "loads"),
    "not named": ({"tokenizer_config.json": {"tokenizer_class": "Mine"}}, "loads"),
    "class of a module": ({"tokenizer_config.json": {"tokenizer_class": "mine.Mine"}}, "expected a class"),
    "generation": ({"generation_config.json": {"custom_generate": "mine", "auto_map": {"x": "mine.Mine"}}}, "loads"),
    "processor": (
        {
            "tokenizer_config.json": {"tokenizer_class": "AutoProcessor"},
            "processor_config.json": {"processor_class": "Mine", "auto_map": {"AutoProcessor": "mine.Mine"}},
        },
        "'AutoProcessor', expected a fast tokenizer",
    ),
    "feature extractor": (
        {
            "tokenizer_config.json": {"tokenizer_class": "AutoFeatureExtractor"},
            "preprocessor_config.json": {
                "feature_extractor_type": "Mine",
                "auto_map": {"AutoFeatureExtractor": "mine.Mine"},
            },
        },
        "'AutoFeatureExtractor', expected a fast tokenizer",
    ),
    "tokenizer again": (
        {"tokenizer_config.json": {"tokenizer_class": "AutoTokenizerFast", "auto_map": _MAP}},
        "'AutoTokenizerFast', expected a fast tokenizer",
    ),
    "config": (
        {
            "config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}},
            "tokenizer_config.json": {"tokenizer_class": "AutoConfig"},
        },
        "'mine' is not supported|'AutoConfig', expected a fast tokenizer",
    ),
    "class in config.json": (
        {
            "config.json": {"tokenizer_class": "AutoProcessor"},
            "processor_config.json": {"processor_class": "Mine", "auto_map": {"AutoProcessor": "mine.Mine"}},
        },
        "unsupported field.s. tokenizer_class|'AutoProcessor', expected a fast tokenizer",
    ),
}

# Changes to the tokenizer's files, and words of the refusal; None where it loads.

SPECIAL = {"content": "b", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_WORDS = {"type": "WordLevel", "vocab": {"a": 0, "?": 2}, "unk_token": "?"}
_STEPS = [{"SpecialToken": {"id": "x", "type_id": 0}}]
_UNKNOWN_TOKEN = {"type": "TemplateProcessing", "single": _STEPS, "pair": [], "special_tokens": {}}
TOKENIZERS: dict[str, tuple[dict[str, dict | str | bytes | None], str | None]] = {
    **{
        name: ({"tokenizer_config.json": fields}, words)
        for name, fields, words in (
            ("names another folder's file", {"fast_tokenizer_files": ["../tokenizer.1.0.json"]}, "names file"),
            ("versions that are no list", {"fast_tokenizer_files": 5}, "names file 5"),
            ("old paths", {"vocab_file": "/no/x", "tokenizer_file": "/a/b"}, None),
            ("path as vocabulary", {"vocab": "/dev/stdin"}, "unsupported field 'vocab'"),
            ("path as merges", {"merges": "/dev/stdin"}, "unsupported field 'merges'"),
            ("GGUF elsewhere", {"gguf_file": "../x.gguf"}, "unsupported field 'gguf_file'"),
            ("token far away", {"added_tokens_decoder": {str(2**31): SPECIAL}}, "token '2147483648'"),
            ("token of no number", {"added_tokens_decoder": {"x": SPECIAL}}, "token 'x'"),
            ("length of no number", {"model_max_length": "x"}, "no usable tokenizer"),
        )
    },
    **{
        name: ({"tokenizer.json": fields}, words)
        for name, fields, words in (
            ("largest id", {"added_tokens": [SPECIAL | {"id": 2**32 - 1}]}, None),
            ("id beyond", {"added_tokens": [SPECIAL | {"id": 2**32}]}, "no usable tokenizer"),
            ("ids with holes", {"model": _WORDS | {"vocab": {"a": 0, "b": 2**32 - 1, "?": 2}}}, None),
            ("panic at loading", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "Precompiled"),
            ("panic at encoding", {"post_processor": _UNKNOWN_TOKEN}, "no entry found for key"),
            ("no unknown token", {"model": _WORDS | {"vocab": {"b": 0}, "unk_token": "c"}}, "no usable tokenizer"),
        )
    },
    "vocabulary elsewhere": (
        {"tokenizer_config.json": {"vocab_file": "../../x"}, "tokenizer.json": None},
        "names file '../../x'",
    ),
    "tokenizer elsewhere": (
        {"special_tokens_map.json": {"tokenizer_file": "/etc/passwd"}},
        "unsupported field 'tokenizer_file'",
    ),
    "special tokens": ({"special_tokens_map.json": {"bos_token": "a", "pad_token": SPECIAL}}, None),
    "bytes": ({"tokenizer.json": b"\xff\xfe\0"}, "no usable tokenizer"),
    "other bytes": ({"tokenizer_config.json": b"\xff\xfe\0"}, "tokenizer_config.json: not readable as JSON"),
    "deep": ({"tokenizer.json": "[" * 100_000}, "no usable tokenizer"),
    "deep config": ({"tokenizer_config.json": "[" * 100_000}, "tokenizer_config.json: not readable as JSON"),
    "a list": ({"tokenizer_config.json": "[]"}, "expected a JSON object, found list"),
    "a list of special tokens": ({"special_tokens_map.json": "[]"}, "expected a JSON object, found list"),
    "template of bytes": ({"chat_template.jinja": b"\xff"}, "no usable tokenizer"),
}

# The manifest of a converted folder: a change, and words of the refusal.

_NUMBERS = [0, -1, 1.5, True, "8", [], {}, [[8]], 10**400, float("nan"), 2**31]
MANIFESTS: list[tuple[dict | str | bytes, str]] = [
    *(
        ({"config": {name: value}}, f"field '{name}' is ")
        for name in ("vocab", "layers", "width")
        for value in _NUMBERS
    ),
    *(
        ({"config": {"rms_eps": value}}, "field 'rms_eps' is ")
        for value in (0, -1, True, "1", [], float("nan"), float("inf"), 1e-60, 10**400)
    ),
    *(({"config": {name: 1}}, f"field '{name}' is 1, expected true or false") for name in ("qk_norm", "mlp_bias")),
    *(({"config": {name: None}}, f"field '{name}' is missing") for name in ("vocab", "family", "rope_theta")),
    ({"config": {"layers": 10_001}}, "at most 10,000"),
    ({"config": {"family": "gpt7"}}, "family 'gpt7' is not supported"),
    ({"config": {"family": ["llama"]}}, r"field 'family' is \['llama'\], expected a string"),
    ({"config": {"activation": 1}}, "field 'activation' is 1, expected a string"),
    ({"config": {"activation": "swish7"}}, "activation 'swish7' is not supported"),
    ({"config": {"more": 1}}, r"unsupported field\(s\) more"),
    ({"config": {"sliding_windows": 5}}, "field 'sliding_windows' is 5, expected a list"),
    ({"config": {"sliding_windows": [None, 0, 5]}}, "field 'sliding_windows' is 0"),
    ({"config": {"sliding_windows": [5]}}, "1 sliding windows for 3 layers"),
    ({"config": {"rope_scaling": "yarn"}}, "field 'rope_scaling' is 'yarn', expected an object"),
    ({"config": {"rope_scaling": {"kind": "ModelConfig"}}}, "kind 'ModelConfig' is not supported"),
    ({"config": {"rope_scaling": {"factor": 2.0}}}, "field 'kind' is missing"),
    ({"config": {"rope_scaling": {"kind": "LinearRope", "factor": None}}}, "field 'factor' is missing"),
    ({"config": {"rope_scaling": {"kind": "LinearRope", "factor": 2.0, "more": 1}}}, "unsupported"),
    ({"config": {"rope_scaling": {"kind": "FactorRope", "factors": [1.0, None, 2.0, 1.0]}}}, "'factors' is missing"),
    ({"config": {"rope_scaling": {"kind": "FactorRope", "factors": [1.0, float("inf")]}}}, "field 'factors' is inf"),
    ({"version": True}, "version True is not supported"),
    ({"version": None}, "'version' is missing"),
    ({"name": ["x"]}, "field 'name' is"),
    ({"int8": 1}, "field 'int8' is 1"),
    ({"int8": True}, "scale is missing"),
    ({"more": 1}, r"unsupported field\(s\) more"),
    ({"config": []}, r"field 'config' is \[\], expected an object"),
    *(({"stop_tokens": [value]}, "field 'stop_tokens' is") for value in (-1, 128, True, 1.0, None, "a", 10**400)),
    ({"stop_tokens": 5}, "field 'stop_tokens' is 5, expected a list"),
    ("[]", "expected a JSON object, found list"),
    ("{", "not readable as JSON"),
    ("\ufeff{}", "field 'version' is missing"),
    (b"\xff\xfe{}", "not readable as JSON"),
    ("[" * 100_000, "not readable as JSON"),
    ('{"version": 1, "version": 2}', "field 'version' is there more than once"),
    ('{"version": ' + "1" * 10_000 + "}", "not readable as JSON"),
]

# Chat templates: words of the refusal.

MESSAGE = "{{ messages[0]['content'] }}"
TEMPLATES: dict[str, tuple[str, str]] = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 5 seconds"),
    "string multiplied": ("{{ 'a' * 10**10 }}", "MemoryError"),
    "power": ("{{ 10 ** (10 ** 9) }}", "more than 5 seconds|MemoryError"),
    "format": ("{{ '%1000000000d' % 1 }}", "MemoryError"),
    "center": ("{{ 'a'.center(10**10) }}", "MemoryError"),
    "indent": ("{{ messages|tojson(indent=10**10) }}", "MemoryError"),
    "replace": ("{% set s = range(99999)|join %}{{ s.replace('1', s) }}", "MemoryError"),
    "doubling": (
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "MemoryError",
    ),
    "macros": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
    "deep": ("{{" + "(" * 100_000 + "1" + ")" * 100_000 + "}}", "recursion"),
    "10 MB of text": ("x" * 10_000_000 + MESSAGE, "characters, expected at most"),
    "10 MB of program": ("{{x}}" * 2_000_000 + MESSAGE, "more than 5 seconds|MemoryError"),
    "its own error": ("{{ raise_exception('two\\nlines') }}", r"fails \(two\)"),
    "division": ("{{ 1 // 0 }}", "by zero"),
    "Python": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "surrogate": ("{{ '\\ud800' }}" + MESSAGE, "surrogates not allowed"),
    "never": ("hello", "0 times, expected once"),
    "twice": (MESSAGE + MESSAGE, "2 times, expected once"),
}


ROPE_SCALING = {
    "kind": "LongRope", "short_factors": [1.0] * 4, "long_factors": [2.0] * 4, "original_context": 128,
    "attention_scaling": 1.0,
}  # fmt: skip


def tokenizer_jsons() -> list[dict]:
    """The contents of good tokenizer.json files of all kinds of models and steps."""
    letters = {letter: index for index, letter in enumerate("?ab c")} | {"ab": 5, "##b": 6}
    byte_pairs = Tokenizer(models.BPE(letters, [("a", "b")], unk_token="?", byte_fallback=True))
    byte_pairs.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("x", "a")])
    byte_pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    byte_pairs.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    byte_pairs.post_processor = processors.TemplateProcessing(single="a $A", special_tokens=[("a", 1)])
    scored = Tokenizer(models.Unigram([("?", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -1.5), ("\u2581", -3.0)], 0, False))
    scored.pre_tokenizer, scored.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    scored.enable_truncation(100)
    scored.enable_padding(pad_id=1, pad_token="a")
    pieces = Tokenizer(models.WordPiece(letters, unk_token="?"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.BertProcessing(("a", 1), ("b", 2))
    for each in (byte_pairs, scored, pieces):
        each.add_special_tokens([AddedToken("<s>"), AddedToken("</s>", rstrip=True)])
        each.add_tokens(["<x>"])
    return [json.loads(each.to_str()) for each in (byte_pairs, scored, pieces, tokenizer().backend_tokenizer)]
