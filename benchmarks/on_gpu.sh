#!/usr/bin/env bash
# What only a GPU can show, within half an hour, the most wanted first: from the repository's root
#
#     benchmarks/on_gpu.sh FOLDER
#
# writes a file for each step to FOLDER: figures for benchmarks/README.md, and tests. A step that fails or takes too long
# does not keep the next from running. It needs the sample at data/cifar10_subset. Set, where it is otherwise:
#   PYTHON  the Python that gitlight is installed for (default: python)
#   STEPS   which steps, by name (default: all)
set -euo pipefail
if [ $# -ne 1 ]; then
    echo "usage: benchmarks/on_gpu.sh FOLDER" >&2
    exit 2
fi
python=${PYTHON:-python}
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "no GPU that $python's torch can use; see nvidia-smi" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    [[ " ${STEPS:-$name} " == *" $name "* ]] || return 0
    timeout "$limit" "$@" >"$folder/$name.txt" 2>"$folder/$name.log" || code=$?
    echo "$name: exit code $code after $((SECONDS - start)) s" | tee -a "$folder/steps.txt"
}

step training 180 "$python" benchmarks/training.py lenet_hybrid resnet20_coarse # pairs/s, share of making pairs
step ratios 150 "$python" benchmarks/gradients.py lenet resnet20 resnet18 vit --seconds 4
step sketched 90 "$python" benchmarks/gradients.py vit_b_16_sketched vit_b_16 --seconds 4
step lenet 420 "$python" benchmarks/generators.py lenet_hybrid # dB, and the time it took
step tests 300 "$python" -m pytest -q -p no:cacheprovider tests/integration/test_gpu.py
step updates 90 "$python" benchmarks/gradients.py lenet_n4 resnet20_n4 lenet_fedavg resnet20_fedavg --seconds 3 --no-memory
step vit 400 "$python" benchmarks/generators.py vit_hybrid
