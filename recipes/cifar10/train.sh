#!/usr/bin/env bash
# Trains one arm of the comparison on CIFAR-10.
#
#   train.sh --arm plain|codistill|all_reduce|multiview --data DIR [--preset wrn16_1_cifar] [--models 2] [--one-of M]
#            [--devices 1] [--stretch 1] [--first-group random|pretrained|frozen] [--from FILE] [--rotations 1|all]
#            [--out DIR] [settings of codistill-vision]
#
# plain       one model, as long as one of --models models; --one-of 1 for all epochs of the preset
# codistill   --models models that teach each other
# all_reduce  one model on --models x --devices devices; as many updates as the others, of larger batches
# multiview   --models models, each of which sees one of 8 splits of the channels after the first group; that group is
#             taken from the checkpoint --from (of --arm plain --one-of 1) and frozen or trained on, or begins at random
#
# all_reduce has the epochs of the preset, one of M models an M-th of them (M: --models, or --one-of), so the same updates.
# A multi-view model has all of them, whatever --models is.
# --rotations all: as many groups of --models models as it takes for every split to be seen by one model; where the first
# group begins at random, a group sees one split. The models of group g are numbered from g times --models.
#
# DIR is as torchvision unpacks it (cifar-10-batches-py), or holds train/ and test/ with a folder for each class.
# Everything but the options above goes to codistill-vision last, and so wins.
# Model i, its log.jsonl and its checkpoints are in OUT/i (default OUT: checkpoints/cifar10/ARM).
# SCALE=small: WRN-10-2 on 16 pixels, 780 updates; DIR is what tools/shrink_images.py made of CIFAR-10.
# SMOKE=1: a tiny model on the embedded digits, on the CPU; needs no --data.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/vision.sh
source "$REPOSITORY/recipes/vision.sh"
# shellcheck source=recipes/cifar10/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

OWN_OPTIONS="--first-group --from --rotations"
FROM=
ROTATIONS=1

own_option() {
    case "$1" in
        --first-group) FIRST_GROUP=$2 ;;
        --from) FROM=$2 ;;
        --rotations) ROTATIONS=$2 ;;
    esac
}

check_data() {
    [[ -d "$DATA/train" || -d "$DATA/cifar-10-batches-py" ]] ||
        die "--data is '$DATA'; it must hold cifar-10-batches-py, or train/ and test/ with a folder for each class"
}

choose_configs() {
    CONFIGS=("$PRESET")
    [[ "$ARM" != multiview ]] || CONFIGS+=(multiview)
}

train_own_arm() {
    [[ "$ARM" == multiview ]] || die "--arm is '$ARM'; it must be plain, codistill, all_reduce or multiview"
    local group groups=1 model split views
    case "$FIRST_GROUP" in
        random) ;;
        pretrained | frozen)
            [[ -f "$FROM" ]] || is_dry_run ||
                die "--from is '$FROM'; give checkpoint_last.pt of --arm plain with the same preset"
            SETTINGS+=(--first-group "$FROM")
            ;;
        *) die "--first-group is '$FIRST_GROUP'; it must be random, pretrained or frozen" ;;
    esac
    if [[ "$FIRST_GROUP" == frozen ]]; then SETTINGS+=(--freeze-first-group); fi
    case "$ROTATIONS" in
        1) ;;
        all)
            [[ $((SPLITS % NUM_MODELS)) -eq 0 ]] || die "--models is $NUM_MODELS; with --rotations all it must divide $SPLITS"
            groups=$((SPLITS / NUM_MODELS))
            ;;
        *) die "--rotations is '$ROTATIONS'; it must be 1 or all" ;;
    esac
    stretched 1
    for ((group = 0; group < groups; group++)); do
        views=()
        for ((model = 0; model < NUM_MODELS; model++)); do
            split=$(((group * NUM_MODELS + model) % SPLITS))
            # At random there is no common first group to cut, so all models of a group see the same split of their own.
            if [[ "$FIRST_GROUP" == random ]]; then split=$group; fi
            views+=(--model-args "$model" "--view $split")
        done
        MIXED=("${views[@]}")
        FIRST_MODEL=$((group * NUM_MODELS))
        train_vision "$NUM_MODELS" "$NUM_DEVICES" "$OUT" --config "${CONFIGS[@]}" "${SETTINGS[@]}" "${STRETCHED[@]}" "$@"
    done
}

train_images "$@"
