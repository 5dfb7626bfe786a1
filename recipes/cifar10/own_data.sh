#!/usr/bin/env bash
# Two models whose images never meet, each class unevenly divided: alone, with a transfer set, with checkpoints, together.
#
#   own_data.sh --data DIR [--out DIR] [--seeds "1 2 3"] [--alpha 0.3] [--limit N] [--interval 10]
#               [settings of codistill-vision for all arms]
#
# DIR holds train/ and test/ with a folder of images for each class. A tenth of the images becomes the transfer set, whose
# labels nobody sees; of the rest a Dirichlet distribution (--alpha) gives each class to the two models. The division is
# another one for every seed. --limit: so many images of a class. Arms: half0 and half1 (alone), transfer
# (--transfer-dataset, T = 1), checkpoints (--codistill-own-data, T = --interval), together (one model on both halves).
# All make as many updates (--max-updates). What is finished is left alone, so the script can be stopped and started again.
GIVEN_SEED=${SEED:-}
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

DATA=
OUT=checkpoints/cifar10-own-data
SEEDS="${GIVEN_SEED:-1 2 3}"
ALPHA=0.3
LIMIT=0
INTERVAL=10
REST=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --data) need_value "$1" $# && DATA=$2 && shift 2 ;;
        --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
        --seeds) need_value "$1" $# && SEEDS=$2 && shift 2 ;;
        --alpha) need_value "$1" $# && ALPHA=$2 && shift 2 ;;
        --limit) need_value "$1" $# && LIMIT=$2 && shift 2 ;;
        --interval) need_value "$1" $# && INTERVAL=$2 && shift 2 ;;
        -h | --help) show_help ;;
        --) REST+=("${@:2}") && break ;;
        *) REST+=("$1") && shift ;;
    esac
done
check_seeds --seeds "$SEEDS"
[[ -d "$DATA/train" && -d "$DATA/test" ]] ||
    die "--data is '$DATA'; it must hold train/ and test/ with a folder of images for each class"
SETTINGS=(
    --model wrn10_1 --batch-size 64 --lr 0.1 --lr-batch-size 0 --lr-schedule constant --weight-decay 5e-4
    --epochs 1000 --max-updates 600 --log-updates 50 --eval-epochs 1000
    --codistill-divergence kl --codistill-weight 1
)
if is_smoke; then SETTINGS+=(--batch-size 8 --max-updates 4); fi
place_devices own_data

# finish FOLDER NUM_MODELS DATASET SETTINGS...: train, unless that is done.
finish() {
    local folder=$1 num_models=$2 dataset=$3
    shift 3
    local settings
    settings=$(settings_of "$DATA" "Dirichlet $ALPHA, limit $LIMIT," "${SETTINGS[@]}" "$@" "${REST[@]}")
    if is_finished "$folder" "$settings"; then return; fi
    headline "$folder"
    train_vision "$num_models" 1 "$folder" "${SETTINGS[@]}" --dataset "cifar10:$dataset" "$@" "${REST[@]}"
    set_finished "$folder" "$settings"
}

FIRST_MODEL=0
for SEED in $SEEDS; do
    FIRST_SEED=$((100 * (SEED - 1) + 1))
    split="$OUT/data.seed$SEED"
    division=$(settings_of "$DATA" "Dirichlet $ALPHA, limit $LIMIT")
    if ! is_finished "$split" "$division" && ! is_dry_run; then
        rm -rf "${split:?}"
        "$PYTHON" "$TOOLS/split_images.py" --from "$DATA" --out "$split" --alpha "$ALPHA" --limit "$LIMIT" --seed "$SEED"
        set_finished "$split" "$division"
    fi
    # A half alone begins as the model of that half does beside the other.
    finish "$OUT/half0.seed$SEED" 1 "$split/half0"
    finish "$OUT/half1.seed$SEED" 1 "$split/half1" --seed $((FIRST_SEED + 1))
    finish "$OUT/together.seed$SEED" 1 "$split/together"
    finish "$OUT/transfer.seed$SEED" 2 "$split/half{model}" --transfer-dataset "imagefolder:$split/shared"
    finish "$OUT/checkpoints.seed$SEED" 2 "$split/half{model}" --codistill-own-data --codistill-exchange checkpoints \
        --codistill-interval "$INTERVAL"
done
