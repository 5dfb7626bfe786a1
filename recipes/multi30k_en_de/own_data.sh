#!/usr/bin/env bash
# Two models whose training data never meet: each half alone, with a transfer set, with checkpoints, and all data together.
#
#   own_data.sh [--data DIR] [--out DIR] [--seeds "1 2 3"] [--updates 800] [--interval 10] [fairseq settings of all arms]
#
# DIR is what prepare.sh made. A tenth of its training pairs becomes the transfer set, whose translations nobody is
# trained on, and the others two halves. Arms: alone (the model of each half), transfer (--codistill-transfer, T = 1),
# checkpoints (--codistill-own-data, T = --interval), together (one model on both halves). All make as many updates.
# What is finished is left alone, so the script can be stopped and started again. SCALE=small: as in settings.sh.
GIVEN_SEED=${SEED:-}
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/translation.sh
source "$REPOSITORY/recipes/translation.sh"
# shellcheck source=recipes/multi30k_en_de/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

DATA="$DATA_DEFAULT"
OUT="$OUT_DEFAULT-own-data"
SEEDS="${GIVEN_SEED:-1 2 3}"
UPDATES=800
INTERVAL=10
REST=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --data) need_value "$1" $# && DATA=$2 && shift 2 ;;
        --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
        --seeds) need_value "$1" $# && SEEDS=$2 && shift 2 ;;
        --updates) need_value "$1" $# && UPDATES=$2 && shift 2 ;;
        --interval) need_value "$1" $# && INTERVAL=$2 && shift 2 ;;
        -h | --help) show_help ;;
        --) REST+=("${@:2}") && break ;;
        *) REST+=("$1") && shift ;;
    esac
done
check_seeds --seeds "$SEEDS"
if is_smoke; then UPDATES=12; fi
[[ -f "$DATA/bin/dict.$TARGET.txt" ]] || die "$DATA holds no prepared data; run $(prepare_command) --out $DATA first"
check_paths "$DATA" "$OUT"
keep_data_sum "$DATA" "$OUT"

# split NAME CONDITION: OUT/data/NAME/bin with the pairs whose line number fulfils an awk condition, and valid1, the
# transfer set, beside the splits that all share.
split() {
    local name=$1 condition=$2 language folder="$OUT/data/$1"
    if is_finished "$folder" "$(settings_of "$DATA" "$condition")" || is_dry_run; then return; fi
    for language in "$SOURCE" "$TARGET"; do
        awk "$condition" "$DATA/bpe/train.$language" >"$folder/train.$language"
        awk "NR % 10 == 0" "$DATA/bpe/train.$language" >"$OUT/data/transfer.$language"
    done
    fairseq-preprocess --source-lang "$SOURCE" --target-lang "$TARGET" --destdir "$folder/bin" \
        --srcdict "$DATA/bin/dict.$SOURCE.txt" --tgtdict "$DATA/bin/dict.$TARGET.txt" --trainpref "$folder/train" \
        --validpref "$DATA/bpe/valid,$OUT/data/transfer" --testpref "$DATA/bpe/test" >"$folder/preprocess.log" 2>&1 ||
        die "fairseq-preprocess failed; its output is in $folder/preprocess.log"
    set_finished "$folder" "$(settings_of "$DATA" "$condition")"
}

# finish FOLDER NUM_MODELS TRAIN ARGUMENTS...: train by the function TRAIN and score each model, unless that is done.
finish() {
    local folder=$1 num_models=$2 model
    shift 2
    local settings
    settings=$(settings_of "$DATA" "$UPDATES updates" "$@" "${SETTINGS[@]}" "${REST[@]}")
    if is_finished "$folder" "$settings"; then return; fi
    headline "$folder"
    # valid1 is the transfer set, which the other arms do not read
    "$@" "${SETTINGS[@]}" --ignore-unused-valid-subsets --max-update "$UPDATES" --keep-last-epochs 1 "${REST[@]}"
    if is_dry_run; then return; fi
    for ((model = 0; model < num_models; model++)); do
        translate_and_score "best checkpoint" "$DATA" "$folder/$model/checkpoint_best.pt" "$folder/$model/bleu"
    done
    set_finished "$folder" "$settings"
}

split half0 'NR % 10 && (NR + int(NR / 10)) % 2 == 0'
split half1 'NR % 10 && (NR + int(NR / 10)) % 2 == 1'
split together 'NR % 10'
place_devices own_data
for SEED in $SEEDS; do
    FIRST_SEED=$((100 * (SEED - 1) + 1))
    arm() { echo "$OUT/$1.seed$SEED"; }
    finish "$(arm half0)" 1 train_plain "$OUT/data/half0/bin" "$(arm half0)"
    finish "$(arm half1)" 1 train_plain "$OUT/data/half1/bin" "$(arm half1)" --seed $((FIRST_SEED + 1))
    finish "$(arm together)" 1 train_plain "$OUT/data/together/bin" "$(arm together)"
    finish "$(arm transfer)" 2 train_codistilled 2 1 "$OUT/data/half{model}/bin" "$(arm transfer)" \
        "${CODISTILL_SETTINGS[@]}" --codistill-transfer valid1
    finish "$(arm checkpoints)" 2 train_codistilled 2 1 "$OUT/data/half{model}/bin" "$(arm checkpoints)" \
        "${CODISTILL_SETTINGS[@]}" --codistill-own-data --codistill-exchange checkpoints --codistill-interval "$INTERVAL"
done
