#!/bin/bash
# Run a sweep as a Slurm job array, without Ray. Each task trains one group of the study's runs on a stream of its own,
# and the last to finish gathers all groups and draws the report. All tasks must share a file system.
#
#     N_GROUPS=8 sbatch --array=0-7 examples/slurm_sweep.sh experiment1 --lm gpt2 --tokens tokens --out runs/exp1
#
# The size of the array must equal N_GROUPS, and must be the same in every submission of a study, because its runs are
# divided into groups once. To resume after tasks have ended for whatever reason, submit the same command again: tasks
# whose group has finished have nothing to do. With --tokens the text is tokenised once: the first task writes the token
# blocks, and the others wait for them. Alternatively use a store that `prolu harvest` has written.

#SBATCH --job-name=prolu
#SBATCH --array=0-7
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
# A task that is preempted is queued again by Slurm itself.
#SBATCH --requeue
#SBATCH --open-mode=append
# Slurm sends SIGTERM 120 s before the time limit. prolu then finishes its step, writes a checkpoint and ends.
#SBATCH --signal=TERM@120

# The shell gets the signal too. It must live on, to see how prolu ended.
trap : TERM

# The number of threads decides the last bits of results, so all tasks use the same.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" prolu sweep "$@" \
    --group "$SLURM_ARRAY_TASK_ID/${N_GROUPS:-8}" --threads "$SLURM_CPUS_PER_TASK"
code=$?

# Exit code 130: interrupted, with a checkpoint. Queued again, the task resumes from it, to the same bits.
if [ "$code" = 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
