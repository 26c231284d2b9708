#!/bin/bash
# Submit the whole pretraining, encode → stage 1 → stage 2, each started only once the one before has succeeded.
#
#   INPUT=/tars OUTPUT=/shards bash slurm/schedule.sh    on the login node, not through sbatch
#   bash slurm/schedule.sh                               without INPUT: the shards are there, only the two stages
#
# Before anything is submitted, both configs are looked at, and whether stage 2 can go on from stage 1. A job that goes back
# into the queue keeps its place in the chain.
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

stage1=${STAGE1:-stage1_256} overrides1=${STAGE1_OVERRIDES:-} stage2=${STAGE2:-stage2_512} overrides2=${STAGE2_OVERRIDES:-}
encodes=()
if [[ -n ${INPUT:-}${SOURCES:-} ]]; then
    encodes=(--encodes "$OUTPUT" "${RESOLUTIONS:-256 512}")
    overrides1="data.path=$OUTPUT $overrides1" overrides2="data.path=$OUTPUT $overrides2"
fi
# What a stage would find out once it has its nodes, stage 2 after days, is said here; the reasons stand above.
"$PYTHON" -m pretrain.chain "$stage1" "$overrides1" "$stage2" "$overrides2" "${encodes[@]}" ||
    refuse "the stages do not fit: nothing is submitted"

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

if ((${#encodes[@]} > 0)); then
    words "${ENCODE_SBATCH:-}"
    OVERRIDES=${ENCODE_OPTIONS:-} submit --array=0-7 "${WORDS[@]}" slurm/encode.sh
fi
words "${TRAIN_SBATCH:-}"
CONFIG=$stage1 OVERRIDES=$overrides1 submit "${WORDS[@]}" slurm/stage1_256.sh
CONFIG=$stage2 OVERRIDES=$overrides2 submit "${WORDS[@]}" slurm/stage2_512.sh

joined=$(IFS=,; echo "${ids[*]}")
echo "watch:  squeue --jobs=$joined; tail -f logs/*-<job>*.out"
echo "cancel: scancel ${ids[*]}"
