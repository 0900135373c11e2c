#!/bin/sh
# Runs the comparisons of docs/results.md with the default model; goes on where an earlier run was stopped.
#
# usage: benchmarks/compare_methods.sh OUTPUT [QUESTIONS]
#
# OUTPUT gets a file of lines for each comparison, and plots. QUESTIONS is a folder with scientific_qa.jsonl and
# multidoc_qa.jsonl of L-Eval (github.com/OpenLMLab/LEval, LEval-data). Lines about these hold texts of others; a file of
# tables is made of each.
# GEMFILTER is the command (default: gemfilter).
set -eu
gemfilter=$(command -v "${GEMFILTER:-gemfilter}") || { echo "${GEMFILTER:-gemfilter} is not installed" >&2; exit 2; }
gemfilter=$(realpath "$gemfilter")
output=$(realpath -m "${1:?usage: benchmarks/compare_methods.sh OUTPUT [QUESTIONS]}")
mkdir -p "$output"
budgets=256,512,1024
picking=default,uncalibrated,paper,bm25,random,first_last
few=default,bm25,random,first_last
retrieval=niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3,niah_multivalue
retrieval=$retrieval,niah_multiquery,vt

run() {
    name=$1
    shift
    echo "$name" >&2
    "$gemfilter" evaluate "$@" --output="$output/$name.jsonl"
}

run needles_4k --task=needles --lengths=4096 --keep=$budgets --method=$picking
run needles_4k_reading --task=needles --lengths=4096 --keep=512 --method=full,fastkv,snapkv,streaming_llm,h2o
run needles_4k_budgets --task=needles --lengths=4096 --keep=256,1024 --method=fastkv,snapkv
run needles_8k --task=needles --lengths=7900 --keep=$budgets --method=$few
run needles_8k_reading --task=needles --lengths=7900 --keep=512 --method=full,fastkv
run needles_64k --task=needles --lengths=65536 --keep=512,1024 --method=$few
run no_literal_match_4k_kept --task=no_literal_match --count=36 --lengths=4096 --keep=$budgets --method=$picking \
    --noanswer
run no_literal_match_16k_kept --task=no_literal_match --count=36 --lengths=16384 --keep=$budgets --method=$few \
    --noanswer
run ruler_kept --task=ruler --subtasks=$retrieval --count=3 --lengths=4096,7900 --keep=$budgets --method=$few --noanswer
run ruler_4k --task=ruler --count=2 --lengths=4096 --keep=512 --method=full,default,bm25
run ruler_counting_4k --task=ruler --subtasks=vt,cwe,fwe --count=3 --lengths=4096 --keep=1024 \
    --method=full,default,bm25,random
run ruler_8k --task=ruler --count=1 --lengths=7900 --keep=512 --method=full,default,bm25
if [ $# -gt 1 ]; then
    cd "$2"
    for questions in scientific_qa multidoc_qa; do
        run real_${questions}_kept --task=real_questions --questions_file=$questions.jsonl --only=verbatim \
            --keep=$budgets --method=$picking --noanswer
        run real_${questions}_32k_kept --task=real_questions --questions_file=$questions.jsonl --join=7 --only=verbatim \
            --keep=$budgets --method=default,uncalibrated,bm25,random,first_last --noanswer
    done
    run real_scientific_qa --task=real_questions --questions_file=scientific_qa.jsonl --only=verbatim --keep=512 \
        --method=default,paper,bm25
    run real_multidoc_qa --task=real_questions --questions_file=multidoc_qa.jsonl --only=verbatim --keep=512 \
        --method=full,default,paper,bm25
    for made in "$output"/real_*.jsonl; do
        "$gemfilter" compare "$made" --baseline=bm25 --format=json >"${made%.jsonl}.json"
    done
    "$gemfilter" compare "$output/real_multidoc_qa_kept.jsonl" --score=kept --plot="$output/real_multidoc_qa_kept.png"
fi
"$gemfilter" compare "$output/no_literal_match_4k_kept.jsonl" --score=kept --plot="$output/no_literal_match_4k_kept.png"
