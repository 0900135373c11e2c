#!/bin/sh
# Runs the experiments of the GemFilter paper (arXiv 2409.17422) on one model and makes a page of their results.
set -eu

usage() {
    cat <<'USAGE'
usage: launch/reproduce_paper.sh --model=MODEL [--longbench=FOLDER] [--output=FOLDER] [OPTION]... [-- FLAG...]

Needles in a haystack, LongBench, the sweep over filter layers, and time and memory by length, as in the figures and
tables of the paper, for full attention, SnapKV, the paper's rule and this project's default. Results go to FOLDER:
lines of JSON, plots, and a page with all tables, index.md. The same command goes on where an earlier one was stopped.

--model=MODEL        folder, .gguf file, Hugging Face hub id or smollm2
--longbench=FOLDER   LongBench's .jsonl files; without it neither LongBench nor the sweep is run
--texts=FOLDER       .txt and .md files to hide needles in, such as the essays (default: texts that ship with gemfilter)
--output=FOLDER      default: reproduction
--lengths=N,N,...    of the needle test (default: 40, evenly from 1,000 to 128,000, up to the model's context)
--bench=N,N,...      of time and memory (default: 8,192 to 131,072, up to the model's context)
--keep=N,N,...       budgets of LongBench (default: 1024,2048,4096); the other experiments take the first
--layers=R,R,...     of the sweep (default: the paper's 1, 7, 12, 13, 14, 19, 25, 31 of 32, at the model's depth)
--count=N            examples of each LongBench dataset (default: all)
FLAG                 of every command, such as --dtype=bfloat16 or --mesh=seq:8

GEMFILTER   the command (default: gemfilter)
PYTHON      the interpreter that has gemfilter_jax (default: python3)
USAGE
}

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

model='' longbench='' texts='' output=reproduction lengths='' bench='' keep=1024,2048,4096 layers='' count=''
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --model=?* | --longbench=?* | --texts=?* | --output=?* | --lengths=?* | --bench=?* | --keep=?* | --layers=?* | \
        --count=?*)
        name=${1%%=*}
        eval "${name#--}=\${1#*=}"
        ;;
    --)
        shift
        break
        ;;
    *) fail "$1: unknown; --help tells the options, and flags of gemfilter follow --" ;;
    esac
    shift
done
[ -n "$model" ] || fail "--model is missing; give a folder, a .gguf file, a hub id or smollm2"
gemfilter=${GEMFILTER:-gemfilter}
command -v "$gemfilter" >/dev/null || fail "$gemfilter is not installed; name the command in GEMFILTER"

export TRANSFORMERS_VERBOSITY=error TRANSFORMERS_NO_ADVISORY_WARNINGS=1

# The model's context and layers decide what is run by default.
defaults=$("${PYTHON:-python3}" - "$model" <<'DEFAULTS'
import importlib.util
import sys

from gemfilter_jax.checkpoints import open_checkpoint
from gemfilter_jax.errors import UserError

if importlib.util.find_spec("matplotlib") is None:
    sys.exit("the plots need matplotlib; install it with pip install matplotlib")
try:
    config = open_checkpoint(sys.argv[1]).config
except UserError as error:
    sys.exit(str(error))
room = config.context - 200  # for the prompt around a text and the answer
needles = [round(1_000 + index * 127_000 / 39) for index in range(40)]
timed = [8_192, 16_384, 32_768, 65_536, 131_072]
layers = [min(round(layer / 32 * config.layers), config.layers - 1) for layer in (1, 7, 12, 13, 14, 19, 25, 31)]
for some in ([one for one in needles if one <= room], [min(one, room) for one in timed if one <= config.context], layers):
    print(",".join(map(str, dict.fromkeys(some or [room]))))
DEFAULTS
) || exit 2
lengths=${lengths:-$(echo "$defaults" | sed -n 1p)}
bench=${bench:-$(echo "$defaults" | sed -n 2p)}
layers=${layers:-$(echo "$defaults" | sed -n 3p)}
first=${keep%%,*}
mkdir -p "$output"
timed="--model=$model --lengths=$bench --keep=$first $*"
if [ -e "$output/bench.json" ]; then
    before=$(cat "$output/bench.flags" 2>/dev/null) || before='unknown flags'
    [ "$before" = "$timed" ] || fail "$output/bench.json is of $before, not of $timed; give a new --output"
