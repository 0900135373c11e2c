"""Plans of the paper's models on TPU slices, and docs/plans.md made of them; nothing is run on a TPU.

python benchmarks/plan_tables.py          makes the plans that benchmarks/plans/models lacks, then the page
python benchmarks/plan_tables.py --page   makes the page alone
"""

import itertools
import json
import pathlib
import subprocess
import sys

from gemfilter_jax import files

ROOT = pathlib.Path(__file__).parents[1]
PLANS = ROOT / "benchmarks" / "plans" / "models"
PAGE = ROOT / "docs" / "plans.md"
MODELS = {
    "llama-3.1-8b": "llama-3.1-8b",
    "mistral-nemo-12b": "mistral-nemo-12b",
    "phi-3.5-mini": "benchmarks/plans/phi-3.5-mini.json",  # its LongRoPE factors are made up
}
TOPOLOGIES = ("v5e:2x4", "v5p:2x2x1", "v6e:2x4")
TOKENS = (32768, 131072, 1048576)
NEW_TOKENS = 128
HEAD = f"""# Plans of the paper's models

Computed, not measured: nothing here has run on a TPU. `python benchmarks/plan_tables.py` made this page from
[`benchmarks/plans/models/`](../benchmarks/plans/models), which `gemfilter plan` made. Bytes are those of the programs
that libtpu compiled. FLOPs and exchanges are counted in the programs; traffic is estimated. Seconds are a bound from
published speeds: the larger of arithmetic and memory traffic, then the exchanges over one link, one after the other.
The time that a collective takes to start is not in them. One prompt, default preset, bfloat16, {NEW_TOKENS} new tokens.
Prompts beyond a model's context tell of bytes and seconds alone. The shape of Phi-3.5-mini has LongRoPE factors of one
in place of the published ones, which changes no byte and no operation. A length without a row has not been planned.

- GB: on one chip, of its memory; *weights* are held, *filter* and *answer* are the most that stage 1 and stage 2 take.
- TFLOP, GB read, GB sent: of one chip, in the filter pass. In a ring a chip sends more than the arrays that it hands
  over, which `gemfilter plan` prints as exchanged.
- GB a token: that one chip reads for each decoded token.
- Seconds: filter pass, prefill and decode of GemFilter; prefill and decode of full attention.
"""
COLUMNS = (
    "chips",
    "tokens",
    "mesh",
    "stage 2",
    "weights GB",
    "filter GB",
    "answer GB",
    "of GB",
    "TFLOP",
    "GB read",
    "GB sent",
    "GB a token",
    "filter s",
    "prefill s",
    "decode s",
    "full attention s",
)


def main() -> None:
    """Make plans and the page."""
    wanted = list(itertools.product(TOKENS, MODELS, TOPOLOGIES))
    if "--page" not in sys.argv[1:]:
        PLANS.mkdir(parents=True, exist_ok=True)
        for tokens, model, topology in wanted:
            if not _file(model, topology, tokens).exists():
                print(model, topology, tokens, flush=True)
                flags = [f"--model={MODELS[model]}", f"--topology={topology}", f"--tokens={tokens}", "--format=json"]
                flags += [f"--max_new_tokens={NEW_TOKENS}", f"--output={_file(model, topology, tokens)}"]
                command = [sys.executable, "-m", "gemfilter_jax.cli.main", "plan", *flags]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    files.write_whole(PAGE, _page())


def _file(model: str, topology: str, tokens: int) -> pathlib.Path:
    return PLANS / f"{model}_{tokens}_{topology.replace(':', '_')}.json"


def _page() -> str:
    parts = [HEAD]
    for model in MODELS:
        found = [_file(model, *rest) for rest in itertools.product(TOPOLOGIES, TOKENS)]
        plans = [json.loads(file.read_text()) for file in found if file.exists()]
        if plans:
            rows = [COLUMNS, ("---:",) * len(COLUMNS), *map(_row, plans)]
            table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
            versions = ", ".join(f"{name} {version}" for name, version in plans[0]["versions"].items())
            parts.append(f"## {model}\n\n{table}\n\n{versions}; layer {plans[0]['filter_layer']} picks.\n")
    return "\n".join(parts)


def _row(plan: dict) -> tuple[str, ...]:
    stages, full = plan["stages"], plan["full_attention"]

    def gigabytes(*names: str) -> str:
        held = [stages[name]["memory"]["total"] for name in names if "memory" in stages[name]]
        return f"{max(held) / 1e9:.2f}" if held else "-"

    def seconds(*made: dict) -> str:
        return f"{sum(one['seconds']['total'] for one in made):.3f}"

    filtering = stages["filter"]
    return (
        plan["topology"].replace(":", " "),
        f"{plan['tokens']:,}",
        _mesh(plan["mesh"]),
        _mesh(plan["mesh_of_stage_2"]),
        f"{filtering['memory']['weights'] / 1e9:.2f}",
        gigabytes("filter") + ("" if plan["fits"] else ", too many"),
        gigabytes("prefill", "decode"),
        f"{plan['device_memory'] / 1e9:.2f}",
        f"{filtering['flops'] / 1e12:.1f}",
        f"{filtering['traffic_bytes'] / 1e9:.1f}",
        f"{filtering['sent_bytes'] / 1e9:.2f}",
        f"{plan['traffic_bytes_per_decoded_token'] / 1e9:.2f}",
        *(seconds(stages[name]) for name in ("filter", "prefill", "decode")),
        seconds(*full.values()),
    )


def _mesh(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}:{size}" for axis, size in sizes.items() if size > 1) or "one chip"


if __name__ == "__main__":
    main()
