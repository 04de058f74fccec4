#!/bin/sh
# Fetch what check.sh needs besides torch, transformers, accelerate and peft: benchmarks/gpu/wheels.sh FOLDER [PYTHON_VERSION]
# The folder travels to a machine without network, which then runs: WHEELS=FOLDER benchmarks/gpu/check.sh OUT
# It stays below 60 MiB, so pyarrow is left out: no Parquet files.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
folder=$1 version=${2:-3.12}
names='pydantic|pydantic-core|typing-inspection|annotated-types|typing-extensions|rich|markdown-it-py|mdurl|pygments'
names="$names|cyclopts|attrs|docstring-parser|rich-rst|docutils|tomli-w|scipy|math-verify|latex2sympy2-extended"
names="$names|antlr4-python3-runtime|httpcore2|h11|truststore|anyio|idna|sniffio|packaging|jinja2|markupsafe"
names="$names|pytest|iniconfig|pluggy|hypothesis|sortedcontainers"
sed -n -E "s/^(($names)==[^ ;]+).*/\1/p" "$here/../../lock/requirements.txt" >"$folder.txt"
"${PYTHON:-python3}" -m pip download --quiet --dest "$folder" --only-binary :all: --python-version "$version" --no-deps -r "$folder.txt"
rm "$folder.txt"
du -sh "$folder"
