#!/usr/bin/env bash
# Trains one arm of the comparison on CIFAR-10.
#
#   train.sh --arm plain|codistill|all_reduce|multiview --data DIR [--preset wrn16_1_cifar] [--models 2] [--devices 1]
#            [--first-group random|pretrained|frozen] [--from FILE] [--out DIR] [settings of codistill-vision]
#
# plain       one model
# codistill   --models models that teach each other
# all_reduce  one model on --models x --devices devices; as many updates as the others, of larger batches
# multiview   --models models, each of which sees one of 8 splits of the channels after the first group; that group is
#             taken from the checkpoint --from (of --arm plain) and frozen or trained on, or begins at random
#
# DIR is as torchvision unpacks it (cifar-10-batches-py), or holds train/ and test/ with a folder for each class.
# Everything after the options above goes to codistill-vision last, and so wins.
# Model i, its log.jsonl and its checkpoints are in OUT/i (default OUT: checkpoints/cifar10/ARM).
# SCALE=small: WRN-10-2 on 16 pixels, 780 updates; DIR is what tools/shrink_images.py made of CIFAR-10.
# SMOKE=1: a tiny model on the embedded digits, on the CPU; needs no --data.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/cifar10/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

ARM=
NUM_MODELS=2
DATA=
FROM=
OUT=
while [[ $# -gt 0 ]]; do
    case "$1" in
        --arm) need_value "$1" $# && ARM=$2 && shift 2 ;;
        --data) need_value "$1" $# && DATA=$2 && shift 2 ;;
        --preset) need_value "$1" $# && PRESET=$2 && shift 2 ;;
        --models) need_value "$1" $# && NUM_MODELS=$2 && shift 2 ;;
        --devices) need_value "$1" $# && NUM_DEVICES=$2 && shift 2 ;;
        --first-group) need_value "$1" $# && FIRST_GROUP=$2 && shift 2 ;;
        --from) need_value "$1" $# && FROM=$2 && shift 2 ;;
        --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
        -h | --help) show_help ;;
        --) shift && break ;;
        *) break ;;
    esac
done
OUT="${OUT:-$OUT_DEFAULT/$ARM}"
if is_dry_run; then DATA="${DATA:-DIR}"; fi # a plan needs no data
if is_smoke; then
    SETTINGS+=(--dataset digits --augmentation crop)
else
    [[ -d "$DATA/train" || -d "$DATA/cifar-10-batches-py" ]] || is_dry_run ||
        die "--data is '$DATA'; it must hold cifar-10-batches-py, or train/ and test/ with a folder for each class"
    SETTINGS+=(--dataset "cifar10:$DATA")
fi

headline "training: $ARM, $PRESET, into $OUT"
case "$ARM" in
    plain)
        train_vision 1 "$NUM_DEVICES" "$OUT" --config "$PRESET" "${SETTINGS[@]}" "$@"
        ;;
    codistill)
        train_vision "$NUM_MODELS" "$NUM_DEVICES" "$OUT" --config "$PRESET" "${SETTINGS[@]}" "$@"
        ;;
    all_reduce)
        train_vision 1 $((NUM_MODELS * NUM_DEVICES)) "$OUT" --config "$PRESET" "${SETTINGS[@]}" --stretch "$NUM_MODELS" "$@"
        ;;
    multiview)
        case "$FIRST_GROUP" in
            # At random there is no common first group to cut, so all models see the same split of their own.
            random) SETTINGS+=(--view 0) ;;
            pretrained | frozen)
                [[ -f "$FROM" ]] || is_dry_run || die "--from is '$FROM'; give checkpoint_last.pt of --arm plain with the same preset"
                SETTINGS+=(--first-group "$FROM")
                ;;
            *) die "--first-group is '$FIRST_GROUP'; it must be random, pretrained or frozen" ;;
        esac
        if [[ "$FIRST_GROUP" == frozen ]]; then SETTINGS+=(--freeze-first-group); fi
        train_vision "$NUM_MODELS" "$NUM_DEVICES" "$OUT" --config "$PRESET" multiview "${SETTINGS[@]}" "$@"
        ;;
    *) die "--arm is '$ARM'; it must be plain, codistill, all_reduce or multiview" ;;
esac
