#!/bin/bash
# Evaluate a run: draw pictures of prompts and judge them by metrics, or follow its training. The tasks share the pictures;
# submit it again after a stop: only what is missing is drawn and judged.
#
#   RUN=runs/stage2_512 PROMPTS=prompts.txt METRICS="fid clipscore" OUT=evaluations/stage2 sbatch slurm/evaluate.sh
#   RUN=… PROMPTS=… METRICS=… OUT=… sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/evaluate.sh     on 16 GPUs
#   EVERY=5000 RUN=… PROMPTS=… METRICS=… OUT=… sbatch --time=3-00:00:00 slurm/evaluate.sh       beside the training
#   RUN=… PROMPTS=… METRICS=… OUT=… bash slurm/evaluate.sh                        here, as one process
#
# With EVERY it evaluates each checkpoint of the run whose step is a multiple of EVERY once, into OUT/step_XXXXXXXX, and ends
# when the training is complete or its time is over. It reads the checkpoints only. It starts once the run has begun: to submit
# it with the training, --dependency=after:JOB+10, ten minutes after that job's start.
#
#   RUN           run directory, or its name under runs/     required
#   PROMPTS       file of prompts, .txt or .jsonl            required
#   METRICS       their names, blanks between                required
#   OUT           folder for pictures and results            required
#   EVERY         steps between the checkpoints to evaluate  none: the newest alone
#   OVERRIDES     further options of pretrain.evaluate       none
#   MAX_REQUEUES  how often a killed task is tried again     3
#   PYTHON        the interpreter                            .venv/bin/python where there is one, else python3
#SBATCH --job-name=evaluate
#SBATCH --output=logs/%x-%j.out
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --requeue
#SBATCH --open-mode=append
[[ -f slurm/common.sh ]] || { echo "error: no slurm/common.sh in $PWD: submit from the repository's root" >&2; exit 2; }
source slurm/common.sh
[[ -n ${RUN:-} ]] || refuse "RUN is not set: the run directory"
[[ -n ${PROMPTS:-} ]] || refuse "PROMPTS is not set: the file of prompts"
[[ -n ${METRICS:-} ]] || refuse "METRICS is not set: the metrics' names, blanks between"
[[ -n ${OUT:-} ]] || refuse "OUT is not set: the folder for pictures and results"

words "$METRICS" && metrics=("${WORDS[@]}")
words "${OVERRIDES:-}"
command=("$PYTHON" -m pretrain.evaluate --run "$RUN" --prompts "$PROMPTS" --metrics "${metrics[@]}" --out "$OUT"
    ${EVERY:+--every "$EVERY"} "${WORDS[@]}")
[[ -n ${SLURM_JOB_NODELIST:-} ]] || exec "${command[@]}"
MAX_REQUEUES=${MAX_REQUEUES:-3}
launch "${command[@]}"
