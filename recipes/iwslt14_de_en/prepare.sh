#!/usr/bin/env bash
# IWSLT'14, German to English: raw text, joint BPE, and fairseq's binary data.
#
#   prepare.sh [--from DIR] [--out DIR] [--vocab-size 10000] [--subwords sentencepiece|moses]
#
# DIR holds de-en.tgz or what is in it, in any folder below: train.tags.de-en.{de,en} and IWSLT14.*.xml. Without --from the
# public archive is downloaded. Every 23rd training pair is for validation; dev2010, dev2012 and tst2010 to tst2012 are
# the test. --subwords moses: tokenised, lower-cased, subword-nmt, as fairseq's own example; needs the extra 'moses'.
# OUT gets raw/, bpe/ and bin/. SMOKE=1 takes the embedded corpus.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/translation.sh
source "$REPOSITORY/recipes/translation.sh"
# shellcheck source=recipes/iwslt14_de_en/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

prepare_corpus iwslt14 moses-lower-case "$ARCHIVE" -- "$@"
