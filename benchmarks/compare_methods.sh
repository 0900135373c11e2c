#!/bin/sh
# Runs the comparisons of docs/results.md with the default model; goes on where an earlier run was stopped.
#
# usage: benchmarks/compare_methods.sh OUTPUT [QUESTIONS]
#
# OUTPUT gets a file of lines for each comparison. QUESTIONS is a folder with scientific_qa.jsonl and multidoc_qa.jsonl of
# L-Eval (github.com/OpenLMLab/LEval, LEval-data); their lines hold texts of others and are not kept here.
# GEMFILTER is the command (default: gemfilter).
set -eu
gemfilter=${GEMFILTER:-gemfilter}
output=$(realpath -m "${1:?usage: benchmarks/compare_methods.sh OUTPUT [QUESTIONS]}")
mkdir -p "$output"
picking=default,uncalibrated,paper,bm25,random,first_last
reading=full,fastkv,snapkv,streaming_llm,h2o

run() {
    name=$1
    shift
    echo "$name" >&2
    "$gemfilter" evaluate "$@" --output="$output/$name.jsonl"
}

run needles_4k --task=needles --lengths=4096 --keep=256,512,1024 --method=$picking
run needles_4k_reading --task=needles --lengths=4096 --keep=512 --method=$reading
run no_literal_match_4k_kept --task=no_literal_match --count=36 --lengths=4096 --keep=256,512,1024 --method=$picking \
    --noanswer
if [ $# -gt 1 ]; then
    cd "$2"
    for questions in scientific_qa multidoc_qa; do
        run real_${questions}_kept --task=real_questions --questions_file=$questions.jsonl --only=verbatim \
            --keep=256,512,1024 --method=$picking --noanswer
    done
    run real_scientific_qa_32k_kept --task=real_questions --questions_file=scientific_qa.jsonl --join=7 --only=verbatim \
        --keep=1024 --method=default,bm25,random --noanswer
fi
