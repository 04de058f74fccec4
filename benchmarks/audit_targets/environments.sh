#!/usr/bin/env bash
# The environments of targets.toml, one for each stack and version, with the CPU build of torch 2.13.0.
#
#   benchmarks/audit_targets/environments.sh FOLDER [NAME ...]
#
# NAME: tf4452 tf4461 trl rl ds0182 ds0189 ds019 orl0910 orl0112 lf095 verl091 swift460 axolotl0190 skyrl030; none: all of them. About 30 minutes and 20 GB.
# Further: ci, the newest TRL and DeepSpeed in one environment, which `make test` makes for tests/audit/test_stacks.py.
set -euo pipefail
if [ "$#" -lt 1 ]; then
    echo "usage: $0 FOLDER [NAME ...]" >&2
    exit 2
fi
folder=$1
shift
constraints="$(cd "$(dirname "$0")/../.." && pwd)/constraints.txt"
names=("$@")
[ "${#names[@]}" -gt 0 ] || names=(tf4452 tf4461 trl rl ds0182 ds0189 ds019 orl0910 orl0112 lf095 verl091 swift460 axolotl0190 skyrl030)
mkdir -p "$folder"

environment() { # name
    [ -x "$folder/$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder/$1"
    pip="$folder/$1/bin/python -m pip --quiet --disable-pip-version-check"
}

# The build of DeepSpeed looks at the torch that is installed: torch comes first and the build is not isolated.
deepspeed() { # version of DeepSpeed, of transformers
    $pip install torch==2.13.0 numpy ninja wheel setuptools packaging
    $pip install --no-build-isolation "deepspeed==$1" "transformers==$2" safetensors
}

# OpenRLHF pins flash-attn, vllm, ray and bitsandbytes, which supervised training on a CPU does not need: it is
# installed without its requirements, beside the DeepSpeed and transformers that its version names.
openrlhf() { # version, DeepSpeed, transformers
    deepspeed "$2" "$3"
    $pip install peft accelerate datasets torchdata optree einops jsonlines loralib pylatexenc sympy tensorboard \
        torchmetrics
    $pip install --no-deps "openrlhf==$1"
}

for name in "${names[@]}"; do
    echo "== $name"
    environment "$name"
    case $name in
    tf4452) $pip install torch==2.13.0 transformers==4.45.2 accelerate==1.0.1 'numpy<2' ;;
    tf4461) $pip install torch==2.13.0 transformers==4.46.1 accelerate==1.0.1 'numpy<2' ;;
    trl) $pip install torch==2.13.0 trl==1.16.0 ;;
    ci)
        $pip install -c "$constraints" torch==2.13.0 numpy ninja wheel setuptools packaging
        $pip install -c "$constraints" --no-build-isolation deepspeed==0.19.8 trl==1.16.0
        ;;
    ds0182) deepspeed 0.18.2 5.18.0 ;;
    ds0189) deepspeed 0.18.9 5.18.0 ;;
    ds019) deepspeed 0.19.8 5.18.0 ;;
    orl0910) openrlhf 0.9.10 0.18.9 5.5.0 ;;
    orl0112) openrlhf 0.11.2 0.19.6 5.15.0 ;;
    # Its torchvision and torchaudio are built for another torch; the adapter puts an empty module in their place.
    lf095)
        $pip install torch==2.13.0 llamafactory==0.9.5
        $pip uninstall -y torchvision torchaudio
        ;;
    # Their loss functions alone: without vLLM, flash-attn and DeepSpeed.
    rl)
        $pip install torch==2.13.0 trl==1.16.0 transformers accelerate datasets ray omegaconf hydra-core tensordict \
            codetiming orjson pydantic
        $pip install --no-deps verl==0.9.1 openrlhf==0.11.2
        ;;
    verl091) $pip install torch==2.13.0 verl==0.9.1 uvicorn fastapi torchdata ;;
    swift460) $pip install torch==2.13.0 ms-swift==4.6.0 ;;
    axolotl0190) $pip install torch==2.13.0 axolotl==0.19.0 ;;
    # Its loss functions alone: what they import beside the package's own requirements.
    skyrl030) $pip install torch==2.13.0 skyrl==0.3.0 skyrl-gym==0.4.0 ray jaxtyping omegaconf cloudpickle loguru hydra-core ;;
    *)
        echo "no environment is called $name" >&2
        exit 2
        ;;
    esac
    # Not by $pip, whose --quiet keeps the list to itself.
    "$folder/$name/bin/python" -m pip list 2>/dev/null | grep -E '^(torch|transformers|deepspeed|trl|openrlhf|llamafactory|verl|ms_swift|axolotl|skyrl) '
done
