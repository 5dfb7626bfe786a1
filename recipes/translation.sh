# shellcheck shell=bash disable=SC2034,SC2153
# What the recipes for translation share: reading corpora, the three arms, evaluation. Source it after common.sh and
# before settings.sh, which gives SOURCE, TARGET, SETTINGS, CODISTILL_SETTINGS, MAX_EPOCH (of the all_reduce arm; one of M
# models has an M-th, so as many updates; or empty where --max-update ends training), DATA_DEFAULT, OUT_DEFAULT, BEAM, LENGTH_PENALTY and NUM_AVERAGED.

USER_DIR="$(run_module fairseq_codistill.paths)"
NUM_MODELS=2
ONE_OF= # a model trains as one of so many: an n-th of the epochs, or of the batch; empty: NUM_MODELS
NUM_DEVICES=1
LENGTH_PENALTY=1

# What every translation of every recipe trains with: batches of any size are kept (some versions of fairseq drop a
# ragged last one), and the log is one that the report can read. The languages are always named: fairseq would read them
# off its files, and wrongly where one has a hyphen (pt-BR).
COMMON_SETTINGS=(--required-batch-size-multiple 1 --log-format json --no-progress-bar --num-workers 0)
# Where no launcher says so: fairseq would train one model on all devices of the host.
ONE_DEVICE=(--distributed-world-size 1)

# embedded_corpus DIR NUM_TRAIN NUM_OTHER: German and English number words.
embedded_corpus() {
    need_modules demo num2words
    run_module fairseq_codistill.demo.corpus --out "$1" --num-train "$2" --num-valid "$3" --num-test "$3"
}

# binarise OUT VOCAB_SIZE [sentencepiece|at-most|moses|moses-lower-case]: from OUT/raw joint BPE in OUT/bpe, and fairseq's
# data with one dictionary in OUT/bin. at-most: sentencepiece with fewer symbols where the text does not hold so many, and more where it has more characters. moses
# tokenises and splits with subword-nmt, as fairseq's own preparations do.
binarise() {
    local out=$1 vocab_size=$2 subwords=${3:-sentencepiece} tool=(bpe.py)
    case "$subwords" in
        at-most) tool=(bpe.py --at-most) subwords=sentencepiece ;;
        moses) tool=(moses.py) ;;
        moses-lower-case) tool=(moses.py --lower-case) ;;
    esac
    "$PYTHON" "$TOOLS/${tool[0]}" --raw "$out/raw" --out "$out/bpe" --languages "$SOURCE" "$TARGET" \
        --vocab-size "$vocab_size" "${tool[@]:1}"
    echo "$subwords" >"$out/subwords"
    # fairseq keeps dictionaries that it finds; those of an earlier preparation would be wrong.
    rm -rf "${out:?}/bin"
    if ! fairseq-preprocess --source-lang "$SOURCE" --target-lang "$TARGET" --joined-dictionary --destdir "$out/bin" \
        --trainpref "$out/bpe/train" --validpref "$out/bpe/valid" --testpref "$out/bpe/test" \
        --workers "${PREPROCESS_WORKERS:-1}" >"$out/preprocess.log" 2>&1; then
        tail -n 20 "$out/preprocess.log" >&2
        die "fairseq-preprocess failed; its output is in $out/preprocess.log"
    fi
}

# train_plain DATA OUT SETTINGS...: one model with fairseq's own task and criterion, checkpoints and train.log in OUT/0.
# --user-dir lets torch read its checkpoints with the safe loader, so that it goes on where it was stopped.
train_plain() {
    local data=$1 out=$2
    shift 2
    logged "$out" fairseq-train "$data" --source-lang "$SOURCE" --target-lang "$TARGET" --user-dir "$USER_DIR" --task translation --criterion label_smoothed_cross_entropy --seed "$FIRST_SEED" \
        --save-dir "$out/0" "${ONE_DEVICE[@]}" "${DEVICE_SETTINGS[@]}" "${COMMON_SETTINGS[@]}" "$@"
}

# train_codistilled NUM_MODELS DEVICES_PER_MODEL DATA OUT SETTINGS...: models that teach each other, model i in OUT/i.
# With one model it is ordinary data-parallel training: gradients are averaged by all_reduce.
train_codistilled() {
    local num_models=$1 devices_per_model=$2 data=$3 out=$4
    shift 4
    logged "$out" codistill-launch --num-models "$num_models" --devices-per-model "$devices_per_model" -- \
        fairseq-train "$data" --source-lang "$SOURCE" --target-lang "$TARGET" --user-dir "$USER_DIR" --task codistill_translation --criterion codistillation \
        --seed "{model+$FIRST_SEED}" --codistill-data-seed "$SEED" --save-dir "$out/{model}" "${DEVICE_SETTINGS[@]}" "${COMMON_SETTINGS[@]}" "$@"
}

