#!/usr/bin/env bash
# The main experiment on the embedded digits: KCL and CE on a long tail of imbalance 100, from the images to the table.
# It installs requirements.txt into .venv and then takes 2.3 to 4 minutes on 2 CPU cores. If you run it again it
# resumes. SEED=1 is a different run, with other images and another order of the classes. SMOKE=1 trains for one epoch,
# in runs/smoke.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e .venv ] || python3 -m venv .venv
.venv/bin/python -m pip install -q -r requirements.txt
python() { .venv/bin/python "$@"; }
seed=${SEED:-0} short=${SMOKE:+--epochs 1} runs=runs${SMOKE:+/smoke}
data=data/digits; [ $seed = 0 ] || data=data/digits-seed$seed
ce=$runs/digits-lt-ce-seed$seed kcl=$runs/digits-lt-kcl-seed$seed

[ -e $data ] || python make_lt.py --seed $seed --out $data
train() {
    run=$runs/digits-lt-$1-seed$seed
    python train_rep.py --loss $1 --dataset digits --data $data --seed $seed --out $run $short    # stage 1
    # stage 2 on the long tail (for CE this is cRT) and on the balanced set
    python train_linear.py $run/backbone.pt --protocol lt --seed $seed $short & local lt=$!
    python train_linear.py $run/backbone.pt --protocol rep --features cached --seed $seed $short
    wait $lt
}
# both losses train side by side, each with half of the cores. With up to three cores they share all of them, and a
# waiting thread gives up its core to the other run
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=$((cores / 2))
[ $cores -gt 3 ] || export OMP_NUM_THREADS=$cores OMP_WAIT_POLICY=passive
# CE's progress bar takes the second line of the terminal, and what CE prints goes to a file
mkdir -p $runs
TQDM_POSITION=1 train ce > $runs/ce.txt & side=$!
trap 'pkill -P $side || true' EXIT
train kcl
wait $side

heads="$ce/head.pt $ce/linear-lt/head.pt $kcl/linear-lt/head.pt"
heads+=" $ce/linear-rep-cached/head.pt $kcl/linear-rep-cached/head.pt"
python evaluate.py $heads --tau-norm --workers 0 \
    --names "CE, joint" "CE, tau-norm" "CE, cRT" KCL "balanced set: CE" "balanced set: KCL"
