#!/bin/bash
# Submit the whole pretraining, encode → stage 1 → stage 2 (→ stage 3), each started only once the one before has succeeded.
#
#   INPUT=/tars OUTPUT=/shards bash slurm/schedule.sh    on the login node, not through sbatch
#   bash slurm/schedule.sh                               without INPUT: the shards are there, only the stages
#
# Before anything is submitted, the configs are looked at, and whether each stage can go on from the one before. A job that
# goes back into the queue keeps its place in the chain.
#
#   INPUT OUTPUT ENCODERS RESOLUTIONS …  as in encode.sh; the stages train on OUTPUT
#   ENCODE_OPTIONS                       further options of data_prep/encode.py
#   STAGE1 STAGE2                        the stages' configs                        stage1_256 stage2_512
#   STAGE3                               a third stage's config                     none; stage3_finetune
#   STAGE1_OVERRIDES STAGE2_OVERRIDES STAGE3_OVERRIDES                              section.key=value, blanks between
#   ENCODE_SBATCH                        sbatch options of the encoding             none; 8 workers: --array=0-7
#   TRAIN_SBATCH                         sbatch options of the stages               none, as --partition=P --time=T
#   PYTHON                               the interpreter
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/common.sh
[[ -z ${INPUT:-}${SOURCES:-} || -n ${OUTPUT:-} ]] ||
    refuse "${INPUT:+INPUT}${SOURCES:+SOURCES} is set but OUTPUT is not: the folder for the shards"
[[ -z ${RUN_DIR:-}${OVERRIDES:-} ]] ||
    refuse "RUN_DIR and OVERRIDES would go to all stages: use STAGE1_OVERRIDES and STAGE2_OVERRIDES (run_dir=… too)"
[[ -n ${STAGE3:-} || -z ${STAGE3_OVERRIDES:-} ]] || refuse "STAGE3_OVERRIDES is set but STAGE3 is not: the third stage's config"

stage1=${STAGE1:-stage1_256} overrides1=${STAGE1_OVERRIDES:-} stage2=${STAGE2:-stage2_512} overrides2=${STAGE2_OVERRIDES:-}
overrides3=${STAGE3_OVERRIDES:-}
encodes=()
if [[ -n ${INPUT:-}${SOURCES:-} ]]; then
    encodes=(--encodes "$OUTPUT" "${RESOLUTIONS:-256 512}" " ${ENCODE_OPTIONS:-}") # a blank: options begin with dashes
    overrides1="data.path=$OUTPUT $overrides1" overrides2="data.path=$OUTPUT $overrides2"
    overrides3="data.path=$OUTPUT $overrides3"
fi
# What a stage would find out once it has its nodes, after days, is said here; the reasons stand above.
"$PYTHON" -m pretrain.chain "$stage1" "$overrides1" "$stage2" "$overrides2" ${STAGE3:+"$STAGE3" "$overrides3"} \
    "${encodes[@]}" ||
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
[[ -z ${STAGE3:-} ]] || CONFIG=$STAGE3 OVERRIDES=$overrides3 submit "${WORDS[@]}" slurm/stage3_finetune.sh

joined=$(IFS=,; echo "${ids[*]}")
echo "watch:  squeue --jobs=$joined; tail -f logs/*-<job>*.out"
echo "cancel: scancel ${ids[*]}"
