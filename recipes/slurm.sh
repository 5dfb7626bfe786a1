# shellcheck shell=bash disable=SC2034,SC2153
# What the SLURM files share: the devices are those of the job, and what train.sh gives to codistill-launch becomes job steps.
# Source it last; it takes the place of place_devices, train_vision, train_plain and train_codistilled.
#
# The nodes of the job are dealt out to the models in equal parts (--arm codistill), or are all one model's (plain and
# all_reduce); a task is a device. A job that is submitted again goes on from the checkpoints in its folder. A node that
# dies ends the step of its model only: the job is asked to stay (--no-kill), and the other models go on without it.
#
# BASE_PORT (29600): first port that the ranks listen on, on every node; that of model i before it is for the rendezvous of
# its ranks.

BASE_PORT="${BASE_PORT:-29600}"

# joined SEPARATOR WORD...
joined() {
    local IFS=$1
    shift
    echo "$*"
}

# nodes_of MODEL: its nodes, in MINE.
nodes_of() { MINE=("${NODES[@]:$1 * NODES_PER_MODEL:NODES_PER_MODEL}"); }

# place_devices ARM: NUM_DEVICES, those of one model, and which nodes are whose.
place_devices() {
    local steps=1
    mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    TASKS_PER_NODE="${SLURM_NTASKS_PER_NODE:?give sbatch --ntasks-per-node, the devices of a node}"
    if [[ "$1" == codistill ]]; then steps=$NUM_MODELS; fi
    [[ ${#NODES[@]} -gt 0 && $((${#NODES[@]} % steps)) -eq 0 ]] ||
        die "--models is $NUM_MODELS, but the job has ${#NODES[@]} node(s); give sbatch a number of nodes that divides by it"
    NODES_PER_MODEL=$((${#NODES[@]} / steps))
    NUM_DEVICES=$((NODES_PER_MODEL * TASKS_PER_NODE))
    if [[ "$1" == all_reduce ]]; then # on the devices of all models together
        [[ $((NUM_DEVICES % NUM_MODELS)) -eq 0 ]] ||
            die "--models is $NUM_MODELS, but the job has $NUM_DEVICES devices; their number must divide by it"
        NUM_DEVICES=$((NUM_DEVICES / NUM_MODELS))
    fi
}

# run_models NUM_MODELS OUT COMMAND...: a step for each model, all at once, model i in OUT/i. In COMMAND {model}, {model+K},
# {master}, {port}, {rank} and {local_rank} are filled in; what only model i gets is in MIXED, as codistill-launch takes it.
run_models() {
    local num_models=$1 out=$2 model word filled own index failed=()
    shift 2
    for ((model = 0; model < num_models; model++)); do
        nodes_of "$model"
        filled=()
        for word in "$@"; do
            word=${word//\{model\}/$model}
            word=${word//\{master\}/${MINE[0]}}
            word=${word//\{port\}/$((BASE_PORT - 1 - model))}
            while [[ "$word" =~ \{model\+([0-9]+)\} ]]; do
                word=${word//"${BASH_REMATCH[0]}"/$((model + BASH_REMATCH[1]))}
            done
            filled+=("$word")
        done
        for ((index = 0; index < ${#MIXED[@]}; index += 3)); do
            if [[ "${MIXED[index + 1]}" == "$model" ]]; then
                read -r -a own <<<"${MIXED[index + 2]}"
                filled+=("${own[@]}")
            fi
        done
        # SLURM knows a rank only inside the task, so the task fills it in.
        # shellcheck disable=SC2016 # the task expands it
        step srun --exact --kill-on-bad-exit=1 --nodes "$NODES_PER_MODEL" \
            --ntasks $((NODES_PER_MODEL * TASKS_PER_NODE)) --ntasks-per-node "$TASKS_PER_NODE" \
            --nodelist "$(joined , "${MINE[@]}")" --open-mode=append --output "$out/$model/train.%t.log" \
            bash -c 'filled=("${@//\{rank\}/$SLURM_PROCID}"); exec "${filled[@]//\{local_rank\}/$SLURM_LOCALID}"' task \
            "${filled[@]}"
    done
    for ((model = 0; model < ${#STEPS[@]}; model++)); do
        wait "${STEPS[model]}" || failed+=("$model")
    done
    [[ ${#failed[@]} -eq 0 ]] || die "models ${failed[*]} failed; their logs are in $out/MODEL/train.*.log"
}

# step COMMAND...: start it, in the background; only show it with DRY_RUN=1.
STEPS=()
step() {
    if is_dry_run; then
        printf '%q ' "$@" && echo
        return
    fi
    "$@" &
    STEPS+=($!)
}

# among_models NUM_MODELS OUT: in AMONG, the options by which models find each other, and their keys; none for one model.
among_models() {
    local num_models=$1 out=$2 model addresses=()
    AMONG=()
    if is_dry_run; then headline "$num_models model(s) of $((NODES_PER_MODEL * TASKS_PER_NODE)) devices on ${NODES[*]}"; fi
    for ((model = 0; model < num_models; model++)); do
        nodes_of "$model"
        addresses+=("$(joined + "${MINE[@]}"):$BASE_PORT")
        is_dry_run || mkdir -p "$out/$model"
    done
    [[ "$num_models" -gt 1 ]] || return 0
    is_dry_run || [[ -d "$out/keys" ]] || codistill-keys "$out/keys" --num-models "$num_models"
    AMONG=(
        --codistill-num-models "$num_models" --codistill-model-index '{model}'
        --codistill-addresses "$(joined , "${addresses[@]}")" --codistill-keys "$out/keys"
    )
}

train_vision() {
    local num_models=$1 out=$3
    shift 3
    among_models "$num_models" "$out"
    run_models "$num_models" "$out" env 'RANK={rank}' 'LOCAL_RANK={local_rank}' \
        "WORLD_SIZE=$((NODES_PER_MODEL * TASKS_PER_NODE))" 'MASTER_ADDR={master}' 'MASTER_PORT={port}' \
        "$PYTHON" -m fairseq_codistill.vision.train --seed "{model+$FIRST_SEED}" --codistill-data-seed "$SEED" --save-dir "$out/{model}" \
        --no-progress-bar "${DEVICE_SETTINGS[@]}" "$@" "${AMONG[@]}"
}

train_plain() { train_codistilled 1 1 "$@"; }

train_codistilled() {
    local num_models=$1 data=$3 out=$4 distributed=() devices=$((NODES_PER_MODEL * TASKS_PER_NODE))
    shift 4
    among_models "$num_models" "$out"
    if [[ ${#DEVICE_SETTINGS[@]} -gt 0 ]]; then # no GPU
        DEVICE_SETTINGS+=(--distributed-backend gloo --ddp-backend legacy_ddp)
    fi
    if [[ "$devices" -gt 1 ]]; then
        distributed=(
            --distributed-no-spawn --distributed-world-size "$devices" --distributed-init-method 'tcp://{master}:{port}'
            --distributed-rank '{rank}' --device-id '{local_rank}'
        )
    fi
    run_models "$num_models" "$out" fairseq-train "$data" --user-dir "$USER_DIR" --task codistill_translation \
        --criterion codistillation --seed "{model+$FIRST_SEED}" --codistill-data-seed "$SEED" --save-dir "$out/{model}" \
        "${AMONG[@]}" "${distributed[@]}" "${DEVICE_SETTINGS[@]}" "${COMMON_SETTINGS[@]}" "$@"
}
