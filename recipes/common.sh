# shellcheck shell=bash
# What every recipe shares; source it first. A recipe itself holds settings and calls these functions.
#
#   SMOKE=1    a tiny run on the embedded corpus, in a minute or two, to see that everything works
#   VERBOSE=1  all lines of fairseq on the screen, not only the figures
#   PYTHON=... another Python than the one of .venv
set -euo pipefail

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TOOLS="$REPOSITORY/recipes/tools"
SMOKE="${SMOKE:-0}"
# A thread a process: the processes of a recipe share the cores, and threads on top would only slow each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# fairseq repeats the same deprecation warnings for every batch.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
export PYTHONUNBUFFERED=1

headline() { printf '\n== %s\n' "$*"; }

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# need_value FLAG COUNT: COUNT arguments are left, FLAG among them; it takes a value.
need_value() { [[ $2 -ge 2 ]] || die "$1 needs a value"; }

is_smoke() { [[ "$SMOKE" != 0 ]]; }

# The scripts of the environment (fairseq-train and others) have to be found first on PATH.
if [[ -n "${PYTHON:-}" ]]; then
    PYTHON="$(command -v "$PYTHON")" || die "PYTHON is '$PYTHON'; there is no such program"
    PATH="$(dirname "$PYTHON"):$PATH"
elif [[ -x "$REPOSITORY/.venv/bin/python" ]]; then
    PYTHON="$REPOSITORY/.venv/bin/python"
    PATH="$REPOSITORY/.venv/bin:$PATH"
else
    PYTHON="$(command -v python3)" || die "no Python found; run 'make install' in $REPOSITORY"
fi
export PATH
"$PYTHON" -c 'import fairseq_codistill' 2>/dev/null ||
    die "fairseq_codistill is not installed for $PYTHON; run 'make install' in $REPOSITORY"
USER_DIR="$("$PYTHON" -m fairseq_codistill.paths)"

# --cpu where there is no GPU: fairseq would ask for one.
DEVICE_SETTINGS=()
has_gpu() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }
has_gpu || DEVICE_SETTINGS=(--cpu)

# What every translation of every recipe trains with: batches of any size are kept (some versions of fairseq drop a
# ragged last one), and the log is one that the report can read.
COMMON_SETTINGS=(--required-batch-size-multiple 1 --log-format json --no-progress-bar --num-workers 0)

# embedded_corpus DIR NUM_TRAIN NUM_OTHER: German and English number words.
embedded_corpus() {
    "$PYTHON" -m fairseq_codistill.demo.corpus --out "$1" --num-train "$2" --num-valid "$3" --num-test "$3"
}

# binarise RAW OUT SOURCE TARGET VOCAB_SIZE: joint BPE in OUT/bpe, fairseq's data with one dictionary in OUT/bin.
binarise() {
    local raw=$1 out=$2 source=$3 target=$4 vocab_size=$5
    "$PYTHON" "$TOOLS/bpe.py" --raw "$raw" --out "$out/bpe" --languages "$source" "$target" --vocab-size "$vocab_size"
    # fairseq keeps dictionaries that it finds; those of an earlier preparation would be wrong.
    rm -rf "${out:?}/bin"
    if ! fairseq-preprocess --source-lang "$source" --target-lang "$target" --joined-dictionary --destdir "$out/bin" \
        --trainpref "$out/bpe/train" --validpref "$out/bpe/valid" --testpref "$out/bpe/test" \
        --workers 1 >"$out/preprocess.log" 2>&1; then
        tail -n 20 "$out/preprocess.log" >&2
        die "fairseq-preprocess failed; its output is in $out/preprocess.log"
    fi
}

# train_plain DATA OUT SETTINGS...: one model with fairseq alone, checkpoints and train.log in OUT/0.
train_plain() {
    local data=$1 out=$2
    shift 2
    "$PYTHON" "$TOOLS/run_logged.py" --log-dir "$out" -- fairseq-train "$data" --task translation \
        --criterion label_smoothed_cross_entropy --seed 1 --save-dir "$out/0" \
        "${DEVICE_SETTINGS[@]}" "${COMMON_SETTINGS[@]}" "$@"
}

# train_codistilled NUM_MODELS DEVICES_PER_MODEL DATA OUT SETTINGS...: models that teach each other, model i in OUT/i.
# With one model it is ordinary data-parallel training: gradients are averaged by all_reduce.
train_codistilled() {
    local num_models=$1 devices_per_model=$2 data=$3 out=$4
    shift 4
    "$PYTHON" "$TOOLS/run_logged.py" --log-dir "$out" -- \
        codistill-launch --num-models "$num_models" --devices-per-model "$devices_per_model" -- \
        fairseq-train "$data" --user-dir "$USER_DIR" --task codistill_translation --criterion codistillation \
        --seed '{model+1}' --save-dir "$out/{model}" "${DEVICE_SETTINGS[@]}" "${COMMON_SETTINGS[@]}" "$@"
}

# train_vision NUM_MODELS DEVICES_PER_MODEL OUT SETTINGS...: image classifiers that teach each other, model i in OUT/i.
# With one model it is ordinary data-parallel training: gradients are averaged by all_reduce.
train_vision() {
    local num_models=$1 devices_per_model=$2 out=$3
    shift 3
    # Not the script codistill-vision: an environment installed before it existed has none.
    "$PYTHON" "$TOOLS/run_logged.py" --log-dir "$out" -- \
        codistill-launch --num-models "$num_models" --devices-per-model "$devices_per_model" -- \
        "$PYTHON" -m vision.train --seed '{model+1}' --save-dir "$out/{model}" --no-progress-bar \
        "${DEVICE_SETTINGS[@]}" "$@"
}

# translate_and_score NAME DATA REFERENCE CHECKPOINT BEAM OUT: BLEU of the test split; OUT.gen, OUT.hyp, OUT.json.
# DATA holds bin/, REFERENCE is the raw target side.
translate_and_score() {
    local name=$1 data=$2 reference=$3 checkpoint=$4 beam=$5 out=$6
    [[ -f "$checkpoint" ]] || die "$checkpoint does not exist; train first, or give the folder of the checkpoints"
    # --user-dir lets torch read fairseq's checkpoints with its safe loader. --required-batch-size-multiple 1 keeps
    # the last sentences, which some versions of fairseq drop.
    if ! fairseq-generate "$data/bin" --user-dir "$USER_DIR" --task translation --path "$checkpoint" \
        --gen-subset test --beam "$beam" --remove-bpe sentencepiece --max-tokens 4096 --num-workers 0 \
        --required-batch-size-multiple 1 "${DEVICE_SETTINGS[@]}" >"$out.gen" 2>"$out.gen.log"; then
        tail -n 20 "$out.gen.log" >&2
        die "fairseq-generate failed for $checkpoint; its output is in $out.gen.log"
    fi
    "$PYTHON" "$TOOLS/score.py" --label "$name" --generated "$out.gen" --reference "$reference" \
        --hypotheses "$out.hyp" --json "$out.json"
}
