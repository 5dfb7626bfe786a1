#!/usr/bin/env bash
# BLEU of the test set, test_2016_flickr: the best checkpoint, and the average of the last epochs.
#
#   evaluate.sh [--data DIR] CHECKPOINT_DIR...
#
# CHECKPOINT_DIR is one model's folder, such as checkpoints/multi30k_en_de/codistill/0. Beside the checkpoints it gets
# bleu.{gen,hyp,json} (best) and bleu_average.{gen,hyp,json}. Scores are detokenised sacreBLEU with its signature.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/translation.sh
source "$REPOSITORY/recipes/translation.sh"
# shellcheck source=recipes/multi30k_en_de/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

evaluate_folders "$@"
