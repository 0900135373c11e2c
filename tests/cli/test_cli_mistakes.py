"""A user's mistake ends in one line on standard error that names it, with status 2 and no traceback."""

import importlib.metadata

import pytest
from commands import assert_mistake, gemfilter

from gemfilter_jax.checkpoints import embedded

TEXT = "The harbour was quiet. " * 40


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("command", ["generate", "select"])
@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--rule=papper", ("--rule=papper", "default|paper")),
        ("--format=xml", ("--format=xml", "text|json")),
        ("--rul=paper", ("rul", "rule")),
        ("--attention=flash", ("--attention=flash", "auto|xla|splash|cudnn|pallas")),
        ("--keep=0", ("--keep=0",)),
        ("--keep=many", ("--keep=many",)),
        ("--filter_layer=-1", ("--filter_layer=-1",)),
        ("stray", ("stray",)),
    ],
)
def test_unknown_flag_or_value(command, flag, said):
    assert_mistake(gemfilter(command, flag, stdin=TEXT.encode()), *said)


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("seq:0", ("mesh 'seq:0'", "data:N, seq:N, model:N")),
        ("model:2", ("model:2", "9 query heads", "model:1, 3")),
        ("seq:64", ("takes 64 devices; there are",)),
    ],
)
def test_mesh_that_there_is_not(mesh, said):
    assert_mistake(gemfilter("generate", f"--mesh={mesh}", stdin=TEXT.encode()), *said)


def test_unknown_command():
    assert_mistake(gemfilter("generat"), "'generat'", "'generate'")


def test_missing_prompt_file(tmp_path):
    assert_mistake(gemfilter("select", f"--prompt_file={tmp_path}/no.txt"), "no.txt", "No such file")


@pytest.mark.parametrize("data", [b"", b" \n\t "])
def test_empty_prompt(data):
    assert_mistake(gemfilter("generate", stdin=data), "standard input", "empty")


def test_prompt_that_is_not_utf8():
    assert_mistake(gemfilter("generate", stdin=b"good \xff bad"), "not UTF-8", "0xff", "offset 5")


def test_unwritable_report(book, tmp_path):
    missing = gemfilter("generate", f"--prompt_file={book}", f"--report={tmp_path}/no/page.html")
    assert_mistake(missing, "--report=", "does not exist")
    folder = gemfilter("generate", f"--prompt_file={book}", f"--report={tmp_path}")
    assert_mistake(folder, "--report=", "is a folder")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("smolm2", ("'smolm2'", "did you mean 'smollm2'")),
        ("missing.gguf", ("missing.gguf", "not a folder, a file")),
        ("nobody/no-such-model", ("nobody/no-such-model", "hub")),
    ],
)
def test_unknown_model(book, model, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_mistake(gemfilter("select", f"--prompt_file={book}", f"--model={model}"), *said)


def test_file_that_is_no_model(book):
    assert_mistake(gemfilter("select", f"--prompt_file={book}", f"--model={book}"), str(book), "not a GGUF file")


def test_truncated_model(book, tmp_path):
    model = tmp_path / "cut.gguf"
    with embedded.locate().open("rb") as whole:
        model.write_bytes(whole.read(3_000_000))
    assert_mistake(gemfilter("select", f"--prompt_file={book}", f"--model={model}"), "cut.gguf", "truncated")


def test_keep_smaller_than_the_question(book):
    result = gemfilter("select", f"--prompt_file={book}", "--question=Was the harbour quiet?", "--keep=8")
    assert_mistake(result, "keep is 8", "question")


def test_filter_layer_out_of_range(book):
    result = gemfilter("select", f"--prompt_file={book}", "--question=Was the harbour quiet?", "--filter_layer=30")
    assert_mistake(result, "filter layer 30", "0 to 29")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), ("--output", "new folder")),
        (("--output=/",), ("--output=/", "exists already")),
        (("--output=/no/such/folder",), ("--output=", "does not exist")),
        (("--weights=int4",), ("--weights=int4", "float|int8")),
    ],
)
def test_convert(flags, said):
    assert_mistake(gemfilter("convert", *flags), *said)


