#!/usr/bin/env bash
# Trains one arm of the comparison. The settings are in settings.sh; an arm adds only what one can see here.
#
#   train.sh --arm plain|codistill|all_reduce [--models 2] [--devices 2] [--data DIR] [--out DIR] [fairseq settings]
#
# plain       one model, fairseq alone
# codistill   --models models that teach each other, each on one device
# all_reduce  one model on --devices devices (processes on the CPU), gradients averaged at every update. Every device
#             takes batches as large as the plain arm's, so an epoch has 1/devices of its updates: the epochs are
#             multiplied to make the same number of updates.
#
# Everything after the options above goes to fairseq-train last, and so wins: train.sh --arm plain --max-epoch 3
# Model i and its train.log are in OUT/i (default OUT: checkpoints/multi30k_en_de/ARM). SMOKE=1: a tiny run.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/multi30k_en_de/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

ARM=
NUM_MODELS=2
NUM_DEVICES=2
DATA="$DATA_DEFAULT"
OUT=
while [[ $# -gt 0 ]]; do
    case "$1" in
        --arm) need_value "$1" $# && ARM=$2 && shift 2 ;;
        --models) need_value "$1" $# && NUM_MODELS=$2 && shift 2 ;;
        --devices) need_value "$1" $# && NUM_DEVICES=$2 && shift 2 ;;
        --data) need_value "$1" $# && DATA=$2 && shift 2 ;;
        --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
        -h | --help) sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
        --) shift && break ;;
        *) break ;;
    esac
done
OUT="${OUT:-$OUT_DEFAULT/$ARM}"
[[ -f "$DATA/bin/dict.$TARGET.txt" ]] || die "$DATA holds no prepared data; run prepare.sh --out $DATA first"

headline "training: $ARM, into $OUT"
case "$ARM" in
    plain)
        train_plain "$DATA/bin" "$OUT" "${SETTINGS[@]}" --max-epoch "$MAX_EPOCH" "$@"
        ;;
    codistill)
        train_codistilled "$NUM_MODELS" 1 "$DATA/bin" "$OUT" "${SETTINGS[@]}" --max-epoch "$MAX_EPOCH" \
            "${CODISTILL_SETTINGS[@]}" "$@"
        ;;
    all_reduce)
        train_codistilled 1 "$NUM_DEVICES" "$DATA/bin" "$OUT" "${SETTINGS[@]}" \
            --max-epoch $((MAX_EPOCH * NUM_DEVICES)) "$@"
        ;;
    *) die "--arm is '$ARM'; it must be plain, codistill or all_reduce" ;;
esac