# train_one_of NUM_MODELS MODEL DEVICES ADDRESSES KEYS DATA OUT SETTINGS...: one of several models that are each started by
# hand, on machines of their own; its checkpoints and train.log in OUT/MODEL.
train_one_of() {
    local num_models=$1 model=$2 devices=$3 addresses=$4 keys=$5 data=$6 out=$7
    shift 7
    # Whoever prepares its text first waits for the other; several ranks of a model may wait ten minutes for each other.
    ((devices > 1)) || set -- --codistill-start-timeout 3600 "$@"
    FIRST_MODEL=$model
    logged "$out" fairseq-train "$data" --source-lang "$SOURCE" --target-lang "$TARGET" --user-dir "$USER_DIR" --task codistill_translation --criterion codistillation \
        --seed $((FIRST_SEED + model)) --codistill-data-seed "$SEED" --save-dir "$out/$model" --distributed-world-size "$devices" "${DEVICE_SETTINGS[@]}" \
        "${COMMON_SETTINGS[@]}" --codistill-num-models "$num_models" --codistill-model-index "$model" \
        --codistill-addresses "$addresses" --codistill-keys "$keys" "$@"
}

# measured_step_s DATA LOG SETTINGS...: seconds of an update of one model alone, the mean of the last four of twelve.
measured_step_s() {
    local data=$1 log=$2
    shift 2
    # A folder of its own: fairseq goes on from what lies in --save-dir, whatever --no-save says.
    fairseq-train "$data" --source-lang "$SOURCE" --target-lang "$TARGET" --user-dir "$USER_DIR" --task codistill_translation --criterion codistillation --seed 1 \
        "${ONE_DEVICE[@]}" "${DEVICE_SETTINGS[@]}" "${COMMON_SETTINGS[@]}" "$@" --codistill-num-models 1 --no-save \
        --save-dir "$log.none" --disable-validation --log-interval 4 --max-update 12 >"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        die "the measured updates failed; the output is in $log"
    }
    rmdir "$log.none" 2>/dev/null || true
    "$PYTHON" - "$log" <<'END'
import sys
from fairseq_codistill.report.runlog import parse_line
rates = [found[1]["ups"] for line in open(sys.argv[1]) if (found := parse_line(line)) and found[0] == "train_inner" and "ups" in found[1]]
if not rates or not rates[-1] > 0:
    sys.exit(f"{sys.argv[1]} names no updates a second; the text may be too short for twelve updates")
print(f"{1 / rates[-1]:.3g}")
END
}

# download URL FILE: a whole file or an error; a failed download leaves nothing that looks like data.
download() {
    local url=$1 file=$2
    echo "$url"
    if command -v curl >/dev/null; then
        curl --fail --location --silent --show-error --retry 3 --connect-timeout 30 --output "$file.part" "$url" ||
            { rm -f "$file.part"; die "download of $url failed; fetch the files by hand, then use --from DIR"; }
    elif command -v wget >/dev/null; then
        wget --quiet --tries 3 --timeout 30 --output-document "$file.part" "$url" ||
            { rm -f "$file.part"; die "download of $url failed; fetch the files by hand, then use --from DIR"; }
    else
        die "neither curl nor wget is installed; install one, or give the folder of the files with --from"
    fi
    gzip --test "$file.part" 2>/dev/null ||
        { rm -f "$file.part"; die "$url did not give a gzip file; a proxy or login page? Use --from with a local folder"; }
    mv "$file.part" "$file"
}

# check_pairs RAW: both sides of a split have as many lines.
check_pairs() {
    local split num_source num_target
    for split in train valid test; do
        # Not wc, which counts ends of lines, and the last line may have none.
        num_source=$(awk 'END { print NR }' "$1/$split.$SOURCE")
        num_target=$(awk 'END { print NR }' "$1/$split.$TARGET")
        [[ "$num_source" -eq "$num_target" ]] ||
            die "$split: $num_source lines of $SOURCE and $num_target of $TARGET; the files do not belong together"
        echo "$split: $num_source pairs"
    done
}

