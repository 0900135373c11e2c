"""Tokenizers as the families' GGUF files make them, with the shapes of their chat templates."""

import functools

from gguf_vocabularies import CONTROL, built, byte_level, sentencepiece, token_id
from transformers import PreTrainedTokenizerBase

# The shapes of the templates that the families' files carry, for one message.
_LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '#[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_PHI4 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
_QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def _byte_level(pre: str, specials: list[str], template: str) -> PreTrainedTokenizerBase:
    metadata = byte_level(pre, dict.fromkeys(specials, CONTROL), chat_template=template)
    bos = token_id(metadata, specials[0])
    return built(metadata | {"tokenizer.ggml.bos_token_id": bos, "tokenizer.ggml.eos_token_id": bos + 1})


def _sentencepiece(architecture: str, specials: list[str], template: str) -> PreTrainedTokenizerBase:
    metadata = sentencepiece(dict.fromkeys(specials, CONTROL), chat_template=template)
    return built(metadata | {"general.architecture": architecture})


@functools.cache
def tokenizers_of_families() -> dict[str, tuple[PreTrainedTokenizerBase, str, str]]:
    """A tokenizer of each family, and what its template puts before and after the message."""
    llama3 = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    phi = ["<|endoftext|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]
    qwen = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    instructions = ["[INST]", "[/INST]"]
    user = "<|start_header_id|>user<|end_header_id|>\n\n"
    assistant = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    mistral1, mistral3 = _MISTRAL.replace("#", " "), _MISTRAL.replace("#", "")
    return {
        "llama3": (
            _byte_level("llama-bpe", llama3, _LLAMA3),
            f"<|begin_of_text|>{user}",
            f"<|eot_id|>{assistant}",
        ),
        "mistral 0.1": (_sentencepiece("llama", [], mistral1), "<s>[INST] ", " [/INST]"),
        "mistral 0.3": (_sentencepiece("llama", instructions, mistral3), "<s>[INST] ", "[/INST]"),
        "mistral nemo": (
            _byte_level("tekken", ["<s>", "</s>", *instructions], mistral3.replace("[INST] ", "[INST]")),
            "<s>[INST]",
            "[/INST]",
        ),
        "phi3": (_sentencepiece("phi3", phi, _PHI3), "<|user|>\n", "<|end|>\n<|assistant|>\n"),
        "phi4": (_byte_level("gpt-4o", phi, _PHI4), "<|user|>", "<|end|><|assistant|>"),
        "qwen": (
            _byte_level("qwen2", qwen, _QWEN),
            f"{system}<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
    }


FAMILIES = ["llama3", "mistral 0.1", "mistral 0.3", "mistral nemo", "phi3", "phi4", "qwen"]
