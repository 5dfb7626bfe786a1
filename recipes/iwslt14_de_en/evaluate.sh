#!/usr/bin/env bash
# BLEU of the test set, tst2010 to tst2012 with both dev sets: the best checkpoint, and the average of the last epochs.
#
#   evaluate.sh [--data DIR] CHECKPOINT_DIR...
#
# CHECKPOINT_DIR is one model's folder, such as checkpoints/iwslt14_de_en/codistill/0. Beside the checkpoints it gets
# bleu.{gen,hyp,json} (best) and bleu_average.{gen,hyp,json}. Scores are detokenised sacreBLEU with its signature and,
# where Moses is installed, BLEU of tokens.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/translation.sh
source "$REPOSITORY/recipes/translation.sh"
# shellcheck source=recipes/iwslt14_de_en/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

evaluate_folders "$@"