# data_sum DATA: changes when the data are prepared anew. DATA is no pattern, whatever it is called.
data_sum() {
    local file files=()
    for file in "$1"/bin/dict.*.txt "$1"/bin/train*.idx; do [[ ! -f "$file" ]] || files+=("$file"); done # raw text has no index
    cat -- /dev/null "${files[@]}" | cksum
}

# refuse_other_data DATA SUM FILE WHAT: SUM, that of DATA, is what FILE says WHAT was made of. Data that were prepared anew
# have symbols that mean something else.
refuse_other_data() {
    [[ ! -f "$3" || "$(<"$3")" == "$2" ]] ||
        die "$1 is not what $4 was made of, or was prepared anew since: its symbols may mean something else; give another --out, or remove it"
}

# check_same_data DATA OUT: what was trained in OUT is not gone on with on other data; sets DATA_SUM.
check_same_data() {
    if is_dry_run; then return; fi
    DATA_SUM=$(data_sum "$1")
    if is_trained "$2"; then refuse_other_data "$1" "$DATA_SUM" "$2/data.sum" "$2"; fi
}

# keep_data_sum DATA OUT: likewise, of a folder of several trainings, whatever is in it; OUT notes it.
keep_data_sum() {
    if is_dry_run; then return; fi
    DATA_SUM=$(data_sum "$1")
    refuse_other_data "$1" "$DATA_SUM" "$2/data.sum" "$2"
    mkdir -p "$2"
    echo "$DATA_SUM" >"$2/data.sum"
}

# check_same_models OUT WHAT: the models in OUT are those of the same arm, and as many: others would go on from what these
# have learned, or teach nobody.
check_same_models() {
    if is_trained "$1" && [[ -f "$1/models.txt" && "$(<"$1/models.txt")" != "$2" ]]; then
        die "$1 holds $(<"$1/models.txt"), not $2; give another --out, or remove it"
    fi
    if ! is_dry_run; then
        mkdir -p "$1"
        echo "$2" >"$1/models.txt"
    fi
}

# check_paths PATH...: fairseq takes what stands before and after a colon, or a comma, for two paths.
check_paths() {
    local path
    for path in "$@"; do
        [[ "$path" != *[:,]* ]] ||
            die "'$path' has a ':' or ',', by which fairseq separates paths; give another --data or --out"
    done
}

