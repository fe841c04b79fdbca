#!/usr/bin/env bash
# Fig. 3: how CE representations of ever longer tails, LT0 (balanced) to LT, generalise. They are trained on 500
# classes, and the classifiers on the balanced set of the 500 others. The paper has a picture without numbers. Look
# for this: top-1 and top-5 fall with alpha. The paper leaves open which of its two splits this is (here the random
# one, overlap) and the weight decay (here ImageNet-LT's 5e-4).
#
# Data: $IMAGENET as in table2_imagenet_lt.sh; make_lt.py writes the authors' halves into overlap_source/ and so on.
# 1 hour on 8 A100, estimated and not run here: images x epochs at 16,621 images/s and 21,744 (stage 2: three times
# TF32 training, since it only runs forward), if the images come as fast; results/bench.md.
# Run it again and it resumes; finished runs and classifiers are kept. SMOKE=1 tries every line in miniature.
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
