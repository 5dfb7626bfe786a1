#!/usr/bin/env bash
# WMT'16, English to German: raw text, joint BPE, and fairseq's binary data.
#
#   prepare.sh [--from DIR] [--out DIR] [--vocab-size 32000] [--subwords sentencepiece|moses]
#
# DIR holds the public archives or what is in them, in any folder below: europarl-v7.de-en.{en,de}, commoncrawl.de-en.*,
# news-commentary-v11.de-en.*, newstest2013 (validation) and newstest2014 (test), .sgm or plain. Without --from the
# archives are downloaded (1.7 GB). --subwords moses: tokenised, subword-nmt, as in the literature; needs the extra 'moses'.
# OUT gets raw/, bpe/ and bin/. SMOKE=1 takes the embedded corpus.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/translation.sh
source "$REPOSITORY/recipes/translation.sh"
# shellcheck source=recipes/wmt16_en_de/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

prepare_corpus wmt16 moses "${ARCHIVES[@]}" -- "$@"
