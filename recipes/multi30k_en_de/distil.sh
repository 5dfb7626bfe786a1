#!/usr/bin/env bash
# Distils a model into a small one: the teacher, the small model alone, and the small model taught, each scored.
#
#   distil.sh [--data DIR] [--out DIR] [--seeds "1 2 3"] [--teacher CHECKPOINT] [fairseq settings of the students]
#
# The teacher is the model of settings.sh (or the one that --teacher names), the students are those of SCALE=small, one
# seed after another. What is finished is left alone, so the script can be stopped and started again. The teacher's
# predictions are kept in OUT/cache: the first student that it teaches computes them.
GIVEN_SEED=${SEED:-}
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/translation.sh
source "$REPOSITORY/recipes/translation.sh"
# shellcheck source=recipes/multi30k_en_de/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

HERE="$(dirname "${BASH_SOURCE[0]}")"
DATA="$DATA_DEFAULT"
OUT="$OUT_DEFAULT-distil"
SEEDS="${GIVEN_SEED:-1 2 3}"
TEACHER=
REST=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --data) need_value "$1" $# && DATA=$2 && shift 2 ;;
        --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
        --seeds) need_value "$1" $# && SEEDS=$2 && shift 2 ;;
        --teacher) need_value "$1" $# && TEACHER=$2 && shift 2 ;;
        -h | --help) show_help ;;
        *) REST+=("$1") && shift ;;
    esac
done
check_seeds --seeds "$SEEDS"

# finish FOLDER TRAIN_ARGUMENTS...: train and score, unless that is done.
finish() {
    local folder=$1 settings
    shift
    settings=$(settings_of "$DATA" "$@")
    check_same_data "$DATA" "$folder"
    if is_finished "$folder" "$settings"; then
        echo "$folder is finished already"
        return
    fi
    to_its_end "$HERE/train.sh" --data "$DATA" --out "$folder" --keep-last-epochs "$NUM_AVERAGED" "$@"
    if is_dry_run; then return; fi
    "$HERE/evaluate.sh" --data "$DATA" "$folder/0"
    set_finished "$folder" "$settings"
}

if [[ -z "$TEACHER" ]]; then
    # More dropout than the recipe has: so long a training of the larger model would over-fit a part of the pairs.
    SCALE=full finish "$OUT/teacher" --arm plain --dropout 0.3
    TEACHER="$OUT/teacher/0/checkpoint_best.pt"
fi
export SCALE=small
for seed in $SEEDS; do
    SEED=$seed finish "$OUT/alone$seed" --arm plain "${REST[@]}"
    SEED=$seed finish "$OUT/taught$seed" --arm taught --teacher "$TEACHER" --codistill-teacher-cache "$OUT/cache" \
        "${REST[@]}"
done