# train_arm ARGUMENTS...: what train.sh does; its options are described there.
train_arm() {
    local arm='' data="$DATA_DEFAULT" out='' epochs=() rest=() teacher=''
    while [[ $# -gt 0 ]]; do
        case "$1" in
            --arm) need_value "$1" $# && arm=$2 && shift 2 ;;
            --models) need_value "$1" $# && NUM_MODELS=$2 && shift 2 ;;
            --one-of) need_value "$1" $# && ONE_OF=$2 && shift 2 ;;
            --devices) need_value "$1" $# && NUM_DEVICES=$2 && shift 2 ;;
            --teacher) need_value "$1" $# && teacher=$2 && shift 2 ;;
            --data) need_value "$1" $# && data=$2 && shift 2 ;;
            --out) need_value "$1" $# && out=$2 && shift 2 ;;
            -h | --help) show_help ;;
            --) rest+=("${@:2}") && break ;; # what bears the name of an option of ours, too
            *) rest+=("$1") && shift ;;
        esac
    done
    set -- "${rest[@]}"
    local number
    ONE_OF="${ONE_OF:-$NUM_MODELS}"
    for number in "$NUM_MODELS" "$ONE_OF" "$NUM_DEVICES"; do
        [[ "$number" =~ ^[1-9][0-9]*$ ]] || die "--models, --one-of and --devices take whole numbers from 1 on, not '$number'"
    done
    out="${out:-$OUT_DEFAULT/$arm}"
    check_paths "$data" "$out"
    if [[ ! -f "$data/bin/dict.$TARGET.txt" ]]; then
        is_dry_run || die "$data holds no prepared data; run $(prepare_command) --out $data first"
        PLAN=(--plan-classes "$VOCAB_SIZE_DEFAULT")
    fi
    check_same_data "$data" "$out"
    place_devices "$arm"
    if declare -F finish_settings >/dev/null; then
        finish_settings "$arm" # what depends on --models and --devices
    fi
    if [[ -n "$MAX_EPOCH" ]]; then
        number=$MAX_EPOCH
        if [[ "$arm" == all_reduce ]]; then number=$((MAX_EPOCH * NUM_MODELS)); fi
        [[ $((number % ONE_OF)) -eq 0 ]] ||
            die "one of $ONE_OF models has $number/$ONE_OF epochs, which is no whole number; give another --one-of"
        epochs=(--max-epoch $((number / ONE_OF)))
    fi
    [[ -z "$teacher" || "$arm" == taught ]] || die "--teacher is '$teacher', and --arm '$arm' has no teacher; give --arm taught"
    [[ "$arm" =~ ^(plain|codistill|all_reduce|taught)$ ]] || die "--arm is '$arm'; it must be plain, codistill, all_reduce or taught"
    [[ -n "$teacher" || "$arm" != taught ]] || die "--arm taught needs --teacher CHECKPOINT[:WEIGHT]"
    case "$arm" in
        codistill) check_same_models "$out" "$arm of $NUM_MODELS models" ;;
        all_reduce) check_same_models "$out" "$arm on the devices of $NUM_MODELS models" ;;
        *) check_same_models "$out" "$arm" ;;
    esac
    headline "training: $arm, into $out"
    if ! is_dry_run; then
        mkdir -p "$out"
        echo "$DATA_SUM" >"$out/data.sum"
    fi
    case "$arm" in
        plain)
            if [[ "$NUM_DEVICES" -eq 1 ]]; then
                train_plain "$data/bin" "$out" "${SETTINGS[@]}" "${epochs[@]}" "$@"
            else
                train_codistilled 1 "$NUM_DEVICES" "$data/bin" "$out" "${SETTINGS[@]}" "${epochs[@]}" "$@"
            fi
            ;;
        codistill)
            train_codistilled "$NUM_MODELS" "$NUM_DEVICES" "$data/bin" "$out" "${SETTINGS[@]}" "${epochs[@]}" \
                "${CODISTILL_SETTINGS[@]}" "$@"
            ;;
        all_reduce)
            train_codistilled 1 $((NUM_MODELS * NUM_DEVICES)) "$data/bin" "$out" "${SETTINGS[@]}" "${epochs[@]}" "$@"
            ;;
        taught)
            train_codistilled 1 "$NUM_DEVICES" "$data/bin" "$out" --codistill-teacher "$teacher" "${SETTINGS[@]}" \
                "${epochs[@]}" "${CODISTILL_SETTINGS[@]}" "$@"
            ;;
    esac
}

