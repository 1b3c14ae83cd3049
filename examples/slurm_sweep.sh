#!/bin/bash
# A sweep as a Slurm job array: each task trains one group of the study's runs on a stream of its own, and the last to
# finish gathers all groups and draws the report. All tasks share a file system. Without Ray.
#
#     N_GROUPS=8 sbatch --array=0-7 examples/slurm_sweep.sh experiment1 --lm gpt2 --tokens tokens --out runs/exp1
#
# Array and N_GROUPS say the same number, and every submission of a study says the same: its runs are dealt once. To go
# on after any end, submit the same again; tasks whose group is finished have nothing to do. With --tokens the text is
# tokenised once: the first task writes it, and the others wait for it. Or take a store that `prolu harvest` has written.

#SBATCH --job-name=prolu
#SBATCH --array=0-7
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
# A task that is taken away is queued again; Slurm does that by itself on preemption.
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM comes to prolu this long before the time is over; it writes a checkpoint after the step at hand.
#SBATCH --signal=TERM@120

# This shell lives on when it gets the signal too, to see how prolu ended.
trap : TERM

# Threads are part of what decides the last bits: all tasks have the same, by --cpus-per-task.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" prolu sweep "$@" \
    --group "$SLURM_ARRAY_TASK_ID/${N_GROUPS:-8}" --threads "$SLURM_CPUS_PER_TASK"
code=$?

# 130: interrupted, with a checkpoint. Queued again it goes on from there, to the same bits.
if [ "$code" = 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
