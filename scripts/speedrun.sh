#!/usr/bin/env bash
# One race: checks the machine and the data, shows the plan, trains, verifies the record that it leaves in its folder.
#
#   scripts/speedrun.sh [PRESET] [--dotted.field VALUE ...]      (default preset: speedrun)
#   GPUS=4 SHARDS=18 NAME=first scripts/speedrun.sh track3
#
# GPUS: all that CUDA shows; SHARDS: what the preset reads; NAME of the run's folder in runs/: preset and time.
# Compiling and warming up are train_gpt.py's, and not timed.
set -euo pipefail
cd "$(dirname "$0")/.."

preset=speedrun
if [[ $# -gt 0 && $1 != -* ]]; then
  preset=$1
  shift
fi

fail() {
  echo "error: $*" >&2
  exit 2
}

command -v torchrun >/dev/null || fail "torchrun is missing: pip install -r requirements.txt"
command -v nvidia-smi >/dev/null || fail "nvidia-smi is missing: no NVIDIA driver; on a CPU: python train_gpt.py speedrun_cpu"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
there=$(python -c "import torch; print(torch.cuda.device_count())") # as CUDA_VISIBLE_DEVICES says
[[ $there -gt 0 ]] || fail "PyTorch sees no GPU: is it built for CUDA, and the driver new enough for it?"
python -c "import torch, kernels; print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'NCCL', \
  torch.cuda.nccl.version()); print(kernels.device_paths(torch.device('cuda')).line())"
gpus=${GPUS:-$there}
[[ $gpus =~ ^[1-9][0-9]*$ && $gpus -le $there ]] || fail "GPUS=$gpus, but CUDA shows $there"

if [[ -z ${SHARDS:-} ]]; then
  python -m scripts.fetch_fineweb --preset "$preset" -- "$@" # those that are here stay as they are
elif [[ $SHARDS -gt 0 ]]; then
  python -m scripts.fetch_fineweb --shards "$SHARDS"
fi

python -m scripts.plan "$preset" --gpus "$gpus" -- "$@"
name=${NAME:-$preset-$(date -u +%Y%m%dT%H%M%S)}
torchrun --standalone --nproc_per_node="$gpus" train_gpt.py "$preset" "$@" --run.dir runs --run.name "$name"
python -m scripts.verify_record --add "runs/$name/record.jsonl" --runs "runs/$name"
