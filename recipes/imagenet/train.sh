#!/usr/bin/env bash
# Trains one arm of the comparison on ImageNet, with the schedules of the paper.
#
#   train.sh --arm plain|codistill|all_reduce --data DIR [--schedule step|shifted|cosine] [--preset resnet50_goyal]
#            [--models 2] [--devices 8] [--out DIR] [settings of codistill-vision]
#
# plain       one model on --devices devices
# codistill   --models such models that teach each other; weight decay falls where the learning rate drops
# all_reduce  one model on --models x --devices devices; as many updates as the others, of larger batches
#
# DIR holds train/ and val/, with a folder of images for each class. Everything after the options above goes to
# codistill-vision last, and so wins: train.sh --arm codistill --data DIR --codistill-interval 10
# Model i, its log.jsonl and its checkpoints are in OUT/i (default OUT: checkpoints/imagenet/ARM).
# SMOKE=1: three updates on images made by code, on the CPU; needs no --data.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

ARM=
NUM_MODELS=2
DATA=
OUT=
while [[ $# -gt 0 ]]; do
    case "$1" in
        --arm) need_value "$1" $# && ARM=$2 && shift 2 ;;
        --data) need_value "$1" $# && DATA=$2 && shift 2 ;;
        --schedule) need_value "$1" $# && SCHEDULE=$2 && shift 2 ;;
        --preset) need_value "$1" $# && PRESET=$2 && shift 2 ;;
        --models) need_value "$1" $# && NUM_MODELS=$2 && shift 2 ;;
        --devices) need_value "$1" $# && NUM_DEVICES=$2 && shift 2 ;;
        --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
        -h | --help) show_help ;;
        --) shift && break ;;
        *) break ;;
    esac
done
OUT="${OUT:-$OUT_DEFAULT/$ARM}"
if is_smoke; then
    SETTINGS+=(--dataset fake)
else
    [[ -d "$DATA/train" ]] || die "--data is '$DATA'; it must hold train/ and val/, with a folder for each class"
    SETTINGS+=(--dataset "imagefolder:$DATA")
fi

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
        train_vision 1 $((NUM_MODELS * NUM_DEVICES)) "$OUT" --config "${CONFIGS[@]}" "${SETTINGS[@]}" \
            --stretch "$NUM_MODELS" "$@"
        ;;
    *) die "--arm is '$ARM'; it must be plain, codistill or all_reduce" ;;
esac
