#!/usr/bin/env bash
# Several nodes under SLURM, one task for each GPU: sbatch scripts/slurm.sh loss=fpo model=gemma9b ++cache_dir=/shared/runs
#SBATCH --job-name=halos-fpo
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the time limit SLURM sends SIGUSR1: the run saves its state and stops with status 138, and the job
# is queued again, to go on where it was. A large model's state takes longer (docs/scale.md): sbatch --signal=USR1@900
set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500} OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}

srun --kill-on-bad-exit=1 python train.py "$@"
status=$?
if [ "$status" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
