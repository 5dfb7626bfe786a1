# shellcheck shell=bash
# What the scripts of the figures and tables share; each of them sources it, names its arms, and calls draw.
#
#   figNN.sh --data DIR [--out DIR] [settings that go to every training]
#
#   SCALE=full   the paper's setting: GPUs, ImageNet, WMT'16 or IWSLT'14 as prepare.sh of its recipe left it
#   SCALE=small  the same arms with a small model on small data, for two CPU cores (README.md beside this file)
#   RESNEXT=resnext101_32x4d  the other ResNeXt101
#   SEEDS="1 2"  which seeds to run (default 1 2 3); those that were run before stay in the figure
#   SMOKE=1      a few updates of every arm on embedded data; DRY_RUN=1: commands, devices and bits only (DRY_RUN=commands: without the bits, at once)
#
# An arm of a seed that has finished is not run again, whichever figure wanted it: arms are in OUT/SETTING/ARM/SEED, and
# finished.txt there holds its settings. An arm that was interrupted goes on from its checkpoints, with the settings that
# it was begun with (settings.txt).
SEEDS="${SEEDS:-${SEED:-1 2 3}}"
export FAIL_FAST="${FAIL_FAST:-1}"
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

check_seeds SEEDS "$SEEDS"
DATA=
OUT=checkpoints/paper
FIGURE="$(basename "$0" .sh)"
if is_smoke; then
    SEEDS=1
    OUT+=-smoke
elif is_small; then
    OUT+=-small
fi
EXTRA=() # everything else, for every training
while [[ $# -gt 0 ]]; do
    case "$1" in
        --data) need_value "$1" $# && DATA=$2 && shift 2 ;;
        --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
        -h | --help) show_help ;;
        --) EXTRA+=("$@") && break ;; # the trainings see it too
        *) EXTRA+=("$1") && shift ;;
    esac
done
if is_dry_run; then DATA="${DATA:-DIR}"; fi # a plan needs no data
is_dry_run || need_modules demo matplotlib # for draw, which comes last
ARMS=() # --arm LABEL FOLDER of each, for draw

# refuse WHY FLAG...: what a user's options must not change in this figure.
refuse() {
    local flag word
    for flag in "${@:2}"; do
        for word in "${EXTRA[@]}"; do
            [[ "$word" != "$flag" && "$word" != "$flag="* ]] || die "$flag cannot be given to this figure: $1"
        done
    done
}

# arm RECIPE NAME LABEL ARGUMENTS...: every seed of one arm, by RECIPE/train.sh. LABEL is what figure and table say;
# @SEED@ in an argument stands for the seed.
arm() {
    local recipe=$1 name=$2 label=$3 seed folder other
    shift 3
    # "E/n": before lengths followed the paper, the same arguments meant other trainings. Folders of earlier versions have
    # SEED in them, which @SEED@ was then.
    local settings
    settings="E/n, $(settings_of "$DATA" "${*//@SEED@/SEED}" "${EXTRA[@]}")"
    ARMS+=(--arm "$label" "$OUT/$recipe/$name")
    for other in "$OUT/$recipe/$name"/*/finished.txt; do # all seeds of an arm, in one mean, are of one training
        folder=${other%/*}
        if [[ -f "$other" && " $SEEDS " != *" ${folder##*/} "* ]]; then is_finished "$folder" "$settings" || true; fi
    done
    for seed in $SEEDS; do
        folder="$OUT/$recipe/$name/$seed"
        if is_finished "$folder" "$settings"; then
            echo "$folder is finished already"
            continue
        fi
        SEED=$seed to_its_end "$REPOSITORY/recipes/$recipe/train.sh" --data "$DATA" --out "$folder" "${@//@SEED@/$seed}" "${EXTRA[@]}"
        if is_dry_run; then continue; fi
        # A few updates of ResNet50 leave 200 MB a model; only multi-view begins with what another arm has trained.
        if is_smoke && [[ "$recipe" == imagenet ]]; then find "$folder" -name 'checkpoint_*.pt' -delete; fi
        find "$folder" -name 'bleu*.json' -delete # of what it was before
        set_finished "$folder" "$settings"
    done
}

# embedded_data RECIPE: with SMOKE=1, what RECIPE/prepare.sh makes of the embedded corpus takes the place of --data.
embedded_data() {
    if is_smoke && ! is_dry_run; then
        DATA="$OUT/data-$1"
        [[ -d "$DATA/bin" ]] || "$REPOSITORY/recipes/$1/prepare.sh" --out "$DATA"
    fi
}

# score RECIPE NAME: BLEU of every model of an arm, by RECIPE/evaluate.sh, where it was not counted before.
score() {
    local recipe=$1 name=$2 seed model
    if is_dry_run; then return; fi
    for seed in $SEEDS; do
        for model in "$OUT/$recipe/$name/$seed"/[0-9]*; do
            [[ -f "$model/bleu_average.json" ]] || "$REPOSITORY/recipes/$recipe/evaluate.sh" --data "$DATA" "$model"
        done
    done
}

# scaled FULL SMALL: the value for this scale.
scaled() { if is_small; then echo "$2"; else echo "$1"; fi; }

# Arms that several figures share, so that one run serves them all. Their lengths are those of one of two models, the
# all_reduce arm's those of both: 45 and 90 epochs.
arm_all_reduce() { arm imagenet all_reduce all_reduce --arm all_reduce; }
arm_codistilled() { arm imagenet predictions_1 "${1:-2-way}" --arm codistill; }
# One model alone as a control of codistillation, with the same weight decay as that: it differs in one thing only.
arm_alone() { arm imagenet "$1" "$2" --arm plain --weight-decay 5e-4 1e-5 0 --weight-decay-milestones 18 38 "${@:3}"; }
arm_constant_decay() {
    arm imagenet "constant_decay_$1" "2-way, weight decay $1" \
        --arm codistill --schedule step --weight-decay "$1" --weight-decay-milestones
}

# The larger model of figures 3, 8, 9, 10, 14 and 15. The paper says ResNeXt101; torchvision had this one.
RESNEXT="${RESNEXT:-resnext101_32x8d}"
large_model() { scaled "$RESNEXT" wrn16_2; }

# require_lead POINTS NAME NAME: the figure goes on only where arm NAME is that many points of accuracy above the other.
require_lead() {
    if is_dry_run || is_smoke; then return; fi
    "$PYTHON" "$TOOLS/lead.py" --points "$1" "$OUT/$2" "$OUT/$3" || die "FORCE=1 runs the rest of the figure all the same"
}

# draw TITLE ARGUMENTS...: OUT/figNN.png, .svg, .md and .json, from the logs of all arms. ARGUMENTS are those of
# tools/paper_figure.py.
draw() {
    if is_dry_run; then return; fi
    "$PYTHON" "$TOOLS/paper_figure.py" --out "$OUT/$FIGURE" --title "$1" "${ARMS[@]}" "${@:2}"
}
