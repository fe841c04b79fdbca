#!/usr/bin/env bash
# The main job on the embedded digits: CE against KCL on a long tail of imbalance 100, from nothing to the table.
# Installs into .venv what requirements.txt names, then takes about 5 minutes on 2 CPU cores. Run again, it keeps what
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
for loss in ce kcl; do
    run=$runs/digits-lt-$loss-seed$seed
    python train_rep.py --loss $loss --dataset digits --data $data --seed $seed $short --out $run   # stage 1
    python train_linear.py $run/backbone.pt --protocol lt --seed $seed $short     # stage 2: on the long tail (CE: cRT)
    python train_linear.py $run/backbone.pt --protocol rep --seed $seed $short    # stage 2: on the balanced set
done
# stage 3: long-tailed recognition (Tables 2, 3), then the balancedness of the feature space (Figs 2, 4)
python evaluate.py $runs/digits-lt-{ce-seed$seed/head.pt,ce-seed$seed/linear-lt/head.pt,kcl-seed$seed/linear-lt/head.pt} \
                   $runs/digits-lt-{ce,kcl}-seed$seed/linear-rep/head.pt --tau-norm --pictures $runs
