#!/usr/bin/env bash
# Places365 (Table 1 for representations of ImageNet-LT, Table 10 for those of full ImageNet): cross-domain
# generalisation, measured by a linear classifier. Its top-1 in the paper's text: from ImageNet-LT CL is 2.74 above
# CE, and from ImageNet the two are level.
#
# Data: $IMAGENET as in table2_imagenet_lt.sh, and $PLACES has Places365-Standard in the easy format,
# train/<class>/*.jpg and val/<class>/*.jpg. val/ becomes the test list. make_lt.py holds out 20 training images per
# class as the validation list.
# Not run here. It should take 10 hours on 8 A100, and 14 more if the six backbones do not exist yet: images x epochs at
# 16,621 images/s (CE), 12,404 (CL, KCL) and 21,744 (stage 2, three times TF32 training because it only runs forward),
# if images load fast enough (results/bench.md).
# If you run it again it resumes, and keeps what is finished. SMOKE=1 tries every line in miniature.
PLACES=${PLACES:-/path/to/places365}
. "$(dirname "$0")/backbones.sh"

python make_lt.py --dataset places365 --data $PLACES
backbones

# the paper gives no learning rate for Places, so the validation list chooses among eight
for run in $runs/imagenet-{lt-,}{ce,cl,kcl}; do
    # CE's stage 2 has the weight decay of its stage 1, as in table6_imagenet.sh
    decay=; [ $run != $runs/imagenet-ce ] || decay="--weight-decay 1e-4"
    $torchrun train_linear.py $run/backbone.pt --protocol rep --dataset places365 --data $PLACES $decay --seed $SEED \
        --out $run/places365                                                                # CE 0.2 h, CL and KCL 2.5 h
done
$torchrun evaluate.py $runs/imagenet-lt-{ce,cl,kcl}/places365/head.pt    # Table 1
$torchrun evaluate.py $runs/imagenet-{ce,cl,kcl}/places365/head.pt       # Table 10
