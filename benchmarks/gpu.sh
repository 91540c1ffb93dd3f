#!/usr/bin/env bash
# What to measure first on one lent GPU, in at most fifteen minutes; expectations stand in benchmarks/gpu.md.
#
#   TRAIN='tokens/train_*.bin' VAL='tokens/val_*.bin' OUT=results benchmarks/gpu.sh [ITEM ...]
#   benchmarks/gpu.sh --dry [ITEM ...]       every command in a tiny form on the CPU, on made-up tokens
#
# TRAIN, VAL  glob patterns of shards of GPT-2 tokens; one training shard is enough: 60 steps read 7.9 M tokens
# OUT         folder of the results, written as they come: ITEM.txt, status.tsv, profile.json, run folders
# WHEELS      folder of wheels to install first, without network
# TIKTOKEN_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR, PYTHON   as usual; Inductor's cache is kept between items, in OUT by default
#
# Items, in the order in which they run: 1 machine, 2 tests that need a GPU, 3 sixty steps of stage 1, 4 profile of a step,
# 6 fast paths off, 5 stage 3 in one pass, 7 track3. Each has a time limit, 570 seconds for 1 to 3 together; one that fails
# does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=
if [[ ${1:-} == --dry ]]; then
  dry=yes
  shift
fi
items=("$@")
[[ $# -gt 0 ]] || items=(1 2 3 4 6 5 7)
export OUT=${OUT:-runs/gpu} PYTHON=${PYTHON:-python} PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$OUT/inductor}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
mkdir -p "$OUT"
[[ -z ${WHEELS:-} ]] || "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl

if [[ -n $dry ]]; then
  export CUDA_VISIBLE_DEVICES=
  "$PYTHON" -c "
import numpy as np, os
from data.shards import write_shard
tokens = np.random.default_rng(0).integers(0, 50_256, 20_000)
tokens[::100] = 50_256
for name in ('train', 'val'):
    write_shard(f\"{os.environ['OUT']}/{name}.bin\", tokens)" || exit
  TRAIN=$OUT/train.bin VAL=$OUT/val.bin
fi
: "${TRAIN:?set TRAIN to the glob pattern of the training shards}" "${VAL:?set VAL to that of the validation shards}"

data=(--data.train_files "$TRAIN" --data.val_files "$VAL" --data.val_tokens 1048576 --train.val_every_steps 0
      --log.wandb disabled --log.sample_tokens 0 --log.every_steps 5 --run.dir "$OUT/runs" --run.no_final_checkpoint)
speedrun=(--model.matrix_dtype bfloat16 --model.table_dtype bfloat16)
one_pass=(--train.micro_tokens 16384)
three_rows=(--train.micro_tokens 49152)
steps=60 few=20 collect=() small=()
if [[ -n $dry ]]; then # the same flags, then smaller values of some: the last one counts
  steps=2 few=1
  small=(--data.sequence_tokens 64 --data.val_sequence_tokens 128 --data.val_tokens 256 --train.batch_tokens 192
         --train.micro_tokens 192 --model.dim 48 --model.head_dim 8)
  speedrun+=(--model.bigram_buckets 64 --model.bigram_signs 8 --model.prefix_loss 0 --model.dynamic_window 8)
fi

item() { # NAME SECONDS COMMAND ...: run the command, show and keep its output, note its exit status and seconds
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  echo "==> $name: $*" | tee "$OUT/$name.txt"
  timeout -k 10 "$limit" "$@" 2>&1 | tee -a "$OUT/$name.txt"
  status=${PIPESTATUS[0]}
  printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - began)) >> "$OUT/status.tsv"
  [[ $status == 0 ]] || failed=1
}

train() { # NAME SECONDS STEPS PRESET FLAG ...
  local name=$1 limit=$2 count=$3
  shift 3
  item "$name" "$limit" "$PYTHON" train_gpt.py "$@" "${data[@]}" "${small[@]}" --train.steps "$count" --run.name "$name-$(date +%H%M%S)"
}

failed=0
for number in "${items[@]}"; do
  case $number in
    1) [[ -n $dry ]] || item 1-driver 30 nvidia-smi
       item 1-machine 90 "$PYTHON" -c "import torch, kernels
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'NCCL', torch.cuda.nccl.version() if device.type == 'cuda' else '')
print(kernels.device_paths(device).line())" ;;
    2) [[ -z $dry ]] || collect=(--collect-only)
       item 2-tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider --cuda "${collect[@]}" \
         tests/kernels/test_symmetric.py::test_the_kernel_on_the_gpu tests/kernels/test_paths.py::test_kernels_on_the_gpu \
         tests/test_model_attention.py::test_kernels_train_alike_on_cuda \
         tests/test_no_waiting.py::test_a_step_does_not_synchronise_with_cuda ;;
    3) train 3-stage1 330 "$steps" speedrun_1gpu "${speedrun[@]}" "${one_pass[@]}" ;;
    4) item 4-profile 200 "$PYTHON" -m benchmarks.profile_step speedrun_1gpu --out "$OUT/profile.json" -- "${speedrun[@]}" \
         "${one_pass[@]}" "${data[@]}" "${small[@]}" --train.steps "$((steps + 4))" ;;
    5) train 5-stage3 240 "$few" speedrun_1gpu "${speedrun[@]}" "${three_rows[@]}" --schedule.batch_tokens 3 \
         --schedule.window_tokens 5 --schedule.long_window_tokens 3.6667 ;;
    6) train 6-no-fp8 180 "$steps" speedrun_1gpu "${speedrun[@]}" "${one_pass[@]}" --model.fp8 none
       train 6-plain 180 "$steps" speedrun_1gpu "${speedrun[@]}" "${one_pass[@]}" --model.fp8 none --model.fused off ;;
    7) train 7-track3 200 "$few" track3 ;;
    *) echo "error: unknown item $number; items: 1 2 3 4 5 6 7" >&2
       exit 2 ;;
  esac
done
cat "$OUT/status.tsv"
exit "$failed"
