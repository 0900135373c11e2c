"""The text that a tokenizer's chat template puts around a user's message.

A template is a program that comes with the model. One step of it can take any amount of memory or time, and nothing in
the same process could stop it. So it is rendered in a process of its own, which has limits.
"""

import concurrent.futures
import contextlib
import functools
import json
import reprlib
import subprocess
import sys

from transformers import PreTrainedTokenizerBase

from gemfilter_jax.errors import UserError, reason

_SENTINEL = "\u2063content\u2063"  # placeholder for the message in a template; occurs in no template
_LIMITS = {"seconds": 5, "memory": 1 << 29, "longest": 1 << 20}  # of computing; bytes beyond Python's; characters
_processes = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="chat template")
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


def _rendering(tokenizer: PreTrainedTokenizerBase) -> concurrent.futures.Future[str]:
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # there are several, and none is the default
        raise _failure(reason(error)) from error
    if not isinstance(template, str):
        raise _failure(f"it is {reprlib.repr(template)}, expected a string")
    return _begun(template, tuple(tokenizer.special_tokens_map.items()))


@functools.lru_cache(maxsize=16)
def _begun(template: str, tokens: tuple[tuple[str, str], ...]) -> concurrent.futures.Future[str]:
    return _processes.submit(_rendered, template, tokens)


def _rendered(template: str, tokens: tuple[tuple[str, str], ...]) -> str:
    """A template with the sentinel as the message; `tokens` are the special tokens by the names that templates use."""
    messages = [{"role": "user", "content": _SENTINEL}]
    given = json.dumps(_LIMITS | {"template": template, "messages": messages, "tokens": dict(tokens)})
    command = [sys.executable, "-P", "-c", _RENDER]  # -P: modules in the current folder are not imported
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failure(reason(error)) from error
    if done.returncode < 0:  # ended by a signal
        raise _failure(f"it takes more than {_LIMITS['seconds']} seconds")
    if done.returncode:
        raise _failure((done.stderr.strip() or "no reason given").splitlines()[-1])
    told = json.loads(done.stdout)
    if "error" in told:
        raise _failure(told["error"])
    return told["rendered"]


def _failure(why: str) -> UserError:
    return UserError(f"the tokenizer's chat template fails ({why}); turn it off")
