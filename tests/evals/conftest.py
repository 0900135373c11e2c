"""Fixtures that tests of several tasks share."""

import json

import pytest


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    """The default model's."""
    return smollm2.checkpoint.tokenizer


@pytest.fixture
def written(tmp_path):
    """Writes a JSONL file; an item that is a string is a line as it stands."""

    def write(*lines) -> str:
        path = tmp_path / "lines.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return str(path)

    return write
