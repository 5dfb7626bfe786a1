# shellcheck shell=bash
# What every recipe shares; source it first. A recipe itself holds settings and calls these functions.
#
#   SMOKE=1    a tiny run on embedded data, in a minute or two, to see that everything works
#   SCALE=small  where a recipe knows it: the same arms with a small model on small data, for two CPU cores
#   DRY_RUN=1  train nothing: show the commands and the bits they would send, without data or devices; DRY_RUN=commands: the
#              commands alone, for which no model has to be built, in a tenth of the time
#   SEED=2     other seeds: model i is initialised by 100 (SEED - 1) + i + 1, the order of the data comes from SEED (fairseq
#              alone, --arm plain of translation, orders it by the model's seed)
#   SHARE_DEVICES=1  models share the GPUs of this machine where it has too few for each to have its own (SMOKE=1 does so)
#   FAIL_FAST=1  a model that fails ends the others, which save; the paper's scripts do so, since models that trained on alone
#              would be no arm of theirs
#   VERBOSE=1  all lines of fairseq on the screen, not only the figures
#   PYTHON=... another Python than the one of .venv
set -euo pipefail

REPOSITORY="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TOOLS="$REPOSITORY/recipes/tools"
SMOKE="${SMOKE:-0}"
DRY_RUN="${DRY_RUN:-0}"
SCALE="${SCALE:-full}"
SEED="${SEED:-1}"
# A thread a process: the processes of a recipe share the cores, and threads on top would only slow each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# fairseq repeats the same deprecation warnings for every batch.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
export PYTHONUNBUFFERED=1
export PYTHONUTF8=1 # text is UTF-8 from file to file, whatever the locale is

headline() { printf '\n== %s\n' "$*"; }

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# show_help: the comment at the top of the script that was started.
show_help() {
    sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
}

# need_value FLAG COUNT: COUNT arguments are left, FLAG among them; it takes a value.
need_value() { [[ $2 -ge 2 ]] || die "$1 needs a value"; }

is_dry_run() { [[ "$DRY_RUN" != 0 ]]; }
DRY_RUN_FLAGS=(--dry-run) # of codistill-launch
if [[ "$DRY_RUN" == commands ]]; then DRY_RUN_FLAGS+=(--no-bits); fi

is_smoke() { [[ "$SMOKE" != 0 ]]; }

SHARED=() # what codistill-launch gets for these
if is_smoke || [[ "${SHARE_DEVICES:-0}" != 0 ]]; then SHARED=(--share-devices); fi
if [[ "${FAIL_FAST:-0}" != 0 ]]; then SHARED+=(--fail-fast); fi

is_small() { [[ "$SCALE" == small ]]; }
[[ "$SCALE" == full || "$SCALE" == small ]] || die "SCALE is '$SCALE'; it must be full or small"

# The scripts of the environment (fairseq-train and others) have to be found first on PATH.
if [[ -n "${PYTHON:-}" ]]; then
    found="$(command -v "$PYTHON")" || die "PYTHON is '$PYTHON'; there is no such program"
    PYTHON=$found
    PATH="$(dirname "$PYTHON"):$PATH"
elif [[ -x "$REPOSITORY/.venv/bin/python" ]]; then
    PYTHON="$REPOSITORY/.venv/bin/python"
    PATH="$REPOSITORY/.venv/bin:$PATH"
else
    PYTHON="$(command -v python3)" || die "no Python found; run 'make install' in $REPOSITORY"
fi
export PATH
"$PYTHON" -c 'import sys; sys.path[:] = filter(None, sys.path); import fairseq_codistill' 2>/dev/null || # not the folder that happens to be here
    die "fairseq_codistill is not installed for $PYTHON; run 'make install' in $REPOSITORY"

# run_module MODULE ARGUMENTS...: python -m, but of what is installed, and not of the folder that happens to be here.
run_module() {
    "$PYTHON" -c 'import runpy, sys
sys.path[:] = filter(None, sys.path)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)' "$@"
}

# check_seeds WHAT SEEDS: whole numbers, before anything has run.
check_seeds() {
    local seed
    for seed in $2; do
        [[ "$seed" =~ ^[1-9][0-9]*$ ]] || die "$1 is '$2'; it must be whole numbers from 1 on with spaces between, as \"1 2 3\""
    done
}

# need_modules EXTRA MODULE...: what the extra brings is there, or one line says how to get it, before anything has run.
need_modules() {
    local missing
    missing="$("$PYTHON" -c 'import sys; from importlib.util import find_spec as find
print(*(name for name in sys.argv[1:] if find(name) is None))' "${@:2}")"
    [[ -z "$missing" ]] || die "not installed for $PYTHON: $missing; run: $PYTHON -m pip install 'fairseq-codistill[$1]'"
}

# --cpu where there is no GPU: fairseq would ask for one. SMOKE=1 wants two: some arms have two ranks of one model, which
# cannot share.
DEVICE_SETTINGS=()
has_gpu() {
    # Asked once: importing torch takes seconds, and scripts that start scripts would ask again for every arm.
    if [[ -z "${RECIPE_HAS_GPU:-}" ]]; then
        RECIPE_HAS_GPU=no
        if "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.device_count() <= int(sys.argv[1] != "0"))' "$SMOKE"; then
            RECIPE_HAS_GPU=yes
        fi
        export RECIPE_HAS_GPU
    fi
    [[ "$RECIPE_HAS_GPU" == yes ]]
}
if ! has_gpu; then
    DEVICE_SETTINGS=(--cpu)
    # glibc would give the memory of the logits back to the system after every update, which clears it for the next one:
    # a third of the time of a small translation model. 32 MiB is the most that every version of glibc takes.
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
fi

