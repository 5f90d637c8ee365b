#!/usr/bin/env bash
# Trains on the nodes of a Slurm job and requeues the job after every interruption until the run has finished:
#
#   sbatch scripts/train_slurm.sh configs/deepseek_v3_base.yaml [more options of `dsv3 train`]
#
# Submit it from the root of the checkout, in a file system that all nodes share. The options below are defaults;
# options on the command line of sbatch override them: sbatch --nodes=16 --time=12:00:00 scripts/train_slurm.sh ...
#
# Environment variables: DSV3_MAX_RESTARTS (default 20), PYTHON (default .venv/bin/python where it exists, or python3).
# Writes to slurm_jobs/<job>/: environment_<start>.txt, and node_<n>/ with the logs of the ranks of each node.
#
#SBATCH --job-name=deepseek_v3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

say() { echo "[Slurm] $*"; }
refuse() {
    echo "error: $*" >&2
    exit 2
}

check_arguments() {
    local usage="sbatch scripts/train_slurm.sh CONFIG.yaml [more options of dsv3 train]"
    [[ -n ${SLURM_JOB_ID:-} ]] || refuse "this is no Slurm job; start it with: $usage"
    [[ -f src/training/train.py ]] || refuse "$PWD: holds no src/training/train.py; submit from the checkout's root"
    [[ $# -ge 1 && $1 != -* ]] || refuse "the config is missing; expected: $usage"
    [[ -f $1 ]] || refuse "$1: no such config; expected: $usage"
    [[ $max_restarts =~ ^[0-9]+$ ]] || refuse "DSV3_MAX_RESTARTS = $max_restarts: expected a number"
    local option
    for option in "${@:2}"; do
        [[ ! $option =~ ^--(config|resume)(=|$) ]] || refuse "$option: is set by this script; leave it out"
    done
}

# Prints what is needed to understand or repeat this start. Variables that may hold secrets are left out.
describe_environment() {
    date --iso-8601=seconds
    echo "job $SLURM_JOB_ID, start $restarts, nodes $SLURM_JOB_NODELIST, command: $*"
    echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
    git status --short 2>/dev/null || true
    "$python" -VV
    "$python" -m pip freeze 2>/dev/null || true
    env | grep -E '^(CUDA|DSV3|GLOO|LD_LIBRARY_PATH|NCCL|NVIDIA|OMP|PATH|PYTHON|PYTORCH|SLURM|TORCH|UCX)' |
        grep -viE '^[^=]*(auth|cookie|credential|jwt|key|passw|secret|token)' | sort
}

# Runs a command, then writes its exit code to a file: `wait` loses the code of a process that ends while a signal is
# handled (bash 5.2 gives 255).
run_and_write_code() {
    local file=$1 code=0
    shift
    "$@" || code=$?
    echo "$code" >"$file"
}

# Waits through any signals for a `run_and_write_code` in the background, and returns the code that it has written.
wait_for_code() {
    local shell=$1 file=$2
    while kill -0 "$shell" 2>/dev/null; do wait "$shell" || true; done # a trap ends a wait, not the process
    return "$(cat "$file" 2>/dev/null || echo 1)"
}

# Runs torchrun on one node and passes the signal on to the training processes, its children.
# shellcheck disable=SC2329 # srun runs its text
run_node() {
    trap '' USR1 # Slurm sends it to every process; torchrun, and a process without a handler yet, would die
    local folder=$1 endpoint=$2 python=$3 agent
    shift 3
    local here="$folder/node_${SLURM_NODEID}"
    mkdir -p "$here"
    rm -f "$here/exit_code"
    local gpus=${SLURM_GPUS_ON_NODE:-}
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi >"$here/nvidia-smi.txt" 2>&1 || true
        gpus=${gpus:-$(nvidia-smi --list-gpus | wc -l)}
    fi
    export PYTHONUNBUFFERED=1  # else output is buffered in torchrun and lost when it is killed
    run_and_write_code "$here/exit_code" \
        "$python" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${gpus:-1}" \
        --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$SLURM_JOB_ID" --max-restarts=0 \
        --log-dir="$here" --tee=3 src/training/train.py "$@" &
    agent=$!
    trap 'pkill -USR1 -P "$(pgrep -P "$agent")" 2>/dev/null || true' USR1
    wait_for_code "$agent" "$here/exit_code"
}

run_nodes() {
    local host port
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    host=${host%%$'\n'*}
    port=$((20000 + SLURM_JOB_ID % 10000))
    rm -f "$folder/exit_code"
    run_and_write_code "$folder/exit_code" srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
        bash -c "$(declare -f run_and_write_code wait_for_code run_node); run_node \"\$@\"" run_node \
        "$folder" "$host:$port" "$python" "$@" &
    step=$!
}

# Passes the signal on to the step at once, and again every 5 s for training processes that had no handler yet.
# shellcheck disable=SC2329 # called by a trap
pass_notice_on() {
    [[ $noticed == yes ]] || say "notice of the end: the training processes save and stop"
    noticed=yes
    [[ -z $step ]] || pkill -USR1 -P "$step" || true
    { sleep 5 && kill -USR1 $$; } >/dev/null 2>&1 &
    reminder=$!
}

# Waits for the step through any signals and returns its exit code.
wait_for_nodes() {
    local status=0
    wait_for_code "$step" "$folder/exit_code" || status=$?
    trap '' USR1
    [[ -z $reminder ]] || kill "$reminder" 2>/dev/null || true
    return "$status"
}

requeue_or_end() {
    local status=$1 state
    if [[ $status == 0 && $noticed == no ]]; then
        say "the run has finished"
        exit 0
    fi
    state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
    if [[ $state != RUNNING ]]; then
        say "Slurm has the job as $state; it is not requeued from here"
    elif ((restarts >= max_restarts)); then
        say "exit code $status; not requeued after $restarts restarts (DSV3_MAX_RESTARTS = $max_restarts)"
    else
        say "exit code $status; requeued, to resume from the newest checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}

max_restarts=${DSV3_MAX_RESTARTS:-20}
restarts=${SLURM_RESTART_COUNT:-0}
noticed=no
step=""
reminder=""
cd "${SLURM_SUBMIT_DIR:-.}"
check_arguments "$@"
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo "$PWD/.venv/bin/python" || echo python3)}
folder="$PWD/slurm_jobs/$SLURM_JOB_ID"
mkdir -p "$folder"
describe_environment "$@" >"$folder/environment_$restarts.txt"
trap pass_notice_on USR1
run_nodes --config "$1" --resume auto "${@:2}"
status=0
wait_for_nodes || status=$?
requeue_or_end "$status"
