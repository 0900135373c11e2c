"""Haystacks: any folder of texts becomes paragraphs; their first tokens are as many as asked for."""

import pytest

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import haystack

WORDS = "The river ran on past the mill and nobody looked up. " * 60


def test_the_first_tokens_of_a_pile(smollm2):
    tokenizer, essays = smollm2.checkpoint.tokenizer, haystack.built_in("essays")
    short, long = (haystack.pile(tokenizer, essays, tokens, seed=5).first(tokens) for tokens in (100, 20_000))
    assert long.startswith(short)
    assert len(tokenizer(short)["input_ids"]) == 100
    assert len(tokenizer(long)["input_ids"]) == 20_000  # more than the essays have: they are gone through again
    assert set(long.split("\n\n")[:-1]) <= set(essays)


def test_a_pile_of_few_tokens_grows(smollm2):
    tokenizer = smollm2.checkpoint.tokenizer
    assert len(tokenizer(haystack.pile(tokenizer, ["=" * 64], 50, seed=0).first(50))["input_ids"]) == 50


def test_paragraphs_of_a_folder(tmp_path):
    (tmp_path / "b.md").write_text(f"# A heading\n\n{WORDS}\n", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text("Broken\r\nby hand.\r\n \r\n\r\nNext é.\r\n" + WORDS, encoding="utf-8")
    (tmp_path / "c.html").write_text("<p>left out</p>", encoding="utf-8")
    assert haystack.read_folder(tmp_path) == (
        "Broken by hand.",
        f"Next é. {WORDS}".strip(),
        "# A heading",
        WORDS.strip(),
    )


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("little.txt", b"too little", "1 .txt and .md files hold 10 characters"),
        ("page.html", WORDS.encode(), "0 .txt and .md files hold 0 characters"),
        ("latin.txt", b"\xe9t\xe9 " * 3_000, "latin.txt: cannot be read as UTF-8 text"),
    ],
)
def test_unusable_folder(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=said):
        haystack.read_folder(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        haystack.read_folder(tmp_path / "nowhere")
