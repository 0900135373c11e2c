"""Tokenizers from GGUF metadata against sentencepiece itself, each pattern's own splits, and malformed metadata."""

import contextlib
import random
import time

import pytest
from gguf_vocabularies import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    built,
    byte_level,
    golden,
    sentencepiece,
    token_id,
)
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.checkpoints.gguf_tokenizer import build_tokenizer, stop_tokens
from gemfilter_jax.errors import UserError

_WORDS = "I'LL pay don't 1234 HelloWorld $=x/\n/y e\u0301a \u4e2d\u6587\n\n  z  "


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_sentencepiece_ids():
    encoded = built(sentencepiece())(golden()["texts"], add_special_tokens=False)
    assert encoded["input_ids"] == golden()["ids"]


def test_sentencepiece_ids_without_prefix():
    tokenizer = built(sentencepiece(add_space_prefix=False))
    assert tokenizer(golden()["texts"], add_special_tokens=False)["input_ids"] == golden()["ids_without_prefix"]


def test_sentencepiece_follows_scores_not_ids():
    metadata = sentencepiece()
    for name in ("tokens", "scores", "token_type"):
        metadata[f"tokenizer.ggml.{name}"] = metadata[f"tokenizer.ggml.{name}"][::-1]
    last = len(golden()["tokens"]) - 1
    metadata["tokenizer.ggml.unknown_token_id"] = last
    encoded = built(metadata)(golden()["texts"], add_special_tokens=False)["input_ids"]
    assert [[last - i for i in ids] for ids in encoded] == golden()["ids"]


def test_sentencepiece_ids_without_scores():
    """Files made from a tokenizer.json hold one score for all tokens; their order is that of the merges."""
    metadata = sentencepiece()
    metadata["tokenizer.ggml.scores"] = [-1000.0] * len(metadata["tokenizer.ggml.tokens"])
    assert built(metadata)(golden()["texts"], add_special_tokens=False)["input_ids"] == golden()["ids"]


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_text_comes_back(prefix):
    tokenizer = built(sentencepiece(add_space_prefix=prefix))
    for text in golden()["texts"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_unknown_characters_without_bytes_become_one_token():
    metadata = sentencepiece()
    metadata["tokenizer.ggml.tokens"] = [t.replace("<0x", "<no") for t in metadata["tokenizer.ggml.tokens"]]
    tokenizer = built(metadata)
    assert _tokens(tokenizer, "e\u4e2d\u6587e") == ["▁e", "<unk>", "e"]


def test_a_space_is_put_after_each_special_token_too():
    tokenizer = built(sentencepiece({"<|user|>": CONTROL, "<sep>": USER_DEFINED}))
    assert _tokens(tokenizer, "the<|user|>the<sep>the") == ["▁the", "<|user|>", "▁the", "<sep>", "▁the"]


def test_mistral_puts_no_second_space_after_its_control_tokens():
    tokenizer = built(sentencepiece({"[INST]": CONTROL, "[/INST]": CONTROL}))
    for text in ("[INST] the[/INST]", "[INST]the[/INST]"):
        assert _tokens(tokenizer, text) == ["[INST]", "▁the", "[/INST]"]


def test_phi3_drops_white_space_after_its_special_tokens():
    metadata = sentencepiece({"<|end|>": CONTROL, "<|endoftext|>": CONTROL}) | {"general.architecture": "phi3"}
    tokenizer = built(metadata)
    assert _tokens(tokenizer, "<|end|> \n the") == ["<|end|>", "▁the"]
    assert _tokens(tokenizer, "<|endoftext|>\nthe") == ["<|endoftext|>", "▁", "<0x0A>", "the"]


def test_sentencepiece_vocabularies_of_usual_size_load_fast():
    rng = random.Random(0)
    words = {"".join(rng.choices("abcdefgh", k=rng.randint(1, 16))) for _ in range(40000)}
    tokens = [*golden()["tokens"][:259], *sorted(words - set(golden()["tokens"]))][:32000]
    metadata = sentencepiece() | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [*golden()["types"][:259], *[NORMAL] * (len(tokens) - 259)],
    }
    start = time.perf_counter()
    built(metadata)
    assert time.perf_counter() - start < 10


