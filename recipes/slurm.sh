#!/usr/bin/env bash
# Runs train_rep.py on several machines, with one torchrun on each. Pass it the arguments of train_rep.py:
#   sbatch recipes/slurm.sh --loss kcl --data /path/to/imagenet --list ImageNet_LT_train.txt --out runs/kcl --amp
# Two minutes before its time is up, the job queues itself again. Then it resumes from its last checkpoint, which is
# written at the end of each epoch. Every machine must see --out. This was not run here.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
trap 'scontrol requeue $SLURM_JOB_ID' USR1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --rdzv_id="$SLURM_JOB_ID" \
     --rdzv_backend=c10d --rdzv_endpoint="$first:29500" train_rep.py "$@" &
wait $!
