#!/usr/bin/env bash
# train_rep.py on several machines, one torchrun on each; the arguments are train_rep.py's:
#   sbatch recipes/slurm.sh --loss kcl --data /path/to/imagenet --list ImageNet_LT_train.txt --out runs/kcl --amp
# Two minutes before its time is over Slurm sends SIGTERM, which torchrun passes on: the ranks finish ten steps at most,
# save and leave, and the job queues itself again. Not run here.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
out=$(sed -n 's/.*--out \([^ ]*\).*/\1/p' <<< "$*")
[ -n "$out" ] || { echo "error: say --out, the folder of the run, which every machine must see" >&2; exit 1; }
begun=$(mktemp)
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --rdzv_id="$SLURM_JOB_ID" \
     --rdzv_backend=c10d --rdzv_endpoint="$first:29500" train_rep.py "$@"
code=$?
# again only if the run is not over and went on: an error that repeats itself must not
if [ ! -e "$out/backbone.pt" ] && [ "$out/ckpt.pt" -nt "$begun" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