def test_a_long_text_is_tokenised_fast():
    start = time.perf_counter()
    assert len(built(sentencepiece())("e" * 300_000)["input_ids"]) < 300_000
    assert time.perf_counter() - start < 20


# Made with the patterns of tiktoken, tekken.json and transformers, and for the rest llama.cpp's, by the regex package.
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["gpt-2"], "I|'|LL| pay| don|'t| 1234| HelloWorld| $=|x|/|\n|/|y| e|\u0301|a| \u4e2d\u6587|\n\n | z|  "),
        (
            ["smollm"],
            "I|'|LL| pay| don|'t| |1|2|3|4| HelloWorld| $=|x|/|\n|/|y| e|\u0301|a| \u4e2d\u6587|\n\n | z|  ",
        ),
        (
            ["default"],
            "I|'|LL| pay| don|'|t| |123|4| HelloWorld| |$=|x|/|\n|/|y| e|\u0301|a| \u4e2d\u6587|\n\n | z|  ",
        ),
        (
            ["llama-bpe", "llama3", "llama-v3", "falcon3"],
            "I|'LL| pay| don|'t| |123|4| HelloWorld| $=|x|/\n|/y| e|\u0301a| \u4e2d\u6587|\n\n| | z|  ",
        ),
        (
            ["qwen2", "deepseek-r1-qwen"],
            "I|'LL| pay| don|'t| |1|2|3|4| HelloWorld| $=|x|/\n|/y| e|\u0301a| \u4e2d\u6587|\n\n| | z|  ",
        ),
        (
            ["tekken"],
            "I|'LL| pay| don|'t| |1|2|3|4| Hello|World| $=|x|/\n/|y| e\u0301a| \u4e2d\u6587|\n\n| | z|  ",
        ),
        (
            ["gpt-4o", "llama4"],
            "I'LL| pay| don't| |123|4| Hello|World| $=|x|/\n/|y| e\u0301a| \u4e2d\u6587|\n\n| | z|  ",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_words(names, words):
    assert words.replace("|", "") == _WORDS
    for name in names:
        split = built(byte_level(name)).backend_tokenizer.pre_tokenizer.pre_tokenize_str(_WORDS)
        assert [_WORDS[start:end] for _, (start, end) in split] == words.split("|")


def test_a_file_without_pre_tokenizer_has_the_default_one():
    metadata = byte_level("default")
    with_name = built(metadata)
    del metadata["tokenizer.ggml.pre"]
    assert built(metadata)(_WORDS) == with_name(_WORDS)


@pytest.mark.parametrize(("name", "composed"), [("qwen2", True), ("llama-bpe", False)])
def test_qwen_composes_characters(name, composed):
    tokenizer = built(byte_level(name))
    assert (_tokens(tokenizer, "e\u0301") == _tokens(tokenizer, "\u00e9")) == composed


@pytest.mark.parametrize(
    ("name", "whole"), [("qwen2", False), ("gpt-4o", False), ("llama-bpe", True), ("tekken", True)]
)
def test_a_word_that_is_a_token_is_not_merged_in_some(name, whole):
    tokenizer = built(byte_level(name, {"xyz": NORMAL}))
    assert _tokens(tokenizer, "xyz") == (["xyz"] if whole else ["x", "y", "z"])


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_byte_level_text_comes_back(name):
    tokenizer = built(byte_level(name))
    for text in [*golden()["texts"], _WORDS]:
        text = text.replace("e\u0301", "")  # Qwen composes it
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("add_eos", [None, False, True])
@pytest.mark.parametrize(
    ("metadata", "default"),
    [
        (sentencepiece(), True),
        (byte_level("llama-bpe", {"<s>": CONTROL, "</s>": CONTROL}), True),
        (byte_level("tekken", {"<s>": CONTROL, "</s>": CONTROL}), True),
        (byte_level("qwen2", {"<s>": CONTROL, "</s>": CONTROL}), False),
    ],
    ids=["llama", "llama-bpe", "tekken", "qwen2"],
)
@pytest.mark.parametrize("add_bos", [None, False, True])
def test_begin_and_end_are_added_as_the_file_says(metadata, default, add_bos, add_eos):
    for name, flag in (("bos", add_bos), ("eos", add_eos)):
        metadata = metadata | {
            f"tokenizer.ggml.{name}_token_id": token_id(metadata, {"bos": "<s>", "eos": "</s>"}[name])
        }
        if flag is not None:
            metadata[f"tokenizer.ggml.add_{name}_token"] = flag
    tokenizer = built(metadata)
    bare = tokenizer("the", add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id] * (default if add_bos is None else add_bos)
    assert tokenizer("the")["input_ids"] == bos + bare + [tokenizer.eos_token_id] * bool(add_eos)
    assert tokenizer.convert_ids_to_tokens([tokenizer.bos_token_id, tokenizer.eos_token_id]) == ["<s>", "</s>"]


def test_sentencepiece_roles_have_defaults():
    tokenizer = built(sentencepiece())
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert stop_tokens(sentencepiece()) == (2,)


def test_the_chat_template_writes_the_begin_itself():
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    tokenizer = built(sentencepiece(chat_template=template))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁the", "</s>"]


def test_control_and_user_defined_tokens_are_whole():
    specials = {"<|im_end|>": CONTROL, "<think>": USER_DEFINED, "<｜中｜>": CONTROL}
    for metadata in (byte_level(specials=specials), sentencepiece(specials)):
        tokenizer = built(metadata)
        ids = [token_id(metadata, token) for token in specials]
        assert tokenizer("".join(specials), add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>"


def test_stop_tokens_are_those_with_a_role_and_those_known_to_end_a_turn():
    specials = {"<|endoftext|>": CONTROL, "<|user|>": CONTROL, "<|end|>": CONTROL, "<|eot_id|>": NORMAL}
    metadata = sentencepiece(specials)
    first = token_id(metadata, "<|endoftext|>")
    metadata |= {"tokenizer.ggml.eos_token_id": first + 1, "tokenizer.ggml.eot_token_id": first}
    assert stop_tokens(metadata) == (first + 1, first, first + 2)


def test_empty_tokens_are_given_names():
    metadata = byte_level(specials={"": NORMAL})
    metadata["tokenizer.ggml.tokens"] += [""]
    metadata["tokenizer.ggml.token_type"] += [CONTROL]
    assert len(built(metadata)) == len(metadata["tokenizer.ggml.tokens"])


_GPT2, _LLAMA = byte_level("gpt-2"), sentencepiece()


@pytest.mark.parametrize(
    ("metadata", "field", "value", "words"),
    [
        (_GPT2, "model", "bert", ["tokenizer model 'bert' is not supported", "gpt2", "llama"]),
        (_GPT2, "model", ["gpt2"], ["is not supported"]),
        (_GPT2, "model", None, ["'tokenizer.ggml.model' is missing"]),
        (_GPT2, "pre", "bloom", ["pre-tokenizer 'bloom' is not supported", "qwen2", "tekken"]),
        (_GPT2, "pre", ["qwen2"], ["is not supported"]),
        (_GPT2, "tokens", None, ["'tokenizer.ggml.tokens' is missing"]),
        (_GPT2, "tokens", [], ["no tokens"]),
        (_GPT2, "tokens", "abc", ["'abc', expected a list of texts"]),
        (_GPT2, "tokens", [1, 2], ["expected a list of texts"]),
        (_GPT2, "tokens", ["a", "b", "a"], ["token 'a'", "more than once"]),
        (_GPT2, "token_type", None, ["'tokenizer.ggml.token_type' is missing"]),
        (_GPT2, "token_type", [1], [f"{len(_GPT2['tokenizer.ggml.tokens'])} tokens but 1 entries"]),
        (_GPT2, "token_type", ["1"], ["expected a list of numbers"]),
        (_GPT2, "merges", None, ["'tokenizer.ggml.merges' is missing"]),
        (_GPT2, "merges", ["ab"], ["merge 'ab' is not of two tokens"]),
        (_GPT2, "merges", ["a "], ["merge 'a ' is not of two tokens"]),
        (_GPT2, "merges", [" a"], ["merge ' a' is not of two tokens"]),
        (_GPT2, "merges", ["a nowhere"], ["merge 'a nowhere' is not of two tokens"]),
        (_GPT2, "merges", ["a b"], ["merge 'a b' is not of two tokens that make a third"]),
        (_GPT2, "merges", [["a", "b"]], ["expected a list of texts"]),
        (_GPT2, "bos_token_id", -1, ["bos_token_id is -1"]),
        (_GPT2, "eos_token_id", 1 << 31, [f"eos_token_id is {1 << 31}"]),
        (_GPT2, "eot_token_id", 1 << 31, [f"eot_token_id is {1 << 31}"]),
        (_GPT2, "padding_token_id", "0", ["padding_token_id is '0'"]),
        (_GPT2, "unknown_token_id", True, ["unknown_token_id is True"]),
        (_GPT2, "add_bos_token", True, ["add_bos_token without bos_token_id"]),
        (_GPT2, "add_eos_token", True, ["add_eos_token without eos_token_id"]),
        (_GPT2, "add_bos_token", 3, ["'tokenizer.ggml.add_bos_token' is 3, expected true or false"]),
        (_LLAMA, "add_space_prefix", "yes", ["add_space_prefix' is 'yes', expected true or false"]),
        (_LLAMA, "scores", None, ["'tokenizer.ggml.scores' is missing"]),
        (_LLAMA, "scores", [0.0], ["640 tokens but 1 entries"]),
        (_LLAMA, "scores", ["0"] * 640, ["expected a list of numbers"]),
        (_LLAMA, "scores", [float("nan")] * 640, ["score nan"]),
        (_LLAMA, "tokens", [*_LLAMA["tokenizer.ggml.tokens"][:-1], "a" * 100_000], ["token 639 is of 100000 char"]),
    ],
)
def test_malformed_metadata(metadata, field, value, words):
    metadata = {name: v for name, v in (metadata | {f"tokenizer.ggml.{field}": value}).items() if v is not None}
    with pytest.raises(UserError) as caught:
        build_tokenizer(metadata, "tiny.gguf")
    message = str(caught.value)
    assert message.startswith("tiny.gguf: ")
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message


@pytest.mark.parametrize("template", [5, ["{{ bos_token }}"]])
def test_a_chat_template_is_text(template):
    with pytest.raises(UserError, match=r"'tokenizer\.chat_template' is .*, expected text"):
        built(_GPT2 | {"tokenizer.chat_template": template})


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_is_refused_or_harmless(seed):
    rng = random.Random(seed)
    metadata = rng.choice([_GPT2, _LLAMA]) | {}
    junk = [None, -1, 0, 2.5, True, "", "a b", "\x00", "e", "<0x00>", " ", float("inf"), 1 << 40, [], {}, ["a"]]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(metadata))
        value = metadata[name]
        if isinstance(value, list) and value:
            value = list(value)
            value[rng.randrange(len(value))] = rng.choice(junk)
            metadata[name] = value
        else:
            metadata[name] = rng.choice(junk)
    with contextlib.suppress(UserError):
        tokenizer = built(metadata)
        tokenizer("the \u4e2d e", return_offsets_mapping=True)
        stop_tokens(metadata)
