#!/usr/bin/env bash
# Trains one arm of the comparison on ImageNet, with the schedules of the paper.
#
#   train.sh --arm plain|codistill|all_reduce --data DIR [--schedule step|shifted|cosine] [--preset resnet50_goyal]
#            [--models 2 | --mixed MODEL,MODEL] [--devices 8] [--stretch 1] [--out DIR] [settings of codistill-vision]
#
# plain       one model on --devices devices
# codistill   --models such models that teach each other; weight decay falls where the learning rate drops
# all_reduce  one model on --models x --devices devices; as many updates as the others, of larger batches
#
# --mixed resnet18,resnet50: codistill with models of these architectures, instead of --models equal ones
# --stretch 0.5: half of the updates, with all schedules shortened
#
# DIR holds train/ and val/, with a folder of images for each class. Everything after the options above goes to
# codistill-vision last, and so wins: train.sh --arm codistill --data DIR --codistill-interval 10
# Model i, its log.jsonl and its checkpoints are in OUT/i (default OUT: checkpoints/imagenet/ARM).
# SCALE=small: WRN-16-1 on 16 pixels, 1,440 updates; DIR is what tools/shrink_images.py made of CIFAR-10.
# SMOKE=1: three updates on images made by code, on the CPU; needs no --data.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

ARM=
NUM_MODELS=2
DATA=
OUT=
FACTOR=1
while [[ $# -gt 0 ]]; do
    case "$1" in
        --arm) need_value "$1" $# && ARM=$2 && shift 2 ;;
        --data) need_value "$1" $# && DATA=$2 && shift 2 ;;
        --schedule) need_value "$1" $# && SCHEDULE=$2 && shift 2 ;;
        --preset) need_value "$1" $# && PRESET=$2 && shift 2 ;;
        --models) need_value "$1" $# && NUM_MODELS=$2 && shift 2 ;;
        --mixed) need_value "$1" $# && mix_architectures "$2" && shift 2 ;;
        --stretch) need_value "$1" $# && FACTOR=$2 && shift 2 ;;
        --devices) need_value "$1" $# && NUM_DEVICES=$2 && shift 2 ;;
        --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
        -h | --help) show_help ;;
        --) shift && break ;;
        *) break ;;
    esac
done
OUT="${OUT:-$OUT_DEFAULT/$ARM}"
if is_dry_run; then DATA="${DATA:-DIR}"; fi # a plan needs no data
if ! is_smoke && ! is_dry_run; then
    [[ -d "$DATA/train" ]] || die "--data is '$DATA'; it must hold train/ and val/, with a folder for each class"
fi
if [[ "$DATASET" != fake ]]; then DATASET+=":$DATA"; fi
SETTINGS+=(--dataset "$DATASET")
if [[ "$ARM" == all_reduce ]]; then FACTOR="$FACTOR $NUM_MODELS"; fi
STRETCH="$(awk '{ product = 1; for (i = 1; i <= NF; i++) product *= $i; print product }' <<<"$STRETCH $FACTOR")"
if [[ "$STRETCH" != 1 ]]; then SETTINGS+=(--stretch "$STRETCH"); fi

CONFIGS=("$PRESET")
case "$SCHEDULE" in
    step) CODISTILL_CONFIG=codistill_step ;;
    shifted) CONFIGS+=(shifted) CODISTILL_CONFIG=codistill_shifted ;;
    # With a cosine the weight decay falls where the steps would have been.
    cosine) CONFIGS+=(cosine) CODISTILL_CONFIG=codistill_step ;;
    *) die "--schedule is '$SCHEDULE'; it must be step, shifted or cosine" ;;
esac

headline "training: $ARM, $PRESET, $SCHEDULE, into $OUT"
case "$ARM" in
    plain)
        train_vision 1 "$NUM_DEVICES" "$OUT" --config "${CONFIGS[@]}" "${SETTINGS[@]}" "$@"
        ;;
    codistill)
        train_vision "$NUM_MODELS" "$NUM_DEVICES" "$OUT" --config "${CONFIGS[@]}" "$CODISTILL_CONFIG" "${SETTINGS[@]}" "$@"
        ;;
    all_reduce)
        train_vision 1 $((NUM_MODELS * NUM_DEVICES)) "$OUT" --config "${CONFIGS[@]}" "${SETTINGS[@]}" "$@"
        ;;
    *) die "--arm is '$ARM'; it must be plain, codistill or all_reduce" ;;
esac
