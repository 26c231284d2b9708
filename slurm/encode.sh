#!/bin/bash
# Encode image-text tars into MDS shards. Every task is one worker with one GPU; they share the tars through OUTPUT, so that
# any number may run, come and go. Submit it again after a stop: only what is missing is made.
#
#   INPUT=/tars OUTPUT=/shards sbatch --array=0-63 slurm/encode.sh                    from the repository's root; 64 workers
#   INPUT=/tars OUTPUT=/shards sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 slurm/encode.sh     one job of 32
#   SOURCES=sources.yaml OUTPUT=s3://bucket/shards WORK=/shared/work sbatch --array=0-63 slurm/encode.sh
#   INPUT=/tars OUTPUT=/shards bash slurm/encode.sh                                   here, as one worker
#
#   INPUT        tars, Parquet files or a folder: a path, pattern, URL required, or
#   SOURCES      a YAML file of several named sources                 this one
#   OUTPUT       where the shards go: a folder, or a URL              required
#   WORK         with a URL as OUTPUT: a folder all workers share     none
#   ENCODERS     text and image encoder                               flan-t5-xxl+mochi
#   RESOLUTIONS  in pixels, blanks between                            256 512
#   FILTER       as "aesthetic >= 5.5 and watermark < 0.5"            none
#   OVERRIDES    further options of data_prep/encode.py               none
#   PYTHON       the interpreter                                      .venv/bin/python where there is one, else python3
#SBATCH --job-name=encode
#SBATCH --output=logs/%x-%A_%a.out
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --requeue
#SBATCH --open-mode=append
[[ -f slurm/common.sh ]] || { echo "error: no slurm/common.sh in $PWD: submit from the repository's root" >&2; exit 2; }
source slurm/common.sh
[[ -n ${INPUT:-}${SOURCES:-} ]] || refuse "INPUT is not set: the folder of the tars, or a pattern of them (or SOURCES)"
[[ -z ${INPUT:-} || -z ${SOURCES:-} ]] || refuse "INPUT and SOURCES are both set: give one of them"
[[ -n ${OUTPUT:-} ]] || refuse "OUTPUT is not set: the folder for the shards"

words "${RESOLUTIONS:-256 512}" && resolutions=("${WORDS[@]}")
words "${OVERRIDES:-}"
command=("$PYTHON" data_prep/encode.py ${INPUT:+--input "$INPUT"} ${SOURCES:+--sources "$SOURCES"} --output "$OUTPUT"
    ${WORK:+--work "$WORK"} --encoders "${ENCODERS:-flan-t5-xxl+mochi}" --resolutions "${resolutions[@]}"
    ${FILTER:+--filter "$FILTER"} "${WORDS[@]}")
((${SLURM_NTASKS:-1} > 1)) || exec "${command[@]}"
# One worker that dies shall not take the others with it: they finish what it left.
exec srun --kill-on-bad-exit=0 --export=ALL --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${command[@]}"
