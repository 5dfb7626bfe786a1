#!/usr/bin/env bash
# BLEU of the test set, newstest2014: the best checkpoint, and the average of the last epochs.
#
#   evaluate.sh [--data DIR] CHECKPOINT_DIR...
#
# CHECKPOINT_DIR is one model's folder, such as checkpoints/wmt16_en_de/codistill/0. Beside the checkpoints it gets
# bleu.{gen,hyp,json} (best) and bleu_average.{gen,hyp,json}. Scores are detokenised sacreBLEU with its signature and,
# where Moses is installed, BLEU of tokens, with German compounds split as in the literature.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/translation.sh
source "$REPOSITORY/recipes/translation.sh"
# shellcheck source=recipes/wmt16_en_de/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

evaluate_folders "$@"