fi

"$gemfilter" evaluate --model="$model" --task=needles --paper ${texts:+--texts="$texts"} --lengths="$lengths" \
    --keep="$first" --method=full,snapkv,paper,default --output="$output/needles.jsonl" "$@"
if [ -n "$longbench" ]; then
    "$gemfilter" evaluate --model="$model" --task=longbench --data="$longbench" ${count:+--count="$count"} \
        --nochat_template --keep="$keep" --method=full,h2o,snapkv,paper,default --output="$output/longbench.jsonl" "$@"
    for layer in $(echo "$layers" | tr , ' '); do
        "$gemfilter" evaluate --model="$model" --task=longbench --data="$longbench" ${count:+--count="$count"} \
            --nochat_template --keep="$first" --method=paper --filter_layer="$layer" \
            --output="$output/layer_$layer.jsonl" "$@"
    done
fi
if [ ! -e "$output/bench.json" ]; then
    printf '%s\n' "$timed" >"$output/bench.flags"
    "$gemfilter" bench --model="$model" --lengths="$bench" --keep="$first" --method=full,snapkv,paper,default \
        --output="$output/bench.part.json" --plot="$output/bench.png" "$@" >"$output/bench.txt"
    mv "$output/bench.part.json" "$output/bench.json"
fi

{
    echo "# The experiments of the GemFilter paper on $model"
    echo
    "${PYTHON:-python3}" - "$output/needles.jsonl" <<'HEADING'
import json
import pathlib
import sys

with pathlib.Path(sys.argv[1]).open() as lines:
    run = json.loads(next(lines))
layers = {one["method"]: one["options"].get("filter_layer") for one in run["methods"]}
print(f"Weights in {run['dtype']}; filter layer {layers['paper']} for the paper's rule, {layers['default']} by default.")
print(", ".join(f"{name}: {value}" for name, value in run["environment"].items() if name != "memory") + ".")
HEADING
    printf '\n## Needle in a haystack\n\nThe paper plots recall. ![recall by length and depth](needles.png)\n\n'
    "$gemfilter" compare "$output/needles.jsonl" --format=markdown --score=recall --heat_map="$output/needles.png"
    if [ -n "$longbench" ]; then
        printf '\n## LongBench, without chat template\n\n'
        "$gemfilter" compare "$output/longbench.jsonl" --format=markdown --baseline=full --plot="$output/longbench.png"
        printf '\n![score by budget](longbench.png)\n\n'
        echo 'The paper has the average of the parts.'
        echo
        "$gemfilter" compare "$output/longbench.jsonl" --format=markdown --by_group
        printf '\n## LongBench by filter layer\n\n'
        for layer in $(echo "$layers" | tr , ' '); do
            "$gemfilter" compare "$output/layer_$layer.jsonl" --format=json --by_group >"$output/layer_$layer.json" || exit
        done
        "${PYTHON:-python3}" - "$output" "$layers" <<'SWEEP'
import json
import pathlib
import sys

folder, layers = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
print("Averages of the parts. `gemfilter compare --by_group layer_N.jsonl` shows the parts.\n")
print("| layer | parts | examples | unanswered | average score |\n| --- | --- | --- | --- | --- |")
remarks = []
for layer in layers:
    made = json.loads((folder / f"layer_{layer}.json").read_text())
    parts = made["rows"]
    scores = [part["scores"]["score"]["value"] for part in parts if part["scores"]]
    average = f"{sum(scores) / len(scores):.3f}" if len(scores) == len(parts) else "-"
    examples, unanswered = (sum(part[name] for part in parts) for name in ("examples", "errors"))
    print(f"| {layer} | {len(parts)} | {examples} | {unanswered} | {average} |")
    remarks += [f"- layer {layer}: {remark}" for remark in made["remarks"]]
print("\n".join(["", *remarks]))
SWEEP
    fi
    printf '\n## Time and memory by length\n\n%s\n\n```\n' "Numbers are medians; \"full / this\" is the median ratio of \
runs in turns. On a CPU the memory is that of the whole process at its peak, on other devices that of the weights and the \
largest program by the compiler's report. bench.json has all runs. \
![time and memory by length](bench.png)"
    cat "$output/bench.txt"
    printf '```\n'
} >"$output/index.md.part"
mv "$output/index.md.part" "$output/index.md"
echo "$output/index.md"
