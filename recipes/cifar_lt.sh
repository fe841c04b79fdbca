#!/usr/bin/env bash
# CIFAR-10-LT and CIFAR-100-LT at imbalance 100, 50 and 10, ResNet-32, as later work reports KCL; the paper has no
# CIFAR. Top-1 in the runs of TSC's authors (LDAM-DRW: Cao et al. 2019, Table 2):
#          CIFAR-10-LT 100   50     10      CIFAR-100-LT 100   50     10
#   CE              70.4   74.8   86.4              38.3    43.9   55.7
#   KCL             77.6   81.7   88.0              42.8    46.3   57.6
# Their settings are not ours: here batch 128, 200 epochs, cosine, crops and flips for all; K = 4096 and m = 0.99 of KCL
# are of our choosing. No list chooses anything: CIFAR-LT takes every image of its largest class.
#
# Data: downloads into data/cifar10 and data/cifar100, or put there the archives of www.cs.toronto.edu/~kriz/cifar.html.
# 5 hours on one GPU, estimated, not run here: about 115 steps an epoch at an assumed 30 steps/s (CE, LDAM-DRW) and 15
# (KCL): a net of this size waits for its kernels' launches, not for their arithmetic.
# Run again, it goes on where it stopped; a finished run or classifier is kept. SMOKE=1 tries every line in small.
set -euo pipefail
cd "$(dirname "$0")/.."
SEED=${SEED:-0} IMBALANCES=${IMBALANCES:-100 50 10}
if [ "${SMOKE:-}" ]; then . recipes/smoke.sh; fi
runs=runs/seed$SEED

for dataset in cifar10 cifar100; do
    for imbalance in $IMBALANCES; do
        lists=data/$dataset-lt$imbalance
        lt="--dataset $dataset --list $lists/train_lt.txt --seed $SEED" run=$runs/$dataset-lt$imbalance
        python make_lt.py --dataset $dataset --imbalance $imbalance --out $lists    # one draw for all seeds
        python train_rep.py --loss ce   $lt       --out $run-ce                                         # 0.2 h
        python train_rep.py --loss ldam $lt --drw --out $run-ldam-drw                                   # 0.2 h
        python train_rep.py --loss kcl  $lt       --out $run-kcl                                        # 0.4 h
        python train_linear.py $run-kcl/backbone.pt --lr 30 --seed $SEED
        python evaluate.py $run-ce/head.pt $run-ldam-drw/head.pt $run-kcl/linear-lt/head.pt
    done
done
