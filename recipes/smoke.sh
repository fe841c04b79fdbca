# The other recipes source this file if SMOKE=1. Their commands then run as written, but in runs/smoke, in one process,
# on tiny random images in the real layouts (from stand_ins.py), and with extra flags at the end that shorten them.
[ -d runs/smoke/coco ] || python recipes/stand_ins.py runs/smoke
echo "SMOKE=1 trains on random images for one epoch, so the numbers mean nothing" >&2
project=$PWD
cd runs/smoke
IMAGENET=imagenet INAT=inat2018 PLACES=places365 VOC=VOCdevkit COCO=coco GPUS=1
ALPHAS="lt0 lt" KS=2 IMBALANCES=100  # fewer rounds of each loop

short() {  # the extra flags for a command; if a flag is passed twice, the last value wins
    case $1 in
        train_rep.py) echo --epochs 1 --arch resnet8s --batch 4 --queue 16 --virtual-gpus 1 ;;
        train_linear.py) echo --epochs 1 --batch 4 ;;
        transfer_det.py) echo --iterations 2 --batch 2 --accumulate 1 --precise-bn 1 ;;
    esac
    case $* in
        make_lt.py*cifar*) echo --dataset folder --data data/$dataset --long-tail exponential --holdout 0 ;;  # any size
        make_lt.py*|tools*) ;;
        train*cifar*) echo --batch 32 ;;  # these images are in memory and need no workers
        *) echo --workers 0 ;;
    esac
}
python() { command python "$project/$1" "${@:2}" $(short "$@"); }
torchrun() {  # without --compile, which would take minutes on a CPU
    local flags=${*:3}
    command torchrun "$1" "$project/$2" ${flags/--compile/} $(short "${@:2}")
}
