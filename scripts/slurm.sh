#!/usr/bin/env bash
# Train with SLURM, a task for each GPU. From the repository's root, on the cluster:
#
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 scripts/slurm.sh CONFIG.yaml [key.path=value ...]
#
# Any of sbatch's options replace those below. The run's folder must be on a file system that all machines share.
# Two minutes before its time is over the run writes a checkpoint, and the job goes back into the queue. A job that SLURM
# starts again, for that or after a pre-emption or the loss of a machine, continues from the last checkpoint, and so does
# the same command given again; trainer.resume=null begins afresh, once. Any other trainer.resume is obeyed at each start: give
# such a job the time that it takes. trainer.checkpoint_every_n_steps=N saves within epochs.
#SBATCH --job-name=gitlight
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@120
#SBATCH --open-mode=append
#SBATCH --output=gitlight-%j.log
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: sbatch scripts/slurm.sh CONFIG.yaml|RUN_DIR [key.path=value ...]" >&2
    exit 2
fi
settings=()
for setting in "${@:2}"; do
    # A job that SLURM starts again would throw away what it has done.
    [[ $setting == trainer.resume=null && ${SLURM_RESTART_COUNT:-0} -gt 0 ]] || settings+=("$setting")
done
# SLURM's signals are for the tasks; this shell is to see how they end.
trap : TERM USR1
# One rank that ends badly ends the job: the others would wait for it. CPUs are given again, as srun of 22.05 to 23.02
# does not take them over from sbatch.
status=0
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python train.py "$1" trainer.resume=auto \
    "${settings[@]}" trainer.num_nodes="${SLURM_JOB_NUM_NODES:-1}" trainer.devices="${SLURM_NTASKS_PER_NODE:-1}" || status=$?
# Stopped with a checkpoint: 138 by the warning, 143 by SIGTERM. After a pre-emption SLURM puts a job back by itself, but
# not one that has ended within the grace time, which would have failed.
if [ "$status" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
# Not where it is cancelled later, nor where SLURM is ending it already.
elif [ "$status" -eq 143 ] && job=$(scontrol show job "$SLURM_JOB_ID") &&
    [[ $job == *JobState=RUNNING* && $job == *PreemptTime=[0-9]* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
