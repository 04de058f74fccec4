#!/bin/sh
# Run thence on this machine's GPU and compare with float64 on the CPU: benchmarks/gpu/check.sh [OUT] [options]
# WHEELS=FOLDER installs what wheels.sh has fetched into a folder of its own, without network.
# Options go to check.py: --parts NAME..., --device cpu (a dry run without a GPU), --small.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH= cd -- "$here/../.." && pwd)
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
if [ -n "${WHEELS:-}" ]; then
    extra=${TMPDIR:-/tmp}/thence-gpu-check
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$extra" "$WHEELS"/*.whl
    export PYTHONPATH="$extra${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# cuBLAS repeats its sums only with a fixed workspace; it is asked for here because it is read once, at the start
export CUBLAS_WORKSPACE_CONFIG="${CUBLAS_WORKSPACE_CONFIG:-:4096:8}"
exec "$python" "$here/check.py" "$@"
