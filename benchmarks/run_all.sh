#!/usr/bin/env bash
# Every comparison of benchmarks/README.md, one after the other, on an otherwise idle machine.
#
#   benchmarks/run_all.sh PEERS DATA [PAIRS]
#
# PEERS: the environment that make_environment.sh made; DATA: the folder that workloads.py filled (with --real for the
# 135M model). Results go to benchmarks/results/.
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "usage: $0 PEERS DATA [PAIRS]" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
peer="$1/bin/python benchmarks" data=$2 pairs=${3:-3}
ours=".venv/bin/python benchmarks" out=benchmarks/results

compare() { # name, our script and flags, the peer's, metrics
    echo "== $1"
    .venv/bin/python benchmarks/compare.py --pairs "$pairs" --ours "$ours/$2" --peer "$peer/$3" --out "$out/$1.json" "${@:4}"
}
speed=(--metric tokens_per_s --metric peak_rss_mb)
small="--model $data/small --data $data/small-sft.jsonl --steps 6 --warmup 2"
prompts="--data $data/small-prompts.jsonl --steps 5 --warmup 2"

compare sft-small-trl "ours_sft.py --packing $small" "peer_trl_sft.py $small" --same first_loss --same first_gradient_norm "${speed[@]}"
compare grpo-forced "ours_grpo.py --packing --model $data/small $prompts" "peer_trl_grpo.py --model $data/small $prompts" --metric median_step_seconds "${speed[@]}"
compare sample-forced "ours_sample.py --model $data/small $prompts" "peer_generate.py --model $data/small $prompts" "${speed[@]}"
compare grpo-uneven "ours_grpo.py --packing --length uneven --model $data/small-eos $prompts" "peer_trl_grpo.py --length uneven --model $data/small-eos $prompts" --metric median_step_seconds "${speed[@]}"
compare sft-small-trl-by-length "ours_sft.py --packing $small" "peer_trl_sft.py --order batch_rebalance $small" "${speed[@]}"
compare sample-uneven "ours_sample.py --length uneven --model $data/small-eos $prompts" "peer_generate.py --length uneven --model $data/small-eos $prompts" "${speed[@]}"
compare sft-small-transformers "ours_sft.py --packing $small" "peer_transformers_sft.py $small" --same first_loss --same first_gradient_norm "${speed[@]}"
if [ -d "$data/real" ]; then
    real="--model $data/real --data $data/real-sft.jsonl --steps 2 --warmup 1 --micro-batch 4 --accumulation 2"
    compare sft-real-trl "ours_sft.py --packing $real" "peer_trl_sft.py $real" --same first_loss "${speed[@]}"
fi
