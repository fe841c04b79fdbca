#!/usr/bin/env bash
# The main job on the embedded digits: CE against KCL on a long tail of imbalance 100, from nothing to the table.
# Installs into .venv what requirements.txt names, then takes about 2 minutes on 2 CPU cores. Run again, it keeps what
# stage 1 has done. SEED=1 is another run: other images, another order of the classes, other initial weights.
# SMOKE=1 trains for one epoch only, in runs/smoke, to see every step work.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e .venv ] || python3 -m venv .venv
.venv/bin/python -m pip install -q -r requirements.txt
python() { .venv/bin/python "$@"; }
seed=${SEED:-0} short=${SMOKE:+--epochs 1} runs=runs${SMOKE:+/smoke}
data=data/digits; [ $seed = 0 ] || data=data/digits-seed$seed

[ -e $data ] || python make_lt.py --seed $seed --out $data
train() {
    run=$runs/digits-lt-$1-seed$seed
    python train_rep.py --loss $1 --dataset digits --data $data --seed $seed $short --out $run   # stage 1
    python train_linear.py $run/backbone.pt --protocol lt --seed $seed $short    # stage 2: on the long tail (CE: cRT)
    # stage 2: on the balanced set; cached: each image encoded once, where the paper augments it anew in each epoch
    python train_linear.py $run/backbone.pt --protocol rep --features cached --seed $seed $short
}
# the two side by side, half of the cores each; CE's output goes to a file
mkdir -p $runs
export OMP_NUM_THREADS=$(python -c 'import os; print(max(1, os.cpu_count() // 2))')
echo "CE trains beside KCL and writes to $runs/ce.txt"
train ce > $runs/ce.txt 2>&1 & ce=$!
trap 'kill $ce 2> /dev/null || true' EXIT
train kcl
wait $ce || { tail -n 3 $runs/ce.txt >&2; exit 1; }
unset OMP_NUM_THREADS
# stage 3: long-tailed recognition (Tables 2, 3), then the balancedness of the feature space (Figs 2, 4)
python evaluate.py $runs/digits-lt-{ce-seed$seed/head.pt,ce-seed$seed/linear-lt/head.pt,kcl-seed$seed/linear-lt/head.pt} \
                   $runs/digits-lt-{ce,kcl}-seed$seed/linear-rep-cached/head.pt --tau-norm --pictures $runs
