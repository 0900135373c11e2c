"""Chat templates are rendered in a process of their own, from wherever Python runs."""

import subprocess
import sys

import pytest
from model_files import tokenizer
from refusals import refusal

from gemfilter_jax.text import chat_template

_FORKED = """
import os, sys
sys.path[:0] = sys.argv[1:]
from model_files import tokenizer
from gemfilter_jax.text import chat_template
one, two = tokenizer(), tokenizer()
two.chat_template = "<{{ messages[0]['content'] }}>"
print(chat_template.around(one), flush=True)
if os.fork() == 0:
    print(chat_template.around(two), flush=True)
    os._exit(0)
os.wait()
"""


def test_after_a_fork_and_with_modules_that_only_this_process_finds():
    command = [sys.executable, "-S", "-c", _FORKED, *sys.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == ["('', '')", "('<', '>')"], done.stderr


@pytest.mark.parametrize("program", [None, "", "/bin/echo", "/no/such/python"])
def test_a_python_that_cannot_be_run_is_told_and_tried_again(monkeypatch, program):
    own = tokenizer()
    own.chat_template = f"by {program}: " + "{{ messages[0]['content'] }}"  # rendered by no other test
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", program)
        assert "chat template fails" in (refusal(chat_template.around, own) or "")
    assert chat_template.around(own) == (f"by {program}: ", "")
