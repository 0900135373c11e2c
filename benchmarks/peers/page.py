"""Makes a page in Markdown of a result of compare.py.

python benchmarks/peers/page.py RESULT.json > RESULT.md
"""

import argparse
import itertools
import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OWN = "gemfilter_jax"
DEFAULT, PAPER, FULL = "default rule", "paper", "full attention"
QUANTISED = "Q4_1"
_NAME = ("program", "method", "weights")
_STAGES = ("filter", "prefill", "decode", "total")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _name(peer: Mapping[str, Any]) -> list[str]:
    return [peer[field] for field in _NAME]


def _quoted(answer: str) -> str:
    """As code in a cell of a table."""
    return f"`{' '.join(answer.replace('`', chr(39)).replace('|', ' ').split())}`"


def _seconds(peer: Mapping[str, Any], stage: str) -> list[float]:
    return [run["seconds"][stage] for run in peer["runs"] if stage in run["seconds"]]


def _cell(seconds: Sequence[float]) -> str:
    """The median, and every run if there are several."""
    if not seconds:
        return "-"
    runs = f" ({', '.join(f'{one:.2f}' for one in seconds)})" if len(seconds) > 1 else ""
    return f"**{statistics.median(seconds):.2f}**{runs}"


def _ratio(peer: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    """Of the medians of the totals."""
    if other is None:
        return "-"
    return f"{statistics.median(_seconds(peer, 'total')) / statistics.median(_seconds(other, 'total')):.2f}"


def _times(measured: Sequence[Mapping[str, Any]]) -> str:
    own = {peer["method"]: peer for peer in measured if peer["program"] == OWN and peer["weights"] == "float32"}
    rows = [
        [
            *_name(peer),
            *(_cell(_seconds(peer, stage)) for stage in _STAGES),
            _ratio(peer, own[DEFAULT]),
            _ratio(peer, own.get(peer["method"])),
            f"{max(run['others'] for run in peer['runs']):.0%}",
        ]
        for peer in measured
    ]
    columns = [*_NAME, *(f"{stage}, s" for stage in _STAGES)]
    return _table([*columns, "this / default rule here", "this / same method here", "disturbed"], rows)


def _decoding(result: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> str:
    steps, rows = result["new_tokens"] - 1, []
    for peer in measured:
        speeds = [steps / seconds for seconds in _seconds(peer, "decode")]
        weights = f"{peer['weights']}, {peer['bits']:.3g} bits"
        rows.append([peer["program"], peer["method"], weights, f"{peer['held']:,}", _cell(speeds)])
    return _table([*_NAME, "prompt tokens in the cache", "tokens a second"], rows)


def _agreement(result: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{peer['program']}, {peer['weights']}, keeps by the paper's algorithm {peer['kept_as_here']} of the "
        f"{result['keep']} tokens that {OWN} keeps by it."
        for peer in measured
        if "kept_as_here" in peer
    ]


def _settings(peer: Mapping[str, Any]) -> list[str]:
    """One paragraph or two of a program whose settings are known; none of others."""
    chosen = ", ".join(f"{name} {value}" for name, value in peer.get("settings", {}).items() if value is not None)
    if not chosen:
        return []
    told = f"{peer['program']}, {peer['method']}: {chosen}."
    if "tried" not in peer:
        return [told]
    columns = [name for name in peer["tried"][0] if name != "seconds"]
    rows = [[*(str(one[name]) for name in columns), f"{one['seconds']['total']:.2f}"] for one in peer["tried"]]
    return [f"{told} That was the fastest in one run of each:", _table([*columns, "total, s"], rows)]


def markdown(result: Mapping[str, Any]) -> str:
    """The page of a result, as compare.py writes it."""
    measured = [peer for peer in result["peers"] if "not_measured" not in peer]
    missing = [peer for peer in result["peers"] if "not_measured" in peer]
    whole = [peer for peer in measured if peer["prompt_tokens"] == result["prompt_tokens"]]
    rounds = f"{result['rounds']} rounds" if result["rounds"] > 1 else "One round"
    answers = [[*_name(peer), _quoted(peer["answer"])] for peer in measured]
    parts = [
        "# This project beside others on the same model",
        f"{result['model']}, a prompt of {result['prompt_tokens']:,} tokens and {result['new_tokens']} new ones, "
        f"greedy; no token ends an answer. Methods keep {result['keep']:,} tokens of the prompt. The paper's algorithm "
        f"picks them at layer {result['layer']}. Weights other than {QUANTISED} are made of the same file.",
        f"{result['processor']}, {result['threads']} threads for each program. {rounds} after a warm-up: in each, "
        "every program ran once, one at a time. **Bold** is the median; of several runs, all are in brackets.",
        "## Seconds",
        "The filter chooses tokens, prefill ends with the first new token, decode makes the others. The ratios are of "
        "medians of totals, to this project in float32: above 1, the row took longer. Disturbed: the largest share of "
        "the machine's processors that other processes took during a run. This project's totals alone include turning "
        "the text into tokens and back; the others are given tokens.",
        _times(whole),
        "## Decoding",
        "Kept tokens: the program read nothing but the tokens that the paper's algorithm keeps here. Bits: of a weight "
        f"on average; {OWN} holds the embedding in 32 bits beside matrices in int8.",
        _decoding(result, measured),
        "## Checks",
        *_agreement(result, measured),
        _table([*_NAME, "answer"], answers),
    ]
    if missing:
        reasons = [f"- {', '.join(_name(peer))}: {peer['not_measured']}" for peer in missing]
        parts += ["## Not measured", "\n".join(reasons)]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts += ["## Settings and versions", *itertools.chain.from_iterable(map(_settings, measured)), f"{versions}."]
    return "\n\n".join(parts) + "\n"


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=pathlib.Path, help="the JSON file that compare.py wrote")
    path = parser.parse_args().result
    try:
        made = markdown(json.loads(path.read_text()))
    except OSError as error:
        parser.error(f"{path} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        parser.error(f"{path} is not a result of this version of compare.py")
    print(made, end="")


if __name__ == "__main__":
    _main()
