#!/bin/sh
# Ask the default model two questions of the Python language reference, many times longer than its context.
# Usage: demo.sh FOLDER_WITH_GEMFILTER
set -eu
bin=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
text=$folder/python-reference.txt

# The reference ships with every Python as pydoc_data.topics; this much of it is about 60,400 tokens.
"$bin/python" - "$text" <<'PYTHON'
import pathlib
import sys
from pydoc_data.topics import topics

text = "\n\n".join(topics[name] for name in sorted(topics))[:246_000]
pathlib.Path(sys.argv[1]).write_text(text, encoding="utf-8")
PYTHON

echo "The text is the Python language reference; the model is SmolLM2-135M, whose context is 8,192 tokens."
echo "It is read once, for two questions."
"$bin/gemfilter" generate --prompt_file="$text" --max_new_tokens=48 --show_kept \
    --question="Which module defines an interactive source code debugger for Python programs?" \
    --question="Which statement is used for conditional execution?"