[[ "$SEED" =~ ^[1-9][0-9]*$ ]] || die "SEED is '$SEED'; it must be a whole number from 1 on"
FIRST_SEED=$((100 * (SEED - 1) + 1)) # of model 0

PLAN=() # what codistill-launch --dry-run cannot find out by itself
FIRST_MODEL=0 # number of the first model of a run, in its folders and seeds

# to_its_end COMMAND...: run it and wait for its end, also where this script is told to end: then it is told so too.
to_its_end() {
    local child code=0 told=
    # What a shell starts in the background has SIGINT ignored for good, and a shell below it could not change that.
    "$PYTHON" -c 'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])' "$@" &
    child=$!
    trap 'told=143; kill -TERM "$child" 2>/dev/null || true' TERM
    trap 'told=130' INT # which reaches all of a terminal's foreground
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    trap - TERM INT
    if [[ -n "$told" && "$code" == 0 ]]; then code=$told; fi # it was at its end, and nothing else is to begin
    return "$code"
}

# logged DIR COMMAND...: run a training; its lines go to DIR/<model>/train.log, figures to the screen.
logged() {
    local dir=$1
    shift
    if ! is_dry_run; then
        # The launcher would keep the same lines once more, as DIR/model-0.log and so on.
        if [[ "$1" == codistill-launch ]]; then set -- "$1" --log-dir none "${SHARED[@]}" "${@:2}"; fi
        to_its_end "$PYTHON" "$TOOLS/run_logged.py" --log-dir "$dir" --first-model "$FIRST_MODEL" -- "$@"
    elif [[ "$1" == codistill-launch ]]; then
        codistill-launch "${DRY_RUN_FLAGS[@]}" "${SHARED[@]}" "${PLAN[@]}" "${@:2}"
    else
        printf '%q ' "$@" && echo
    fi
}

# settings_of DATA WORDS...: what a folder is told of its training: scale, name of the data, options, wherever OUT is.
settings_of() {
    local data=${1%/}
    shift
    printf 'SCALE=%s SMOKE=%s, data %s: %s' "$SCALE" "$SMOKE" "${data##*/}" "${*//"$OUT"/OUT}"
}

# is_trained FOLDER: some model in it has a checkpoint. FOLDER is no pattern, whatever it is called.
is_trained() {
    local file
    for file in "$1"/*/checkpoint_last.pt; do [[ ! -e "$file" ]] || return 0; done
    return 1
}

# is_finished FOLDER SETTINGS: this training is done. The script ends where one with other settings was trained there.
is_finished() {
    local folder=$1 before=
    if [[ -f "$folder/finished.txt" ]]; then
        before=$(<"$folder/finished.txt")
    elif [[ -f "$folder/settings.txt" ]] && is_trained "$folder"; then
        before=$(<"$folder/settings.txt") # begun and interrupted
    elif [[ -f "$folder/done" ]] || [[ -f "$folder/0/bleu.json" && ! -f "$folder/settings.txt" ]]; then
        before="settings that an earlier version did not keep"
    fi
    if [[ -n "$before" && "$before" != "$2" ]]; then
        local refusal="$folder was trained with other settings: '$before', not '$2'; give another --out, or remove it"
        is_dry_run || die "$refusal"
        echo "# $refusal"
        return 1
    fi
    [[ ! -f "$folder/finished.txt" ]] || return 0
    if ! is_dry_run; then
        mkdir -p "$folder"
        printf '%s\n' "$2" >"$folder/settings.txt"
    fi
    return 1
}

# set_finished FOLDER SETTINGS: it is.
set_finished() { is_dry_run || printf '%s\n' "$2" >"$1/finished.txt"; }

# mix_architectures NAMES: with "resnet18,resnet50", model 0 of train_vision is a resnet18 and model 1 a resnet50.
MIXED=() # what codistill-launch gets for it, and for other things in which models differ
mix_architectures() {
    local names model
    IFS=, read -r -a names <<<"$1"
    # shellcheck disable=SC2034 # train.sh uses it
    NUM_MODELS=${#names[@]}
    for model in "${!names[@]}"; do MIXED+=(--model-args "$model" "--model ${names[model]}"); done
}

# place_devices ARM: what sets NUM_DEVICES where they are not the user's to say (slurm.sh).
place_devices() { :; }

# train_vision NUM_MODELS DEVICES_PER_MODEL OUT SETTINGS...: image classifiers that teach each other, model i in OUT/i.
# With one model it is ordinary data-parallel training: gradients are averaged by all_reduce.
train_vision() {
    local num_models=$1 devices_per_model=$2 out=$3
    shift 3
    # An environment that was installed before it existed has no script. Else not python -m, which would take the folder
    # that this is called in, a clone of the repository, for what is installed.
    local program=("$(dirname "$PYTHON")/codistill-vision")
    [[ -x "${program[0]}" ]] || program=("$PYTHON" -m fairseq_codistill.vision.train)
    logged "$out" codistill-launch --num-models "$num_models" --devices-per-model "$devices_per_model" "${MIXED[@]}" -- \
        "${program[@]}" --seed "{model+$((FIRST_SEED + FIRST_MODEL))}" --codistill-data-seed "$SEED" \
        --save-dir "$out/{model+$FIRST_MODEL}" --no-progress-bar "${DEVICE_SETTINGS[@]}" "$@"
}
