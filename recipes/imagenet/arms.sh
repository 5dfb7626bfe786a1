# shellcheck shell=bash disable=SC2034,SC2153
# What train.sh and slurm.sbatch of this recipe share: its own options, its data, the presets of each arm.

OWN_OPTIONS="--schedule --mixed --rate"
MIXED_NAMES=

own_option() {
    case "$1" in
        --schedule) SCHEDULE=$2 ;;
        --mixed) MIXED_NAMES=$2 && mix_architectures "$2" ;;
        --rate) RATE=$2 ;;
    esac
}

check_data() {
    [[ -d "$DATA/train" ]] || die "--data is '$DATA'; it must hold train/ and val/, with a folder for each class"
}

choose_configs() {
    local schedule=$SCHEDULE
    if [[ -n "$MIXED_NAMES" ]]; then
        [[ "$ARM" == codistill ]] ||
            die "--mixed is '$MIXED_NAMES' with --arm $ARM, which trains one model: give that as --model NAME"
        [[ $((${#MIXED[@]} / 3)) -eq "$NUM_MODELS" ]] ||
            die "--mixed is '$MIXED_NAMES' and --models $NUM_MODELS; leave --models out, it is the number of names"
    fi
    if [[ -z "$schedule" ]]; then
        schedule=shifted
        if [[ "$ARM" == all_reduce ]]; then schedule=step; fi
    fi
    CONFIGS=("$PRESET")
    case "$ARM:$schedule" in
        all_reduce:step) ;;
        all_reduce:shifted | all_reduce:a4) CONFIGS+=(shifted) ;;
        all_reduce:cosine) CONFIGS+=(cosine) ;;
        plain:step) CONFIGS+=(half) ;;
        plain:shifted | plain:a4) CONFIGS+=(half_shifted) ;;
        plain:cosine) CONFIGS+=(half_shifted cosine) ;;
        codistill:step | codistill:shifted | codistill:a4) CONFIGS+=("codistill_$schedule") ;;
        # With a cosine the weight decay falls where the tuned steps would have been.
        codistill:cosine) CONFIGS+=(codistill_shifted cosine) ;;
        *:step | *:shifted | *:a4 | *:cosine) train_own_arm ;;
        *) die "--schedule is '$SCHEDULE'; it must be step, shifted, a4 or cosine" ;;
    esac
    case "$RATE:$ARM" in
        own:* | effective:all_reduce) ;; # the batch of all_reduce is the effective one
        effective:*) SETTINGS+=(--lr-batch-size "$(effective_rate_batch)") ;;
        *) die "--rate is '$RATE'; it must be own or effective" ;;
    esac
}

# The batch that the learning rate of PRESET is for, over M.
effective_rate_batch() {
    local file=$PRESET batch
    [[ -f "$file" ]] || file="$REPOSITORY/vision/configs/$(basename "$PRESET" .yaml).yaml"
    [[ -f "$file" ]] || die "--preset is '$PRESET'; there is no such file, nor such a preset in vision/configs"
    batch="$(sed -n 's/^lr_batch_size: *\([0-9]*\).*/\1/p' "$file")"
    batch="${batch:-256}" # of codistill-vision
    [[ "$batch" -gt 0 && $((batch % ONE_OF)) -eq 0 ]] ||
        die "--rate is 'effective' with M = $ONE_OF (--one-of, or --models), which does not divide $batch, the" \
            "lr_batch_size of --preset $PRESET; give an M that does, or --rate own"
    echo $((batch / ONE_OF))
}

train_own_arm() { die "--arm is '$ARM'; it must be plain, codistill or all_reduce"; }
