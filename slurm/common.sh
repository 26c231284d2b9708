# What the scripts beside this one share: sourced by them, from the repository's root; not a job by itself.
#
#   refuse LINE     one clear line to stderr, exit code 2
#   words STRING    STRING's words into the array WORDS
#   launch COMMAND  one task a GPU over the job's nodes, with the environment that torch.distributed reads; exits
#   finish CODE     the end of the job: exit, or back into the queue
#   train CONFIG    launch the training of CONFIG with the user's RUN_DIR and OVERRIDES
# shellcheck shell=bash
set -euo pipefail

refuse() {
    echo "error: $*" >&2
    exit 2
}

words() {
    # Not an unquoted $1: a value such as data.path=/shards/* must reach the program as it stands.
    read -r -d '' -a WORDS <<<"$1" || true
}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
fi
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 # the log is live, and a crash below Python leaves a traceback

launch() {
    [[ -n ${SLURM_JOB_NODELIST:-} ]] || refuse "this starts one task a GPU with srun: submit it with sbatch"
    # mosaicml-streaming takes rank / LOCAL_WORLD_SIZE for a rank's node, and srun does not set that.
    export LOCAL_WORLD_SIZE=${SLURM_TASKS_PER_NODE%%[(,]*} # from 8(x4), or 2,1
    ((SLURM_NTASKS == LOCAL_WORLD_SIZE * SLURM_NNODES)) ||
        refuse "$SLURM_NTASKS tasks do not fit $SLURM_NNODES nodes evenly: give --nodes and --ntasks-per-node only"
    local gpus=${SLURM_GPUS_PER_NODE:-0} cpus first code=0 bind=()
    gpus=${gpus##*:} # from a100:8
    ((gpus == 0 || gpus == LOCAL_WORLD_SIZE)) ||
        refuse "$LOCAL_WORLD_SIZE tasks but $gpus GPUs a node: give --ntasks-per-node and --gpus-per-node one number"

    # Said to srun, since Slurm 22.05 and later do not hand sbatch's --cpus-per-task on to it; without one, a node's
    # CPUs are shared out, where srun would bind each task to a single one.
    cpus=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / LOCAL_WORLD_SIZE))}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    # A task's number says nothing of where its GPU is: the program binds itself to its GPU's NUMA node, among the job's CPUs
    # (pretrain/distributed/numa.py).
    ((gpus == 0)) || bind=(--cpu-bind=none)

    # The address Slurm itself uses for the node: its name need not resolve.
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    MASTER_ADDR=$(scontrol show --oneliner node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    [[ -n $MASTER_ADDR ]] || refuse "scontrol show node $first tells no NodeAddr"
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # below the ports that the kernel gives out by itself
    export MASTER_ADDR MASTER_PORT

    # A rank that dies or hangs in a collective must end the job, and say where it was.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$PWD/logs/nccl_trace_${SLURM_JOB_ID}_rank_}

    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $LOCAL_WORLD_SIZE tasks on each of" \
        "$SLURM_JOB_NODELIST, rendezvous at $MASTER_ADDR:$MASTER_PORT: $*"
    # The code of the task that fails first decides: srun tells the highest, and those it then has to kill are above all.
    export ENDED=$PWD/logs/.ended-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    trap pass_on USR1 TERM
    # --kill-on-bad-exit: without it the other tasks wait for a dead one until the time limit.
    # --export: the tasks need the variables above, whatever list sbatch's own --export had.
    # In the background: a trap waits for what runs in the foreground.
    # shellcheck disable=SC2016  # expanded by each task
    srun --kill-on-bad-exit=1 --export=ALL --label --cpus-per-task="$cpus" "${bind[@]}" bash -c '
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        trap : USR1 TERM # Slurm sends them to this shell, too: it stays to tell how the program ended
        "$@"
        code=$?
        ((code == 0)) || (set -o noclobber && echo $code >"$ENDED") 2>/dev/null
        exit $code' task "$@" &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done # a trap ends a wait
    wait "$srun" || code=$?
    [[ ! -s $ENDED ]] || code=$(<"$ENDED")
    rm -f "$ENDED"
    finish "$code"
}

running() { # true until the job is cancelled or requeued, its time is over, or a node has failed
    [[ $(patiently squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]
}

patiently() { # runs COMMAND up to five times until it succeeds: Slurm's controller may be busy, or restarting
    local i
    for i in 1 2 3 4 5; do
        ! "$@" || return 0
        ((i == 5)) || sleep $((5 * i))
    done
    return 1
}

pass_on() { # passes a signal that only this shell received on to the tasks; when the job is being ended, Slurm signals them
    # Always as USR1: on a TERM srun would kill them.
    ! running || kill -USR1 "$srun" || true
}

# The job goes back into the queue after 75, by which training says that it can go on where it stopped
# (pretrain/resilience/signals.py), and after a task that was killed. After any other code it would fail again.
finish() {
    local code=$1 restarts=${SLURM_RESTART_COUNT:-0}
    ((code == 75 || code > 128)) && running || exit "$code"
    if ((restarts >= ${MAX_REQUEUES:-100})); then
        echo "error: job $SLURM_JOB_ID ended with code $code after $restarts requeues, which is MAX_REQUEUES:" \
            "it stops here; submit it anew to go on" >&2
        exit "$code"
    fi
    echo "job $SLURM_JOB_ID ended with code $code: back into the queue"
    patiently scontrol requeue "$SLURM_JOB_ID" || true
    exit "$code" # without effect once the job is requeued
}

train() {
    words "${OVERRIDES:-}"
    launch "$PYTHON" -m pretrain.train "$1" "${WORDS[@]}" ${RUN_DIR:+"run_dir=$RUN_DIR"}
}
