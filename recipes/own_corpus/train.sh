#!/usr/bin/env bash
# Two models of a language pair of your own that teach each other, from text files to scores and translations to read.
#
#   train.sh --source en --target fr --from DIR [--out checkpoints/own_corpus/en-fr] [further options] [fairseq settings]
#
# DIR holds one pair of files, NAME.en and NAME.fr, a sentence a line, which is split here; or train, valid and test of
# each, of which what is missing is taken from train. Plain or .gz. Sizes go by the amount of text, the codec by the link;
# every choice is printed, and kept in OUT/choices.txt. To choose for yourself:
#
#   --link 20mbit        what lies between the models: local (default; all on this machine), or a speed
#   --size small         of the model: tiny, small, medium or large
#   --vocab-size N       joint symbols, at most
#   --codec tokens:16    of docs/codecs.md
#   --models 2           how many
#   --devices 1          of each
#
# Everything else goes to fairseq-train last, and so wins (--max-epoch 3), and all that follows a --.
# Each model on a machine of its own: the same command on all, with
#
#   --model I --addresses HOST:PORT,HOST:PORT --keys DIR      which of them this is, where each listens, codistill-keys' folder
#
# A training that is started again with the same --out goes on from its last checkpoint. SMOKE=1: a tiny run on embedded
# text. DRY_RUN=1: the text is prepared, what is chosen and the commands are shown, nothing is trained. OUT gets data/, a folder a model, translations.txt and report/report.html.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/translation.sh
source "$REPOSITORY/recipes/translation.sh"
# shellcheck source=recipes/own_corpus/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

SOURCE='' TARGET='' FROM='' OUT='' LINK=local SIZE=auto VOCAB_SIZE='' CODEC=auto MODEL='' ADDRESSES='' KEYS=''
rest=() CHOSEN_EXCHANGE=()
SHARED+=(--share-devices) # it is to run on whatever is there
while [[ $# -gt 0 ]]; do
    case "$1" in
        --source) need_value "$1" $# && SOURCE=$2 && shift 2 ;;
        --target) need_value "$1" $# && TARGET=$2 && shift 2 ;;
        --from) need_value "$1" $# && FROM=$2 && shift 2 ;;
        --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
        --link) need_value "$1" $# && LINK=$2 && shift 2 ;;
        --size) need_value "$1" $# && SIZE=$2 && shift 2 ;;
        --vocab-size) need_value "$1" $# && VOCAB_SIZE=$2 && shift 2 ;;
        --codec) need_value "$1" $# && CODEC=$2 && shift 2 ;;
        --models) need_value "$1" $# && NUM_MODELS=$2 && shift 2 ;;
        --devices) need_value "$1" $# && NUM_DEVICES=$2 && shift 2 ;;
        --model) need_value "$1" $# && MODEL=$2 && shift 2 ;;
        --addresses) need_value "$1" $# && ADDRESSES=$2 && shift 2 ;;
        --keys) need_value "$1" $# && KEYS=$2 && shift 2 ;;
        -h | --help) show_help ;;
        --) rest+=("${@:2}") && break ;;
        *) rest+=("$1") && shift ;;
    esac
done

if is_smoke && [[ -z "$FROM" ]]; then
    SOURCE="${SOURCE:-de}" TARGET="${TARGET:-en}"
    [[ "$SOURCE" =~ ^(de|en)$ && "$TARGET" =~ ^(de|en)$ ]] || die "the embedded text is German and English; give --from DIR"
fi
[[ -n "$SOURCE" && -n "$TARGET" ]] || die "--source and --target are needed: the endings of the files' names; see --help"
[[ "$SOURCE" != "$TARGET" ]] || die "--source and --target are both '$SOURCE'"
for number in "$NUM_MODELS" "$NUM_DEVICES" "${VOCAB_SIZE:-1}"; do
    [[ "$number" =~ ^[1-9][0-9]*$ ]] || die "--models, --devices and --vocab-size take whole numbers from 1 on, not '$number'"
