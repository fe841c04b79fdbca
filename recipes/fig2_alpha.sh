#!/usr/bin/env bash
# Fig. 2: accuracy and balancedness of CE and CL, trained on longer and longer tails from LT0 (balanced) to LT, with
# classifiers trained on the balanced set. The paper shows a picture without numbers. Look for this: CE's accuracy and
# balancedness fall with alpha, and CL's do not.
#
# Data: $IMAGENET as in table2_imagenet_lt.sh. make_lt.py writes the lists of App. B. The formula gives LT0 116 images
# per class, but the authors' table has 115; make_lt.py --lt0 authors makes that list.
# Not run here. It should take 15 hours on 8 A100: images x epochs at 16,621 images/s (CE), 12,404 (CL) and 21,744
# (stage 2, three times TF32 training because it only runs forward), if images load fast enough (results/bench.md).
# If you run it again it resumes, and keeps what is finished. SMOKE=1 tries every line in miniature.
set -euo pipefail
cd "$(dirname "$0")/.."
IMAGENET=${IMAGENET:-/path/to/imagenet} GPUS=${GPUS:-8} SEED=${SEED:-0} ALPHAS=${ALPHAS:-lt0 lt2 lt4 lt6 lt8 lt}
if [ "${SMOKE:-}" ]; then . recipes/smoke.sh; fi
torchrun="torchrun --nproc_per_node=$GPUS" runs=runs/seed$SEED

python make_lt.py --dataset imagenet --data $IMAGENET

heads=
for alpha in $ALPHAS; do
    list=train_$alpha.txt; [ $alpha != lt ] || list=ImageNet_LT_train.txt
    for loss in ce cl; do
        run=$runs/imagenet-$alpha-$loss
        lr=30; [ $loss != ce ] || lr=0.1
        $torchrun train_rep.py --loss $loss --data $IMAGENET --list $list --amp --compile --seed $SEED \
            --out $run                                                                                  # 0.2 h, 0.5 h
        $torchrun train_linear.py $run/backbone.pt --protocol rep --lr $lr --seed $SEED             # 0.2 h, 1.6 h
        heads+=" $run/linear-rep/head.pt"
    done
done
$torchrun evaluate.py $heads
python tools/plots.py $heads --out $runs/fig2
