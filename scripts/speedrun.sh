#!/usr/bin/env bash
# One timed run: check the machine, fetch the data, print the plan, train, and verify the record written to the run folder.
#
#   scripts/speedrun.sh [PRESET] [--dotted.field VALUE ...]      (default preset: speedrun)
#   GPUS=4 SHARDS=18 NAME=first scripts/speedrun.sh track3
#
# GPUS    number of GPUs; default: all that PyTorch sees
# SHARDS  number of training shards to fetch, 0 for none; default: as many as the preset reads
# NAME    name of the run folder in runs/; default: preset and time
# Compilation and warm-up happen in train_gpt.py and are not timed.
set -euo pipefail
cd "$(dirname "$0")/.."

preset=speedrun
if [[ $# -gt 0 && $1 != -* ]]; then
  preset=$1
  shift
fi

step() {
  echo "==> $*"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

step "1/5 check the machine"
command -v torchrun >/dev/null || fail "torchrun is missing; run: pip install -r requirements.txt"
command -v nvidia-smi >/dev/null || fail "nvidia-smi is missing: install the NVIDIA driver, or train on the CPU with" \
  "python train_gpt.py speedrun_cpu"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
visible=$(python -c "import torch; print(torch.cuda.device_count())") # unlike nvidia-smi, respects CUDA_VISIBLE_DEVICES
[[ $visible -gt 0 ]] || fail "PyTorch sees no GPU; check CUDA_VISIBLE_DEVICES, that torch is a CUDA build, and that the" \
  "driver supports its CUDA version"
python -c "import torch, kernels; print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'NCCL', \
  torch.cuda.nccl.version()); print(kernels.device_paths(torch.device('cuda')).line())"
gpus=${GPUS:-$visible}
[[ $gpus =~ ^[1-9][0-9]*$ && $gpus -le $visible ]] \
  || fail "GPUS must be a number from 1 to $visible, the GPUs that PyTorch sees, got $gpus"

step "2/5 fetch the data (shards that are already here stay as they are)"
if [[ -z ${SHARDS:-} ]]; then
  python -m scripts.fetch_fineweb --preset "$preset" -- "$@"
elif [[ $SHARDS -gt 0 ]]; then
  python -m scripts.fetch_fineweb --shards "$SHARDS"
fi

step "3/5 print the plan for $preset on $gpus GPUs"
python -m scripts.plan "$preset" --gpus "$gpus" -- "$@"

name=${NAME:-$preset-$(date -u +%Y%m%dT%H%M%S)}
step "4/5 train $preset on $gpus GPUs into runs/$name"
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # batches grow: no fragments of the smaller ones
torchrun --standalone --nproc_per_node="$gpus" train_gpt.py "$preset" "$@" --run.dir runs --run.name "$name" || {
  status=$?
  echo "error: training stopped; the reason is above. To continue from the last checkpoint, or from the start if there is" \
    "none: ${SHARDS:+SHARDS=$SHARDS }GPUS=$gpus NAME=$name scripts/speedrun.sh $preset ${*@Q} --run.resume" >&2
  exit "$status"
}

step "5/5 verify the record runs/$name/record.jsonl"
python -m scripts.verify_record --add "runs/$name/record.jsonl" --runs "runs/$name"
