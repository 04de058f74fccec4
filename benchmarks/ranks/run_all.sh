#!/usr/bin/env bash
# Speed of two ranks, one thread each, on an otherwise idle machine with two cores.
#
#   benchmarks/ranks/run_all.sh PEERS DATA [PAIRS]
#
# PEERS: the environment that make_environment.sh made; DATA: the folder that workloads.py filled (with --real).
# On a CPU `accelerate launch` starts several processes through MPI alone, so TRL is started by torchrun too: accelerate
# reads the same variables.
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "usage: $0 PEERS DATA [PAIRS]" >&2
    exit 2
fi
cd "$(dirname "$0")/../.."
launch="-m torch.distributed.run --standalone --nproc-per-node 2 benchmarks"
peer="$1/bin/python $launch" ours=".venv/bin/python $launch" data=$2 pairs=${3:-3} out=benchmarks/results
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"

compare() { # name, our flags, the peer's script and flags, metrics
    echo "== $1"
    .venv/bin/python benchmarks/compare.py --pairs "$pairs" --ours "$ours/ours_sft.py $2" --peer "$peer/$3" \
        --out "$out/$1.json" --metric tokens_per_s --metric peak_rss_mb --same first_loss "${@:4}"
}
norm=(--same first_gradient_norm)
small="--model $data/small --data $data/small-sft.jsonl --steps 6 --warmup 2 --threads 1"
compare ranks-ddp-plain "--packing $small" "peer_ranks.py --order batch_rebalance $small" "${norm[@]}"
compare ranks-fsdp2-plain "--packing --parallel fsdp2 $small" "peer_ranks.py --parallel fsdp2 --order batch_rebalance $small" "${norm[@]}"
compare ranks-ddp-trl "--packing $small" "peer_trl_sft.py $small" "${norm[@]}"
for parallel in ddp fsdp2; do
    .venv/bin/python benchmarks/ranks/scaling.py --model "$data/small" --data "$data/small-sft.jsonl" \
        --parallel $parallel --pairs "$pairs" --out "$out/ranks-scaling-$parallel.json"
done
if [ -d "$data/real" ]; then
    real="--model $data/real --data $data/real-sft.jsonl --steps 1 --warmup 1 --micro-batch 4 --accumulation 2 --threads 1"
    pairs=1
    compare ranks-real-fsdp2-plain "--packing --parallel fsdp2 $real" "peer_ranks.py --parallel fsdp2 --order batch_rebalance $real"
    compare ranks-real-ddp-plain "--packing $real" "peer_ranks.py --order batch_rebalance $real"
fi
