#!/usr/bin/env bash
# Figures 3 and 10: the learning rate falls along half a cosine, for two architectures.
#
#   fig03.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

arm imagenet cosine_all_reduce all_reduce --arm all_reduce --schedule cosine
arm imagenet cosine_codistilled "2-way" --arm codistill --schedule cosine
large=$(large_model)
arm imagenet cosine_large_all_reduce "all_reduce, $large" --arm all_reduce --schedule cosine --model "$large"
arm imagenet cosine_large_codistilled "2-way, $large" --arm codistill --schedule cosine --model "$large"
draw "Figures 3 and 10: cosine schedule"
