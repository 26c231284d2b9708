#!/bin/bash
# Run a study's trainings as an array: each task does one training, and all pictures and metrics that are drawn from it.
#
#   STUDY=table3 SCALE=small sbatch --array=0-8 slurm/ablate.sh       the numbers: python -m pretrain.ablate table3 --scale small --list
#   STUDY=table3 SCALE=small bash slurm/ablate.sh                     here, one after the other; and afterwards, the whole table
#
# Submit it again after a stop: what is done is not done again, and a training goes on from its newest checkpoint. Each task
# writes OUT/table.md of what is done by then.
#
#   STUDY      a name of pretrain.ablate's              required
#   SCALE      tiny, small, …                           tiny
#   OUT        folder for runs, results and table       runs/STUDY_SCALE
#   OVERRIDES  further options of pretrain.ablate       none
#   PYTHON     the interpreter                          .venv/bin/python where there is one, else python3
#SBATCH --job-name=ablate
#SBATCH --output=logs/%x-%A_%a.out
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --open-mode=append
[[ -f slurm/common.sh ]] || { echo "error: no slurm/common.sh in $PWD: submit from the repository's root" >&2; exit 2; }
source slurm/common.sh
[[ -n ${STUDY:-} ]] || refuse "STUDY is not set: a study of pretrain.ablate, such as table3"

words "${OVERRIDES:-}"
exec "$PYTHON" -m pretrain.ablate "$STUDY" --scale "${SCALE:-tiny}" ${OUT:+--out "$OUT"} \
    ${SLURM_ARRAY_TASK_ID:+--cell "$SLURM_ARRAY_TASK_ID"} --processes "${SLURM_GPUS_ON_NODE:-1}" "${WORDS[@]}"
