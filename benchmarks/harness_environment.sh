#!/usr/bin/env bash
# The environment of lm-evaluation-harness for harness_gsm8k.py: the harness 0.4.13 with its Hugging Face model, the
# CPU build of torch 2.13.0 and the transformers that thence uses.
#
#   benchmarks/harness_environment.sh FOLDER
#
# About 5 minutes and 2 GB. PYTHON names another interpreter than python3.
set -euo pipefail
if [ "$#" -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
folder=$1
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
pip="$folder/bin/python -m pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0 transformers==5.23.0 'lm-eval[hf]==0.4.13'
# Not by $pip, whose --quiet keeps the list to itself.
"$folder/bin/python" -m pip list 2>/dev/null | grep -E '^(torch|transformers|tokenizers|lm_eval|lm-eval|accelerate|datasets) '
