#!/usr/bin/env bash
# Train on one or several machines with torchrun. On every machine, from the repository's root:
#
#     scripts/torchrun.sh CONFIG.yaml|RUN_DIR [key.path=value ...]
#
# One machine needs nothing else: a process for each GPU is started. Set, where it is otherwise:
#   PROCESSES    processes on this machine (default: its GPUs, or 1)
#   MACHINES     number of machines (default: 1)
#   MACHINE      number of this one, from 0 (default: 0)
#   MASTER_ADDR  name or address of machine 0, which all others can reach (default: localhost)
#   MASTER_PORT  a port there that is free (default: 29400)
# The run's folder must be on a file system that all machines share. SIGTERM stops the run with a checkpoint, and torchrun
# ends all processes where one is lost; the same command with trainer.resume=auto then goes on.
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: scripts/torchrun.sh CONFIG.yaml|RUN_DIR [key.path=value ...]" >&2
    exit 2
fi
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
machines=${MACHINES:-1}
exec python -m torch.distributed.run \
    --nnodes="$machines" --node-rank="${MACHINE:-0}" --nproc-per-node="$processes" \
    --master-addr="${MASTER_ADDR:-localhost}" --master-port="${MASTER_PORT:-29400}" \
    "$(dirname "$0")/../train.py" "$@" \
    trainer.devices="$processes" trainer.num_nodes="$machines"