# evaluate_folders ARGUMENTS...: what evaluate.sh does; its options are described there.
evaluate_folders() {
    local data="$DATA_DEFAULT" folders=() folder
    while [[ $# -gt 0 ]]; do
        case "$1" in
            --data) need_value "$1" $# && data=$2 && shift 2 ;;
            -h | --help) show_help ;;
            -*) die "unknown argument '$1'; see --help" ;;
            *) folders+=("$1") && shift ;;
        esac
    done
    [[ ${#folders[@]} -gt 0 ]] || die "no folder of checkpoints given; see --help"
    [[ -f "$data/bin/dict.$TARGET.txt" ]] || die "$data holds no prepared data; run $(prepare_command) --out $data first"
    check_paths "$data" "${folders[@]}"
    for folder in "${folders[@]}"; do
        folder=${folder%/}
        headline "$folder"
        refuse_other_data "$data" "$(data_sum "$data")" "$folder/../data.sum" "$folder"
        translate_and_score "best checkpoint" "$data" "$folder/checkpoint_best.pt" "$folder/bleu"
        run_module fairseq_codistill.fairseq_side.average --checkpoint-dir "$folder" --last "$NUM_AVERAGED" \
            --out "$folder/checkpoint_average.pt"
        translate_and_score "average of the last $NUM_AVERAGED epochs" "$data" "$folder/checkpoint_average.pt" \
            "$folder/bleu_average"
    done
}

# prepare_command: what prepares the data of the recipe that was started, as one calls it.
prepare_command() {
    local file script=prepare.sh smoke=
    if is_smoke; then smoke="SMOKE=1 "; fi
    for file in "${BASH_SOURCE[@]}"; do
        if [[ -f "$(dirname "$file")/prepare.sh" ]]; then script="$(dirname "$file")/prepare.sh"; fi
    done
    printf '%s%s' "$smoke" "$script"
}

# translate_and_score NAME DATA CHECKPOINT OUT: BLEU of the test split; OUT.gen, OUT.hyp, OUT.json.
# DATA holds bin/, raw/, and in subwords the way that subwords were made.
translate_and_score() {
    local name=$1 data=$2 checkpoint=$3 out=$4 subwords=sentencepiece
    [[ -f "$checkpoint" ]] || die "$checkpoint does not exist; train first, or give the folder of the checkpoints"
    [[ ! -f "$data/subwords" ]] || subwords=$(<"$data/subwords")
    local remove_bpe=sentencepiece
    [[ "$subwords" == sentencepiece ]] || remove_bpe=subword_nmt
    # --user-dir lets torch read fairseq's checkpoints with its safe loader. --required-batch-size-multiple 1 keeps
    # the last sentences, which some versions of fairseq drop.
    if ! fairseq-generate "$data/bin" --source-lang "$SOURCE" --target-lang "$TARGET" --user-dir "$USER_DIR" --task translation --path "$checkpoint" \
        --gen-subset test --beam "$BEAM" --lenpen "$LENGTH_PENALTY" --remove-bpe "$remove_bpe" --max-tokens 4096 \
        --num-workers 0 --required-batch-size-multiple 1 "${DEVICE_SETTINGS[@]}" >"$out.gen" 2>"$out.gen.log"; then
        tail -n 20 "$out.gen.log" >&2
        die "fairseq-generate failed for $checkpoint; its output is in $out.gen.log"
    fi
    "$PYTHON" "$TOOLS/score.py" --label "$name" --generated "$out.gen" --reference "$data/raw/test.$TARGET" \
        --language "$TARGET" --subwords "$subwords" --hypotheses "$out.hyp" --json "$out.json"
}

# prepare_corpus CORPUS MOSES_KIND ARCHIVE_URL... -- ARGUMENTS...: what prepare.sh does for a corpus of a campaign, from
# its public archives or a folder that holds them, packed or not. CORPUS is one that tools/corpus.py knows; MOSES_KIND
# is what --subwords moses means for it: moses, or moses-lower-case.
prepare_corpus() {
    local corpus=$1 moses_kind=$2 urls=() from='' out="$DATA_DEFAULT" vocab_size="$VOCAB_SIZE_DEFAULT" url archive
    local subwords=sentencepiece beside=() archives=()
    shift 2
    while [[ "$1" != -- ]]; do urls+=("$1") && shift; done
    shift
    while [[ $# -gt 0 ]]; do
        case "$1" in
            --from) need_value "$1" $# && from=$2 && shift 2 ;;
            --out) need_value "$1" $# && out=$2 && shift 2 ;;
            --vocab-size) need_value "$1" $# && vocab_size=$2 && shift 2 ;;
            --subwords) need_value "$1" $# && subwords=$2 && shift 2 ;;
            -h | --help) show_help ;;
            *) die "unknown argument '$1'; see --help" ;;
        esac
    done
    case "$subwords" in
        sentencepiece) ;;
        moses) subwords=$moses_kind ;;
        *) die "--subwords is '$subwords'; it must be sentencepiece or moses" ;;
    esac
    mkdir -p "$out/raw"
    if [[ -z "$from" ]] && is_smoke; then
        headline "raw text: the embedded corpus (SMOKE=1)"
        embedded_corpus "$out/raw" 500 25
    else
        if [[ -z "$from" ]]; then
            headline "raw text: download"
            from="$out/download"
            mkdir -p "$from"
            for url in "${urls[@]}"; do
                [[ -f "$from/${url##*/}" ]] || download "$url" "$from/${url##*/}"
            done
        fi
        [[ -d "$from" ]] || die "--from is '$from'; there is no such folder"
        headline "raw text: from $from"
        mapfile -t archives < <(find -L "$from" -name '*.tgz' -type f -not -path "$out/unpacked/*" | sort)
        if [[ ${#archives[@]} -gt 0 ]]; then # else what is there may be what was unpacked before
            rm -rf "${out:?}/unpacked"
            mkdir -p "$out/unpacked"
            beside=(--from "$out/unpacked")
        fi
        for archive in "${archives[@]}"; do
            tar --extract --gzip --file "$archive" --directory "$out/unpacked" ||
                die "$archive cannot be unpacked; remove it, or fetch it again"
        done
        "$PYTHON" "$TOOLS/corpus.py" "$corpus" --from "$from" "${beside[@]}" --out "$out/raw" --languages "$SOURCE" "$TARGET"
    fi
    check_pairs "$out/raw"
    headline "joint BPE of $vocab_size symbols ($subwords), fairseq-preprocess"
    binarise "$out" "$vocab_size" "$subwords"
    echo "prepared: $out (train with: train.sh --arm plain --data $out)"
}
