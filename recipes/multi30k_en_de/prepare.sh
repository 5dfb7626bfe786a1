#!/usr/bin/env bash
# Multi30k, English to German: raw text, joint BPE, and fairseq's binary data.
#
#   prepare.sh [--from DIR] [--out DIR] [--vocab-size 3000] [--every 1]
#
# DIR holds {train,val,test_2016_flickr}.{en,de}, plain or .gz. Without --from the public files are downloaded.
# OUT gets raw/, bpe/ and bin/. --every 3 keeps every third training pair, from the first on, for quick trials.
# SMOKE=1 takes the embedded corpus.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/translation.sh
source "$REPOSITORY/recipes/translation.sh"
# shellcheck source=recipes/multi30k_en_de/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

FROM=
OUT="$DATA_DEFAULT"
VOCAB_SIZE="$VOCAB_SIZE_DEFAULT"
EVERY=1
while [[ $# -gt 0 ]]; do
    case "$1" in
        --from) need_value "$1" $# && FROM=$2 && shift 2 ;;
        --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
        --vocab-size) need_value "$1" $# && VOCAB_SIZE=$2 && shift 2 ;;
        --every) need_value "$1" $# && EVERY=$2 && shift 2 ;;
        -h | --help) show_help ;;
        *) die "unknown argument '$1'; see --help" ;;
    esac
done

# take NAME FILE: the raw file NAME of $FROM, unpacked if need be, becomes FILE.
take() {
    local name=$1 file=$2
    if [[ -f "$FROM/$name" ]]; then
        cat "$FROM/$name" >"$file.part" # which may be that very file
    elif [[ -f "$FROM/$name.gz" ]]; then
        gzip --decompress --stdout "$FROM/$name.gz" >"$file.part"
    else
        die "$FROM holds neither $name nor $name.gz; --from takes a folder with {train,val,test_2016_flickr}.{$SOURCE,$TARGET}"
    fi
    [[ -s "$file.part" ]] || die "$FROM/$name is empty"
    mv "$file.part" "$file"
}

[[ "$EVERY" =~ ^[1-9][0-9]*$ ]] || die "--every is '$EVERY'; it must be a whole number, 1 or more"
mkdir -p "$OUT/raw"
if is_smoke; then
    headline "raw text: the embedded corpus (SMOKE=1)"
    embedded_corpus "$OUT/raw" 500 25
else
    if [[ -z "$FROM" ]]; then
        headline "raw text: download"
        FROM="$OUT/download"
        mkdir -p "$FROM"
        for entry in "${SPLIT_FILES[@]}"; do
            IFS=: read -r _ name num_sentences <<<"$entry"
            for language in "$SOURCE" "$TARGET"; do
                file="$name.$language.gz"
                [[ -f "$FROM/$file" ]] || download "$DOWNLOAD_BASE/$file" "$FROM/$file"
                num_found=$(gzip --decompress --stdout "$FROM/$file" | wc -l)
                [[ "$num_found" -eq "$num_sentences" ]] ||
                    die "$FROM/$file has $num_found lines, not $num_sentences; remove it to load it again"
            done
        done
    fi
    headline "raw text: from $FROM"
    for entry in "${SPLIT_FILES[@]}"; do
        IFS=: read -r split name _ <<<"$entry"
        for language in "$SOURCE" "$TARGET"; do
            take "$name.$language" "$OUT/raw/$split.$language"
        done
    done
fi
if [[ "$EVERY" -gt 1 ]]; then
    for language in "$SOURCE" "$TARGET"; do
        awk "NR % $EVERY == 1" "$OUT/raw/train.$language" >"$OUT/raw/train.$language.part"
        mv "$OUT/raw/train.$language.part" "$OUT/raw/train.$language"
    done
fi
check_pairs "$OUT/raw"

headline "joint BPE of $VOCAB_SIZE symbols, fairseq-preprocess"
binarise "$OUT" "$VOCAB_SIZE"
echo "prepared: $OUT (train with: train.sh --arm plain --data $OUT)"
