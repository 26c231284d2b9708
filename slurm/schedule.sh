#!/bin/bash
# Submit the whole pretraining, encode → stage 1 → stage 2, each started only once the one before has succeeded.
#
#   INPUT=/tars OUTPUT=/shards bash slurm/schedule.sh    on the login node, not through sbatch
#   bash slurm/schedule.sh                               without INPUT: the shards are there, only the two stages
#
#   INPUT OUTPUT ENCODERS RESOLUTIONS …  as in encode.sh; the stages train on OUTPUT
#   ENCODE_OPTIONS                       further options of data_prep/encode.py
#   STAGE1 STAGE2                        the stages' configs                        stage1_256 stage2_512
#   STAGE1_OVERRIDES STAGE2_OVERRIDES    section.key=value, blanks between
#   ENCODE_SBATCH                        sbatch options of the encoding             none; 8 workers: --array=0-7
#   TRAIN_SBATCH                         sbatch options of both stages              none, as --partition=P --time=T
#   PYTHON                               the interpreter
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/common.sh
[[ -z ${INPUT:-}${SOURCES:-} || -n ${OUTPUT:-} ]] ||
    refuse "${INPUT:+INPUT}${SOURCES:+SOURCES} is set but OUTPUT is not: the folder for the shards"
[[ -z ${RUN_DIR:-}${OVERRIDES:-} ]] ||
    refuse "RUN_DIR and OVERRIDES would go to both stages: use STAGE1_OVERRIDES and STAGE2_OVERRIDES (run_dir=… too)"

ids=()
submit() { # SBATCH_OPTION... SCRIPT, after the job submitted last
    local after=() id
    ((${#ids[@]} == 0)) || after=("--dependency=afterok:${ids[-1]}" --kill-on-invalid-dep=yes)
    if ! id=$(sbatch --parsable "${after[@]}" "$@"); then # a chain is submitted whole or not at all
        ((${#ids[@]} == 0)) || scancel "${ids[@]}"
        exit 1
    fi
    ids+=("${id%%;*}") # from id;cluster
    echo "${ids[-1]}  ${*: -1}${after[0]:+  ${after[0]}}"
}

if [[ -n ${INPUT:-}${SOURCES:-} ]]; then
    words "${ENCODE_SBATCH:-}"
    data=data.path=$OUTPUT
    OVERRIDES=${ENCODE_OPTIONS:-} submit --array=0-7 "${WORDS[@]}" slurm/encode.sh
fi
words "${TRAIN_SBATCH:-}"
CONFIG=${STAGE1:-stage1_256} OVERRIDES="${data:-} ${STAGE1_OVERRIDES:-}" submit "${WORDS[@]}" slurm/stage1_256.sh
CONFIG=${STAGE2:-stage2_512} OVERRIDES="${data:-} ${STAGE2_OVERRIDES:-}" submit "${WORDS[@]}" slurm/stage2_512.sh

joined=$(IFS=,; echo "${ids[*]}")
echo "watch:  squeue --jobs=$joined; tail -f logs/*-<job>*.out"
echo "cancel: scancel ${ids[*]}"