done
if [[ -n "$MODEL$ADDRESSES$KEYS" ]]; then
    [[ -n "$MODEL" && -n "$ADDRESSES" && -n "$KEYS" ]] || die "--model, --addresses and --keys go together; see --help"
    IFS=, read -r -a addresses <<<"$ADDRESSES"
    [[ ${#addresses[@]} -eq "$NUM_MODELS" ]] || die "--addresses names ${#addresses[@]} places, and --models is $NUM_MODELS"
    [[ "$MODEL" =~ ^[0-9]+$ && "$MODEL" -lt "$NUM_MODELS" ]] || die "--model is '$MODEL'; it must be 0 to $((NUM_MODELS - 1))"
    if [[ "$LINK" == local && "$CODEC" == auto && ! "$ADDRESSES" =~ ^((127\.|localhost:|\[::1\])[^,]*(,|$))+$ ]]; then
        die "--addresses are on other machines: say what lies between, --link SPEED (such as 20mbit), or give --codec"
    fi
    [[ -d "$KEYS" ]] || die "--keys is '$KEYS'; make it with: codistill-keys $KEYS --num-models $NUM_MODELS"
fi
OUT="${OUT:-checkpoints/own_corpus/$SOURCE-$TARGET}"
check_paths "$OUT"
DATA="$OUT/data"
mkdir -p "$DATA"
# One at a time: what is prepared here would be replaced under a training. Its processes keep it until they end.
exec 9>"$OUT/lock"
if command -v flock >/dev/null; then
    flock -n -E 75 9 || [[ $? -ne 75 ]] ||
        die "another training, or a dry run, is in $OUT; wait for its end, or give another --out (with --model, each its own)"
fi
check_same_models "$OUT" "$NUM_MODELS models"

headline "1/6  text"
if is_smoke && [[ -z "$FROM" ]]; then
    FROM="$OUT/embedded"
    embedded_corpus "$FROM" 500 25
fi
[[ -n "$FROM" ]] || die "--from is needed: the folder of the text files; see --help"
[[ -d "$FROM" ]] || die "--from is '$FROM'; there is no such folder"
# What the models were trained on stays: other text has other symbols, and what was learned of the old ones would be
# taken for the new ones.
changed() { die "$1 is not that of the training in $OUT; give another --out, or remove it to begin anew"; }
if is_trained "$OUT" && [[ -f "$DATA/languages" && "$(<"$DATA/languages")" != "$SOURCE-$TARGET" ]]; then
    changed "the direction ($SOURCE-$TARGET instead of $(<"$DATA/languages"))"
fi
rm -rf "${DATA:?}/new"
"$PYTHON" "$TOOLS/own_text.py" --from "$FROM" --out "$DATA/new" --languages "$SOURCE" "$TARGET"
if is_trained "$OUT" && [[ -d "$DATA/raw" ]] && ! diff -rq "$DATA/raw" "$DATA/new" >/dev/null; then
    rm -r "$DATA/new"
    changed "the text in $FROM"
fi
rm -rf "${DATA:?}/raw"
mv "$DATA/new" "$DATA/raw"
echo "$SOURCE-$TARGET" >"$DATA/languages"

# choose [STEP_S]: prints what is chosen and why; sets CHOSEN_*.
choose() {
    local more=()
    [[ -z "$VOCAB_SIZE" ]] || more+=(--vocab-size "$VOCAB_SIZE")
    [[ -z "${1:-}" ]] || more+=(--step-s "$1")
    if has_gpu; then more+=(--gpu); fi
    "$PYTHON" "$TOOLS/choose.py" --raw "$DATA/raw" --out "$DATA/choices.sh" --languages "$SOURCE" "$TARGET" --size "$SIZE" \
        --codec "$CODEC" --link "$LINK" --models "$NUM_MODELS" "${more[@]}" \
        -- "${SMOKE_SETTINGS[@]}" "${rest[@]}" >"$DATA/choices.txt"
    # shellcheck disable=SC1091
    source "$DATA/choices.sh"
    settings=("${SETTINGS[@]}" "${CHOSEN_SETTINGS[@]}" --max-epoch "$CHOSEN_MAX_EPOCH" "${SMOKE_SETTINGS[@]}")
}

choose
headline "2/6  subwords"
asked=${VOCAB_SIZE:-${SMOKE_VOCAB_SIZE:-$CHOSEN_VOCAB_SIZE}}
if is_trained "$OUT" && [[ -f "$DATA/vocab_size" && "$(<"$DATA/vocab_size")" != "$asked" ]]; then
    changed "--vocab-size (or --size, which it follows from): $asked instead of $(<"$DATA/vocab_size"), it"
fi
if is_trained "$OUT" && [[ -f "$DATA/bin/dict.$TARGET.txt" ]]; then
    echo "as they were"
else
    binarise "$DATA" "$asked" at-most
    echo "$asked" >"$DATA/vocab_size"
fi
VOCAB_SIZE=$(($(wc -l <"$DATA/bin/dict.$TARGET.txt") + 4)) # fairseq adds four symbols of its own

headline "3/6  choices"
if [[ "$LINK" != local && "$CODEC" == auto ]] && is_dry_run && [[ ! -s "$OUT/step_s" ]]; then
    choose
    echo "exchange: follows from the time of an update, which a dry run does not measure; shown with fp16" >>"$DATA/choices.txt"
elif [[ "$LINK" != local && "$CODEC" == auto ]]; then
    # Measured once: another figure might give another interval, which the other models, or the first part of this
    # training, do not have.
    if [[ ! -s "$OUT/step_s" ]] || { ! is_trained "$OUT" && ! is_dry_run; }; then
        # Not a .log: reports would take it for a training.
        step_s=$(measured_step_s "$DATA/bin" "$OUT/step_s.txt" "${settings[@]}" --codistill-divergence kl "${rest[@]}")
        echo "$step_s" >"$OUT/step_s"
    fi
    step_s=$(<"$OUT/step_s")
    choose "$step_s"
    echo "an update takes $step_s s here, measured over the last of 12 of one model alone" >>"$DATA/choices.txt"
else
    choose
fi
cat "$DATA/choices.txt"
is_dry_run || mv "$DATA/choices.txt" "$OUT/choices.txt" # of what is trained, and of no plan or refusal
settings+=("${CHOSEN_EXCHANGE[@]}" --codistill-weight 1 "${rest[@]}") # what was typed wins

headline "4/6  training: $NUM_MODELS models teach each other, into $OUT"
if [[ -n "$MODEL" ]]; then
    train_one_of "$NUM_MODELS" "$MODEL" "$NUM_DEVICES" "$ADDRESSES" "$KEYS" "$DATA/bin" "$OUT" "${settings[@]}"
    models=("$MODEL")
else
    train_codistilled "$NUM_MODELS" "$NUM_DEVICES" "$DATA/bin" "$OUT" "${settings[@]}"
    mapfile -t models < <(seq 0 $((NUM_MODELS - 1)))
fi
if is_dry_run; then exit 0; fi

headline "5/6  translation of the test, beam $BEAM"
named=()
for model in "${models[@]}"; do
    translate_and_score "model $model" "$DATA" "$OUT/$model/checkpoint_best.pt" "$OUT/$model/bleu"
    named+=("model $model=$OUT/$model/bleu.hyp")
done

headline "6/6  to read"
"$PYTHON" "$TOOLS/translations.py" --source "$DATA/raw/test.$SOURCE" --reference "$DATA/raw/test.$TARGET" \
    --out "$OUT/translations.txt" "${named[@]}"
run_module fairseq_codistill.report.page "$OUT" | grep '^page: '
