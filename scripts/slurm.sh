#!/usr/bin/env bash
# Train on several nodes with SLURM. Submit this from the repository's root; arguments are those of train_gpt.py:
#
#   sbatch --nodes=2 scripts/slurm.sh speedrun
#
# One task per node: torchrun itself starts one process per GPU.
#SBATCH --job-name=steepest
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch: sbatch --nodes=2 scripts/slurm.sh speedrun}"

# All nodes meet at the first node of the job. The job id keeps them apart from other jobs on the same nodes.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}
echo "==> train on $SLURM_NNODES nodes of ${SLURM_GPUS_ON_NODE:-8} GPUs; rendezvous at $first_node:29500"
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first_node:29500" \
  train_gpt.py "${@:-speedrun}"
