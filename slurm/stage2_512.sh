#!/bin/bash
# Stage 2: 512 px, from the weights of stage 1, global batch 1280.
#
#   sbatch slurm/stage2_512.sh                              from the repository's root; log: logs/stage2_512-JOB.out
#   sbatch --nodes=2 --account=A slurm/stage2_512.sh        any option of sbatch wins over the header below
#   CONFIG=demo_512 sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=0 slurm/stage2_512.sh      on CPUs, tiny
#
# Expected cost: the paper gives 156 A100-days for both stages; a third of the tokens are this stage's:
# some 52 A100-days, about 2 days on 32 of them.
#
# It stops with a checkpoint 300 s before the time limit, on scancel --signal=USR1 JOB, and when Slurm preempts it. Then,
# and after a task that hung or was killed, the job goes back into the queue by itself and on from the newest checkpoint.
#
#   CONFIG        a stage's name, or a YAML file's path  stage2_512
#   RUN_DIR       checkpoints and TensorBoard logs      the config's run_dir
#   OVERRIDES     section.key=value, blanks between     none
#   MAX_REQUEUES  how often it does so, at most         100
#   PYTHON        the interpreter                       .venv/bin/python where there is one, else python3
#SBATCH --job-name=stage2_512
#SBATCH --output=logs/%x-%j.out
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
[[ -f slurm/common.sh ]] || { echo "error: no slurm/common.sh in $PWD: submit from the repository's root" >&2; exit 2; }
source slurm/common.sh
train "${CONFIG:-stage2_512}"
