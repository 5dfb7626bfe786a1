# shellcheck shell=bash disable=SC2034
# What the SLURM files share: the devices are those of the job, and codistill-launch runs inside it (--on slurm).
# Source it last; it takes the place of place_devices, logged and train_plain.
#
# The nodes of the job are dealt out to the models in equal parts (--arm codistill), or are all one model's (the other
# arms); a task is a device. A job that is submitted again goes on from the checkpoints in its folder. A node that
# dies ends the step of its model only: the job is asked to stay (--no-kill), and the other models go on without it.
#
# BASE_PORT: first port that the ranks listen on, on every node; default: one that depends on the number of the job.

DEVICES_OF_SETTINGS=$NUM_DEVICES # before any option is read

# place_devices ARM: NUM_DEVICES, those of one model.
place_devices() {
    local steps=1 nodes
    [[ "$NUM_DEVICES" == "$DEVICES_OF_SETTINGS" ]] ||
        die "--devices is $NUM_DEVICES, but the devices are those of the job; give sbatch --nodes and --ntasks-per-node"
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    : "${SLURM_NTASKS_PER_NODE:?give sbatch --ntasks-per-node, the devices of a node}"
    if [[ "$1" == codistill ]]; then steps=$NUM_MODELS; fi
    [[ ${#nodes[@]} -gt 0 && $((${#nodes[@]} % steps)) -eq 0 ]] ||
        die "--models is $NUM_MODELS, but the job has ${#nodes[@]} node(s); give sbatch a number of nodes that divides by it"
    NUM_DEVICES=$((SLURM_NTASKS_PER_NODE * (${#nodes[@]} / steps)))
    if [[ "$1" == all_reduce ]]; then # on the devices of all models together
        [[ $((NUM_DEVICES % NUM_MODELS)) -eq 0 ]] ||
            die "--models is $NUM_MODELS, but the job has $NUM_DEVICES devices; their number must divide by it"
        NUM_DEVICES=$((NUM_DEVICES / NUM_MODELS))
    fi
}

# logged DIR codistill-launch ARGUMENTS...: the launch takes the place of this script, so that the signal before the end of
# the job's time is its own. Keys and model-I.log are in DIR.
logged() {
    local where=(--on slurm --devices-per-node "$SLURM_NTASKS_PER_NODE" --run-dir "$1" --log-dir "$1")
    [[ -z "${BASE_PORT:-}" ]] || where+=(--base-port "$BASE_PORT")
    [[ "${FAIL_FAST:-0}" == 0 ]] || where+=(--fail-fast)
    if is_dry_run; then where+=("${DRY_RUN_FLAGS[@]}" "${PLAN[@]}"); fi
    exec codistill-launch "${where[@]}" "${@:3}"
}

train_plain() { train_codistilled 1 1 "$@"; }
