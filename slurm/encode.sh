#!/bin/bash
# Encode image-text tars into MDS shards: each task of the job array is one worker, with one GPU.
#
#   INPUT=/tars OUTPUT=/shards sbatch --array=0-63 slurm/encode.sh    from the repository's root; 64 workers
#   INPUT=/tars OUTPUT=/shards bash slurm/encode.sh                   here, as worker 0 of 1
#   WORKERS=64 INPUT=… OUTPUT=… sbatch --array=7,12 slurm/encode.sh   workers 7 and 12 of 64 once more
#
#   INPUT        a folder of tars, or a pattern of them               required
#   OUTPUT       where the shards go                                  required
#   ENCODERS     text and image encoder                               flan-t5-xxl+mochi
#   RESOLUTIONS  in pixels, blanks between                            256 512
#   OVERRIDES    further options of data_prep/encode.py               none
#   WORKERS      how many there are, if not as many as array tasks    the array's size
#   PYTHON       the interpreter                                      .venv/bin/python where there is one, else python3
#SBATCH --job-name=encode
#SBATCH --output=logs/%x-%A_%a.out
#SBATCH --array=0
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --requeue
#SBATCH --open-mode=append
[[ -f slurm/common.sh ]] || { echo "error: no slurm/common.sh in $PWD: submit from the repository's root" >&2; exit 2; }
source slurm/common.sh
[[ -n ${INPUT:-} ]] || refuse "INPUT is not set: the folder of the tars, or a pattern of them"
[[ -n ${OUTPUT:-} ]] || refuse "OUTPUT is not set: the folder for the shards"

if [[ -n ${WORKERS:-} ]]; then
    worker=${SLURM_ARRAY_TASK_ID:-0}
    ((worker < WORKERS)) || refuse "array task $worker is none of the workers 0 to $((WORKERS - 1))"
elif [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    worker=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP))
    WORKERS=$SLURM_ARRAY_TASK_COUNT
    ((WORKERS == (SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP + 1)) ||
        refuse "the array has gaps ($WORKERS tasks from $SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX):" \
            "close them, or say how many workers there are in all (WORKERS=…)"
else
    worker=0 WORKERS=1
fi

words "${RESOLUTIONS:-256 512}" && resolutions=("${WORDS[@]}")
words "${OVERRIDES:-}"
exec "$PYTHON" data_prep/encode.py --input "$INPUT" --output "$OUTPUT" --encoders "${ENCODERS:-flan-t5-xxl+mochi}" \
    --resolutions "${resolutions[@]}" --worker "$worker" --workers "$WORKERS" "${WORDS[@]}"
