#!/usr/bin/env bash
# CIFAR-10-LT and CIFAR-100-LT at imbalance 100, 50 and 10 with ResNet-32, the data on which later work reports KCL;
# the paper has no CIFAR. Top-1 in the runs of Li et al. 2022 (LDAM-DRW is in Cao et al. 2019, Table 2):
#          CIFAR-10-LT 100   50     10      CIFAR-100-LT 100   50     10
#   CE              70.4   74.8   86.4              38.3    43.9   55.7
#   KCL             77.6   81.7   88.0              42.8    46.3   57.6
# Their settings are not ours. Here all losses train with batch 128 for 200 epochs, with a cosine, crops and flips,
# and KCL's K = 4096 and m = 0.99 are our choice. Nothing is chosen on a list: CIFAR-LT takes every image of its
# largest class, so that none is left to validate on.
#
# Data: downloaded into data/cifar10 and data/cifar100, unless the archives of www.cs.toronto.edu/~kriz/cifar.html
# are there. 3 hours on one GPU, estimated and not run here: the three losses of a data set run side by side, so
# that KCL's time counts, about 115 steps per epoch at an assumed 15 steps/s. A net of this size waits for its
# kernels' launches, not for their arithmetic, and leaves room for the other two.
# Run it again and it resumes; finished runs and classifiers are kept. SMOKE=1 tries every line in miniature.
set -euo pipefail
cd "$(dirname "$0")/.."
SEED=${SEED:-0} IMBALANCES=${IMBALANCES:-100 50 10}
if [ "${SMOKE:-}" ]; then . recipes/smoke.sh; fi
runs=runs/seed$SEED
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT    # what runs in the background does not outlive the recipe

for dataset in cifar10 cifar100; do
    for imbalance in $IMBALANCES; do
        lists=data/$dataset-lt$imbalance
        lt="--dataset $dataset --list $lists/train_lt.txt --seed $SEED" run=$runs/$dataset-lt$imbalance
        python make_lt.py --dataset $dataset --imbalance $imbalance --out $lists    # one draw for all seeds
        # side by side; each has a progress bar of its own
        TQDM_POSITION=1 python train_rep.py --loss ce   $lt       --out $run-ce       & ce=$!           # 0.2 h
        TQDM_POSITION=2 python train_rep.py --loss ldam $lt --drw --out $run-ldam-drw & ldam=$!         # 0.2 h
        python train_rep.py --loss kcl $lt --out $run-kcl                                               # 0.4 h
        python train_linear.py $run-kcl/backbone.pt --lr 30 --seed $SEED
        wait $ce
        wait $ldam
        python evaluate.py $run-ce/head.pt $run-ldam-drw/head.pt $run-kcl/linear-lt/head.pt
    done
done