def test_preset_that_does_not_fit(book, tmp_path):
    preset = tmp_path / "preset.json"
    preset.write_text('{"name": "x", "model": {"layers": 99}, "default": {}}')
    result = gemfilter("select", f"--prompt_file={book}", f"--preset={preset}")
    assert_mistake(result, "preset.json", "is for a model with layers 99; this one has 30")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("generate", "--question=a", "--question=b", "--report=page.html"), ("--report=page.html", "one question")),
        (("generate", "--document_cache=folder"), ("--document_cache=folder", "needs --question")),
        (("chat",), ("no text", "--prompt_file")),
    ],
)
def test_questions_that_cannot_be_asked(flags, said):
    assert_mistake(gemfilter(*flags, stdin=TEXT.encode()), *said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--output=answers.jsonl",), ("--output", "needs --prompts")),
        (("--batch=4",), ("--batch", "needs --prompts")),
        (("--prompts=book.txt",), ("--prompts", "needs --output")),
        (("--prompts=book.txt", "--output=."), ("--output=.", "is a folder")),
        (("--prompts=book.txt", "--output=no/answers.jsonl"), ("--output=", "does not exist")),
        (("--prompts=no.jsonl", "--output=answers.jsonl"), ("no.jsonl", "No such file")),
        (("--prompts=book.txt", "--output=book.txt"), ("book.txt", "line 1 does not answer")),
        (("--prompts=book.txt", "--output=answers.jsonl", "--batch=0"), ("--batch=0",)),
        *(
            (("--prompts=book.txt", "--output=answers.jsonl", flag), (name, "cannot be given with --prompts"))
            for name, flag in [
                ("--prompt_file", "--prompt_file=book.txt"),
                ("--question", "--question=Why?"),
                ("--format", "--format=json"),
                ("--report", "--report=page.html"),
                ("--show_kept", "--show_kept"),
                ("--document_cache", "--document_cache=folder"),
            ]
        ),
    ],
)
def test_requests_that_cannot_be_run(book, monkeypatch, flags, said):
    monkeypatch.chdir(book.parent)
    assert_mistake(gemfilter("generate", *flags), *said)
    assert [path.name for path in book.parent.iterdir()] == [book.name]
    assert book.read_text() == TEXT


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tokens=100",), ("--tokens=100",)),
        (("--texts=no_such_folder",), ("no_such_folder", "is not a folder")),
        (("--output=no_such_folder/preset.json",), ("no_such_folder", "does not exist")),
        (("--tokens=6000", "--layers=2"), ("tokens is 6000", "8192")),
    ],
)
def test_calibrate(flags, said):
    assert_mistake(gemfilter("calibrate", *flags), *said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--task=train",), ("--task=train", "needles|hidden_facts")),
        (("--facts=5", "--task=hidden_facts"), ("--facts=5", "[1, 4]")),
        (("--count=0", "--task=hidden_facts"), ("--count=0",)),
        (("--distractors=-1", "--task=hidden_facts"), ("--distractors=-1",)),
        (("--count=20",), ("--count", "--task=hidden_facts")),
        (("--keep=512,many",), ("--keep=512,many", "auto or a whole number of at least 1, or several with commas")),
        (("--method=full,bm26",), ("--method", "expected names among full, default, paper")),
        (("--shard=3/2",), ("--shard=3/2", "I from 1 to N")),
        (("--shard=2",), ("--shard=2", "expected I/N")),
        (("--lengths=",), ("--lengths is empty",)),
        (("--method=full,bm25", "--filter_layer=1"), ("--filter_layer means nothing to --method=full,bm25",)),
        (("--output=/no/such/folder/a.jsonl",), ("--output=/no/such/folder/a.jsonl",)),
        (("--task=real_questions",), ("questions_file is missing; give a JSONL file",)),
        (("--task=longbench", "--data=."), ("hotpotqa.jsonl",)),
        (("--texts=/no/such/folder", "--task=hidden_facts"), ("/no/such/folder", "not a folder")),
        (("--lengths=20", "--task=hidden_facts", "--count=1"), ("the text is to have 20", "longer")),
    ],
)
def test_evaluate(flags, said):
    assert_mistake(gemfilter("evaluate", *flags), *said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), ("no result file",)),
        (("missing.jsonl",), ("missing.jsonl", "cannot be read")),
        (("--plot=/no/such/folder/plot.png", "missing.jsonl"), ("/no/such/folder",)),
        (("--plot=plot.foo", "missing.jsonl"), ("--plot=plot.foo", ".png, .svg, .pdf")),
        (("--plot=a.png", "--heat_map=./a.png", "missing.jsonl"), ("--heat_map and --plot are both a.png",)),
        ((__file__,), ("line 1 is not JSON", "gemfilter evaluate")),
    ],
)
def test_compare(arguments, said):
    assert_mistake(gemfilter("compare", *arguments), *said)


def test_the_version_is_told():
    done = gemfilter("--version")
    assert done.returncode == 0
    assert done.stdout.decode() == f"gemfilter {importlib.metadata.version('gemfilter-jax')}\n"
