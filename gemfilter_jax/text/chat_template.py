"""The text that a tokenizer's chat template puts around a user's message.

A template is a program that comes with the model. One step of it can take any amount of memory or time, and nothing in
the same process could stop it. So it is rendered in a process of its own, which has limits.
"""

import contextlib
import json
import os
import reprlib
import subprocess
import sys
import threading

from transformers import PreTrainedTokenizerBase

from gemfilter_jax.errors import UserError, reason

_SENTINEL = "\u2063content\u2063"  # placeholder for the message in a template; occurs in no template
_LIMITS = {"seconds": 5, "memory": 1 << 29, "longest": 1 << 20}  # of computing; bytes beyond Python's; characters
_MOST_KEPT = 16  # renderings
_PATIENCE = 60  # seconds of waiting, which also pass while the process starts on a busy machine

_RENDER = """
import json, pathlib, resource, sys
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

given = json.load(sys.stdin)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
used, statm = resource.getrusage(resource.RUSAGE_SELF), pathlib.Path("/proc/self/statm")
limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + given["seconds"]}
if statm.exists():
    limits[resource.RLIMIT_AS] = int(statm.read_text().split()[0]) * resource.getpagesize() + given["memory"]
for limit, most in limits.items():
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
try:
    how = {"chat_template": given["template"], "tokenize": False, "add_generation_prompt": True}
    rendered = tokenizer.apply_chat_template(given["messages"], **how, **given["tokens"])
    if len(rendered) > given["longest"]:
        raise ValueError(f"it makes {len(rendered):,} characters, expected at most {given['longest']:,}")
    rendered.encode()  # a tokenizer takes no lone surrogates
    told = {"rendered": rendered}
except Exception as error:  # a template may raise any error
    told = {"error": (str(error).strip() or repr(error)).splitlines()[0][:1000]}
print(json.dumps(told))
"""


def prepare(tokenizer: PreTrainedTokenizerBase) -> None:
    """Begin to render a tokenizer's chat template, if it has one, while other things are done."""
    if tokenizer.chat_template:
        with contextlib.suppress(UserError):
            _rendering(tokenizer)


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The chat template's text before and after a user's message, including the assistant header.

    Raises:
      UserError: the template fails, takes too long or too much memory, or does not hold the message once.
    """
    before, *after = _rendering(tokenizer).result().split(_SENTINEL)
    if len(after) != 1:
        raise UserError(
            f"the tokenizer's chat template holds the user's message {len(after)} times, expected once; turn it off"
        )
    return before, after[0]


def _rendering(tokenizer: PreTrainedTokenizerBase) -> "_Rendering":
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # there are several, and none is the default
        raise _failure(reason(error)) from error
    if not isinstance(template, str):
        raise _failure(f"it is {reprlib.repr(template)}, expected a string")
    key = template, tuple(tokenizer.special_tokens_map.items())
    if key not in _begun:
        while len(_begun) >= _MOST_KEPT:
            _begun.pop(next(iter(_begun)))
        _begun[key] = _Rendering(*key)
    return _begun[key]


class _Rendering:
    """A template that is being rendered, or was, with the sentinel as the message.

    Args:
      tokens: the special tokens by the names that templates use.
    """

    def __init__(self, template: str, tokens: tuple[tuple[str, str], ...]):
        self._key = template, tokens
        self._outcome: str | UserError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # Python is ending
            self._run()

    def result(self) -> str:
        """What is rendered; raises a `UserError` if that fails, after which it may be tried again."""
        if self._thread.ident is not None:
            self._thread.join()
        if isinstance(self._outcome, str):
            return self._outcome
        _begun.pop(self._key, None)
        raise self._outcome or _failure("no reason given")

    def _run(self) -> None:
        try:
            self._outcome = _rendered(*self._key)
        except UserError as error:
            self._outcome = error
        except Exception as error:  # such as no Python to run it with
            self._outcome = _failure(reason(error))


_begun: dict[tuple[str, tuple[tuple[str, str], ...]], _Rendering] = {}
os.register_at_fork(after_in_child=_begun.clear)  # threads do not go on there


def _rendered(template: str, tokens: tuple[tuple[str, str], ...]) -> str:
    messages = [{"role": "user", "content": _SENTINEL}]
    given = json.dumps(_LIMITS | {"template": template, "messages": messages, "tokens": dict(tokens)})
    command = [sys.executable, "-P", "-c", _RENDER]  # -P: modules in the current folder are not imported
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)}
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, timeout=_PATIENCE)
    if done.returncode < 0:  # ended by a signal
        raise _failure(f"it takes more than {_LIMITS['seconds']} seconds")
    if done.returncode:
        raise _failure((done.stderr.strip() or "no reason given").splitlines()[-1])
    told = json.loads(done.stdout.splitlines()[-1])
    if "error" in told:
        raise _failure(told["error"])
    return told["rendered"]


def _failure(why: str) -> UserError:
    return UserError(f"the tokenizer's chat template fails ({why}); turn it off")
