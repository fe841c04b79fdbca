#!/usr/bin/env bash
# Fig. 3: how CE representations of longer and longer tails, from LT0 (balanced) to LT, generalise. They are trained on
# 500 classes, and the classifiers on the balanced set of the other 500. The paper shows a picture without numbers. Look
# for this: top-1 and top-5 fall with alpha. The paper does not say which of its two splits it used (here the random
# one, overlap), nor which weight decay (here ImageNet-LT's 5e-4).
#
# Data: $IMAGENET as in table2_imagenet_lt.sh. make_lt.py writes the authors' halves into overlap_source/ and so on.
# Not run here. It should take 1 hour on 8 A100: images x epochs at 16,621 images/s and, in stage 2, 21,744 (three times
# TF32 training because it only runs forward), if images load fast enough (results/bench.md).
# If you run it again it resumes, and keeps what is finished. SMOKE=1 tries every line in miniature.
set -euo pipefail
cd "$(dirname "$0")/.."
IMAGENET=${IMAGENET:-/path/to/imagenet} GPUS=${GPUS:-8} SEED=${SEED:-0} ALPHAS=${ALPHAS:-lt0 lt2 lt4 lt6 lt8 lt}
if [ "${SMOKE:-}" ]; then . recipes/smoke.sh; fi
torchrun="torchrun --nproc_per_node=$GPUS" runs=runs/seed$SEED

python make_lt.py --dataset imagenet --data $IMAGENET

heads=
for alpha in $ALPHAS; do
    list=overlap_source/train_$alpha.txt; [ $alpha != lt ] || list=overlap_source/ImageNet_LT_train.txt
    run=$runs/imagenet-overlap-$alpha-ce
    $torchrun train_rep.py --loss ce --data $IMAGENET --list $list --amp --compile --seed $SEED \
        --out $run                                                                                          # 0.1 h
    $torchrun train_linear.py $run/backbone.pt --protocol rep --lr 0.1 --seed $SEED \
        --list overlap_target/train_full.txt --out $run/target                                              # 0.1 h
    heads+=" $run/target/head.pt"
done
$torchrun evaluate.py $heads
