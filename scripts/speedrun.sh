#!/usr/bin/env bash
# One race: checks the machine and the data, shows the plan, trains, verifies what can be verified.
#
#   scripts/speedrun.sh [PRESET] [--dotted.field VALUE ...]      (default preset: speedrun)
#   GPUS=4 scripts/speedrun.sh track3
set -euo pipefail
cd "$(dirname "$0")/.."

preset=${1:-speedrun}
shift || true
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
shards=${SHARDS:-9} # of 100 M tokens: enough for 338.8 M tokens whose documents are clipped

fail() {
  echo "error: $*" >&2
  exit 2
}

command -v torchrun >/dev/null || fail "torchrun is missing: pip install -r requirements.txt"
[ "$gpus" -ge 1 ] || fail "nvidia-smi finds no GPU; on a CPU: python train_gpt.py speedrun_cpu"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python - <<'PY'
import torch

from layers.fused import paths

assert torch.cuda.is_available(), "PyTorch sees no GPU"
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version()}")
print(paths(torch.device("cuda")).line())
PY

if ! compgen -G "data/fineweb10B/fineweb_train_*.bin" >/dev/null; then
  echo "no FineWeb shards in data/fineweb10B: fetching $shards"
  python -m scripts.fetch_fineweb --shards "$shards"
fi

python -m scripts.plan "$preset" --gpus "$gpus" -- "$@"
name=$preset-$(date -u +%Y%m%dT%H%M%S)
torchrun --standalone --nproc_per_node="$gpus" train_gpt.py "$preset" --run.name "$name" "$@"

python - "runs/$name/summary.json" <<'PY'
import json
import sys

summary = json.load(open(sys.argv[1]))
target, reached = summary["target_loss_nats"], summary["target_seconds"]
print(f"validation loss {summary['val_loss_nats']:.4f} after {summary['steps']} steps, {summary['train_seconds']:.1f} s of training")
if target is not None:
    print(f"target {target}: " + ("not reached" if reached is None else f"first reached at {reached:.1f} s"))
PY
