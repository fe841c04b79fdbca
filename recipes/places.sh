#!/usr/bin/env bash
# Places365 of Table 1 (representations of ImageNet-LT) and of Table 10 (of full ImageNet): cross-domain generalisation,
# by a linear classifier. The paper's text has of its top-1: CL 2.74 above CE from ImageNet-LT, level from ImageNet.
#
# Data: $IMAGENET as in table2_imagenet_lt.sh, and $PLACES: Places365-Standard in the easy format, train/<class>/*.jpg
# and val/<class>/*.jpg, the test list; make_lt.py holds out 20 training images of each class as the validation list.
# 10 hours on 8 A100, and 14 more where the six backbones are not there; estimated, not run here: images x epochs at
# 16,621 images/s (CE), 12,404 (CL, KCL) and 21,744 (stage 2: three times TF32 training, since it runs forward alone);
# results/bench.md.
# Run again, it goes on where it stopped; a finished run or classifier is kept. SMOKE=1 tries every line in small.
set -euo pipefail
cd "$(dirname "$0")/.."
IMAGENET=${IMAGENET:-/path/to/imagenet} PLACES=${PLACES:-/path/to/places365} GPUS=${GPUS:-8} SEED=${SEED:-0}
if [ "${SMOKE:-}" ]; then . recipes/smoke.sh; fi
torchrun="torchrun --nproc_per_node=$GPUS" runs=runs/seed$SEED
lt="--data $IMAGENET --list ImageNet_LT_train.txt --virtual-gpus 8 --amp --seed $SEED"
full="--data $IMAGENET --list train_full.txt --weight-decay 1e-4 --virtual-gpus 8 --amp --seed $SEED"

python make_lt.py --dataset places365 --data $PLACES
# the backbones of table2_imagenet_lt.sh and table6_imagenet.sh; those that are there already are kept
python make_lt.py --dataset imagenet --data $IMAGENET
for loss in ce cl kcl; do
    $torchrun train_rep.py --loss $loss $lt   --out $runs/imagenet-lt-$loss                         # 0.2, 0.5, 0.5 h
    $torchrun train_rep.py --loss $loss $full --out $runs/imagenet-$loss                            # 1.9, 5.6, 5.6 h
done

# the paper gives no learning rate for Places: the validation list chooses among eight
for run in $runs/imagenet-{lt-,}{ce,cl,kcl}; do
    decay=; [ $run != $runs/imagenet-ce ] || decay="--weight-decay 1e-4"    # that of its stage 1, as in table6_imagenet.sh
    $torchrun train_linear.py $run/backbone.pt --protocol rep --dataset places365 --data $PLACES $decay --seed $SEED \
        --out $run/places365                                                                # CE 0.2 h, CL and KCL 2.5 h
done
$torchrun evaluate.py $runs/imagenet-lt-{ce,cl,kcl}/places365/head.pt    # Table 1
$torchrun evaluate.py $runs/imagenet-{ce,cl,kcl}/places365/head.pt       # Table 10
