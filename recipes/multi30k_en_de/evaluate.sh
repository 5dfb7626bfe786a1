#!/usr/bin/env bash
# BLEU of the 2016 Flickr test set: the best checkpoint, and the average of the last epochs.
#
#   evaluate.sh [--data DIR] CHECKPOINT_DIR...
#
# CHECKPOINT_DIR is one model's folder, such as checkpoints/multi30k_en_de/codistill/0. Beside the checkpoints it gets
# bleu.{gen,hyp,json} (best) and bleu_average.{gen,hyp,json}. Scores are detokenised sacreBLEU with its signature.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/multi30k_en_de/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

DATA="$DATA_DEFAULT"
FOLDERS=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --data) need_value "$1" $# && DATA=$2 && shift 2 ;;
        -h | --help) sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
        -*) die "unknown argument '$1'; see --help" ;;
        *) FOLDERS+=("$1") && shift ;;
    esac
done
[[ ${#FOLDERS[@]} -gt 0 ]] || die "no folder of checkpoints given; see --help"
[[ -f "$DATA/bin/dict.$TARGET.txt" ]] || die "$DATA holds no prepared data; run prepare.sh --out $DATA first"

for folder in "${FOLDERS[@]}"; do
    headline "$folder"
    translate_and_score "best checkpoint" "$DATA" "$DATA/raw/test.$TARGET" "$folder/checkpoint_best.pt" "$BEAM" \
        "$folder/bleu"
    "$PYTHON" -m fairseq_codistill.average --checkpoint-dir "$folder" --last "$NUM_AVERAGED" \
        --out "$folder/checkpoint_average.pt"
    translate_and_score "average of the last $NUM_AVERAGED epochs" "$DATA" "$DATA/raw/test.$TARGET" \
        "$folder/checkpoint_average.pt" "$BEAM" "$folder/bleu_average"
done
