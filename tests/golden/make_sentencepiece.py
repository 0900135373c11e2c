"""Makes sentencepiece.json beside this file: a tiny sentencepiece vocabulary and what it makes of some texts.

Run by hand where sentencepiece and protobuf are: `python tests/golden/make_sentencepiece.py`. The model is trained on
Python's own help texts with the settings that Llama 2's and Mistral's models say they were made with. The file holds

  tokens, scores, types    the vocabulary as llama.cpp's converter writes it into a GGUF file
  texts
  ids                      of each text
  ids_without_prefix       the same without the space that is put before a text
"""

import io
import json
import pathlib
import random
from pydoc_data import topics

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

_VOCAB = 640
_TEXTS = [
    "The ship left the harbour at dawn.",
    " leading space",
    "   three of them, and  two   three    four     five inside; trailing  ",
    "\n\nlines\r\n\tand tabs\t\t\n \n",
    "def f(x):\n        return {x**2: 'it''s', \"you'll\": [0x1F]}  # 1234567 or 007",
    "na\u00efve \u00e9 e\u0301 \u00df \u4e2d\u6587\u5b57 \u0440\u0443\u0441 \u0661\u0662\u0663 \u00bd",
    "\u201cquoted\u201d\u00a0nbsp\u200bzero \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "<0x0A> is no newline, [INST] is nothing here",
    *(" " * n for n in range(1, 24)),
    *(f"a{' ' * n}b" for n in range(1, 24)),
    *(letter * n for letter in "-=e" for n in range(2, 24)),
]
_PARTS = [*" -=.,'_()/\n\t123aeinst", "  ", "    ", "--", " the", "ing", "ss", "\u00e9", "\u4e2d", "\U0001f600"]


def _train() -> sentencepiece_model_pb2.ModelProto:
    written = io.BytesIO()
    runs = [run * n for run in (" ", "-", "=", "e") for n in range(2, 40)] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*(line for text in topics.topics.values() for line in text.split("\n")), *runs]),
        model_writer=written,
        model_type="bpe",
        vocab_size=_VOCAB,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())


def _main() -> None:
    model = _train()
    rng = random.Random(0)
    texts = _TEXTS + ["".join(rng.choices(_PARTS, k=rng.randint(1, 30))) for _ in range(150)]
    golden = {
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "types": [piece.type for piece in model.pieces],
        "texts": texts,
    }
    for name, prefix in (("ids", True), ("ids_without_prefix", False)):
        model.normalizer_spec.add_dummy_prefix = prefix
        golden[name] = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString()).encode(texts)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in golden.items())
    pathlib.Path(__file__).with_name("sentencepiece.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    _main()
