# shellcheck shell=bash disable=SC2034,SC2153
# What the recipes for images share: options, lengths, the three arms. Source it after common.sh and before settings.sh,
# which gives PRESET, PRESET_MODELS, NUM_DEVICES, DATASET, SETTINGS, OUT_DEFAULT and, where it has options of its own,
# OWN_OPTIONS. train.sh defines
#
#   own_option FLAG VALUE   takes an option of OWN_OPTIONS
#   check_data              ends the script where DATA is not what it must be
#   choose_configs          sets CONFIGS, the presets of ARM, in order
#   train_own_arm REST...   trains an arm that only this recipe has; 1 for one that it does not know
#
# Lengths. The paper compares at equal updates: E epochs of all_reduce, whose batch is that of all M models together, are
# E/M epochs of one model. So all_reduce keeps the usual number of epochs, and one model, codistilled or alone, has an M-th
# of it. M is the number of models, or --one-of.

OWN_OPTIONS=
ARM=
NUM_MODELS=2
ONE_OF= # M, the number of models where it is empty
DATA=
OUT=
STRETCH=1 # of all schedules, on top of what the arm needs
CONFIGS=()
REST=() # settings of codistill-vision

# read_options ARGUMENTS...: those of train.sh; what is left goes to REST, and to codistill-vision.
read_options() {
    while [[ $# -gt 0 ]]; do
        case "$1" in
            --arm) need_value "$1" $# && ARM=$2 && shift 2 ;;
            --data) need_value "$1" $# && DATA=$2 && shift 2 ;;
            --preset) need_value "$1" $# && PRESET=$2 && shift 2 ;;
            --models) need_value "$1" $# && NUM_MODELS=$2 && shift 2 ;;
            --one-of) need_value "$1" $# && ONE_OF=$2 && shift 2 ;;
            --devices) need_value "$1" $# && NUM_DEVICES=$2 && shift 2 ;;
            --stretch) need_value "$1" $# && STRETCH=$2 && shift 2 ;;
            --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
            -h | --help) show_help ;;
            --) REST+=("${@:2}") && break ;; # what bears the name of an option of ours, too
            *)
                if [[ " $OWN_OPTIONS " == *" $1 "* ]]; then
                    need_value "$1" $# && own_option "$1" "$2" && shift 2
                else
                    REST+=("$1") && shift
                fi
                ;;
        esac
    done
    local number
    ONE_OF="${ONE_OF:-$NUM_MODELS}"
    for number in "$NUM_MODELS" "$ONE_OF" "$NUM_DEVICES"; do
        [[ "$number" =~ ^[1-9][0-9]*$ ]] || die "--models, --one-of and --devices take whole numbers from 1 on, not '$number'"
    done
    [[ "$STRETCH" =~ ^[0-9]*\.?[0-9]+$ ]] || die "--stretch is '$STRETCH'; it must be a number such as 0.5"
    if is_dry_run; then DATA="${DATA:-DIR}"; fi # a plan needs no data
    if ! is_smoke && ! is_dry_run; then check_data; fi
    OUT="${OUT:-$OUT_DEFAULT/$ARM}"
}

# stretched FACTOR [DIVISOR]: --stretch FACTOR / DIVISOR, on top of what the user asked for; nothing where that is 1.
stretched() {
    local value
    value="$(LC_ALL=C awk -v a="$STRETCH" -v b="$1" -v c="${2:-1}" 'BEGIN { printf "%.8g", a * b / c }')"
    STRETCHED=()
    if [[ "$value" != 1 ]]; then STRETCHED=(--stretch "$value"); fi
}

# train_images ARGUMENTS...: what train.sh does; its options are described there.
train_images() {
    read_options "$@"
    place_devices "$ARM"
    choose_configs
    local dataset=$DATASET
    if [[ "$dataset" == cifar10 || "$dataset" == imagefolder ]]; then dataset+=":$DATA"; fi
    SETTINGS+=(--dataset "$dataset")
    headline "training: $ARM, ${CONFIGS[*]}, into $OUT"
    case "$ARM" in
        plain)
            stretched "$PRESET_MODELS" "$ONE_OF"
            train_vision 1 "$NUM_DEVICES" "$OUT" --config "${CONFIGS[@]}" "${SETTINGS[@]}" "${STRETCHED[@]}" "${REST[@]}"
            ;;
        codistill)
            stretched "$PRESET_MODELS" "$ONE_OF"
            train_vision "$NUM_MODELS" "$NUM_DEVICES" "$OUT" --config "${CONFIGS[@]}" "${SETTINGS[@]}" "${STRETCHED[@]}" \
                "${REST[@]}"
            ;;
        all_reduce)
            stretched "$NUM_MODELS" "$ONE_OF"
            train_vision 1 $((NUM_MODELS * NUM_DEVICES)) "$OUT" --config "${CONFIGS[@]}" "${SETTINGS[@]}" \
                "${STRETCHED[@]}" "${REST[@]}"
            ;;
        *) train_own_arm "${REST[@]}" ;;
    esac
}
