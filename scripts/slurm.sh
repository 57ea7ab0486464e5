#!/usr/bin/env bash
# Train with SLURM, a task for each GPU. From the repository's root, on the cluster:
#
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 scripts/slurm.sh CONFIG.yaml [key.path=value ...]
#
# Any of sbatch's options replace those below. The run's folder must be on a file system that all machines share.
# A job that SLURM starts again, after a pre-emption or the loss of a machine, continues from the end of the latest epoch.
#SBATCH --job-name=gitlight
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gitlight-%j.log
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: sbatch scripts/slurm.sh CONFIG.yaml|RUN_DIR [key.path=value ...]" >&2
    exit 2
fi
resume=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    folder=$(python -c "import sys; from gitlight import load_config; print(load_config(sys.argv[1], sys.argv[2:]).output_dir)" "$@")
    if [ -f "$folder/checkpoints/last.ckpt" ]; then
        resume=(trainer.resume=last)
    fi
fi
# One rank that ends badly ends the job: the others would wait for it.
exec srun --kill-on-bad-exit=1 python train.py "$@" \
    trainer.num_nodes="${SLURM_JOB_NUM_NODES:-1}" trainer.devices="${SLURM_NTASKS_PER_NODE:-1}" \
    trainer.strategy="${STRATEGY:-ddp}" "${resume[@]}"
