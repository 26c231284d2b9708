#!/bin/bash
# Stage 3: fine-tuning at 512 px on a small, good source, from the weights of stage 2, global batch 256.
#
#   sbatch slurm/stage3_finetune.sh                         from the repository's root; log: logs/stage3_finetune-JOB.out
#   sbatch --nodes=2 --account=A slurm/stage3_finetune.sh   any option of sbatch wins over the header below
#   CONFIG=demo_512 sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=0 slurm/stage3_finetune.sh on CPUs, tiny
#
# Expected cost, not measured: a 25th of stage 2's pictures at the same size, so some 2 A100-days, 1.6 hours on 32 of them.
#
# It stops with a checkpoint 300 s before the time limit, on scancel --signal=USR1 JOB, and when Slurm preempts it. Then,
# and after a task that hung or was killed, the job goes back into the queue by itself and on from the newest checkpoint.
#
#   CONFIG        a stage's name, or a YAML file's path  stage3_finetune
#   RUN_DIR       checkpoints and TensorBoard logs      the config's run_dir
#   OVERRIDES     section.key=value, blanks between     none
#   MAX_REQUEUES  how often it does so, at most         100
#   PYTHON        the interpreter                       .venv/bin/python where there is one, else python3
#SBATCH --job-name=stage3_finetune
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
train "${CONFIG:-stage3_finetune}"
