"""Exceptions are told in one line, whatever they carry."""

import pytest

from gemfilter_jax.checkpoints import hf_folder, hub, orbax_folder, tokenizer_folder
from gemfilter_jax.errors import UserError, reason


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError(), "ValueError()"), (ValueError(" \n"), "ValueError(' \\n')"), (OSError("one\ntwo"), "one")],
)
def test_the_reason_is_one_line(error, line):
    assert reason(error) == line


def _raise_without_message(*_, **__):
    raise TimeoutError


def test_a_hub_that_fails_without_a_message(monkeypatch):
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", _raise_without_message)
    with pytest.raises(UserError, match=r"not to be had from the hub \(TimeoutError\(\)\)"):
        hub.cached_or_downloaded("owner/name")


@pytest.mark.parametrize("opened", [hf_folder.HuggingFaceFolder, orbax_folder.OrbaxFolder])
def test_a_tokenizer_that_fails_without_a_message(opened, monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizer_folder.AutoTokenizer, "from_pretrained", _raise_without_message)
    folder = object.__new__(opened)
    folder.folder = tmp_path
    with pytest.raises(UserError, match=r"no usable tokenizer \(TimeoutError\(\)\)"):
        folder.tokenizer()
