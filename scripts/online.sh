#!/usr/bin/env bash
# Rounds of sampling, labelling and training on one node under SLURM (docs/online.md):
#     sbatch scripts/online.sh model=llama3.1-8b sae=llama3.1-8b datasets=[ultrabin] lr=null ++cache_dir=/shared/runs
#SBATCH --job-name=halos-fpo-online
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the time limit SLURM sends SIGUSR1 to this script. A run that is trained then saves its state, and
# the job is queued again, to go on where it was.
set -u

trap 'kill -USR1 "$rounds"' USR1
python train.py experiment=online "$@" &
rounds=$!
wait "$rounds"
status=$?
while kill -0 "$rounds" 2> /dev/null; do # the signal ended the wait, not the rounds
    wait "$rounds"
    status=$?
done
if [ "$status" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
