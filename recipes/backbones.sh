# places.sh and detection.sh source this file. It has the settings that they share and trains their six backbones, which
# table2_imagenet_lt.sh and table6_imagenet.sh train too.
set -euo pipefail
cd "$(dirname "$0")/.."
IMAGENET=${IMAGENET:-/path/to/imagenet} GPUS=${GPUS:-8} SEED=${SEED:-0}
if [ "${SMOKE:-}" ]; then . recipes/smoke.sh; fi
torchrun="torchrun --nproc_per_node=$GPUS" runs=runs/seed$SEED

backbones() {  # trains those that do not exist yet
    local flags="--data $IMAGENET --amp --compile --seed $SEED"
    local lt="$flags --list ImageNet_LT_train.txt" full="$flags --list train_full.txt --weight-decay 1e-4" loss
    python make_lt.py --dataset imagenet --data $IMAGENET
    for loss in ce cl kcl; do
        $torchrun train_rep.py --loss $loss $lt   --out $runs/imagenet-lt-$loss                     # 0.2, 0.5, 0.5 h
        $torchrun train_rep.py --loss $loss $full --out $runs/imagenet-$loss                        # 1.9, 5.6, 5.6 h
    done
}
