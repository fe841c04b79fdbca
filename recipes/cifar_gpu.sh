#!/usr/bin/env bash
# CIFAR-10-LT with imbalance 100 in one sitting on one GPU, what matters most first: CE and KCL with three seeds, KCL
# inside the batch by the published protocol (cifar_lt.sh says what that is), then the other methods.
#   bash recipes/cifar_gpu.sh                   # the data as cifar_lt.sh finds it
#   bash recipes/cifar_gpu.sh cifar10.tar.xz    # unpacks an archive of train/<class>/ and test/<class>/ first
#   LIMIT=540 bash recipes/cifar_gpu.sh         # stops after 9 minutes; the same line resumes
#   EPOCHS=1 bash recipes/cifar_gpu.sh          # tries it, on a CPU too
# The outputs, which say steps/s, and every log.jsonl and eval.json go into cifar.tgz. Not run on a GPU yet.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" ] && [ ! -d data/cifar10 ]; then
    mkdir -p data/cifar10
    tar -xf "$1" -C data/cifar10
fi
trap 'find runs -path "*seed*/cifar10*" -regex ".*\(txt\|jsonl\|eval.json\)" | tar -czf ${OUT:-.}/cifar.tgz -T -' EXIT

export DATASETS=cifar10 IMBALANCES=100
part() {  # the METHODS with the SEEDS, in what is left of LIMIT
    left=$((${LIMIT:-1000000} - SECONDS))
    [ $left -gt 0 ] || exit 124
    METHODS=$1 SEEDS=$2 timeout $left bash recipes/cifar_lt.sh
}
part "ce kcl" "${SEEDS:-0 1 2}"
part published 0
part "ldam-drw supcon kcl-batch" "${SEEDS:-0 1 2}"
