#!/usr/bin/env bash
# Figure 12: translation, all_reduce against 2-way codistillation without label smoothing.
#
#   fig12.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

recipe=$(scaled wmt16_en_de multi30k_en_de)
embedded_data "$recipe"
arm "$recipe" all_reduce all_reduce --arm all_reduce
arm "$recipe" no_smoothing "2-way, no label smoothing" \
    --arm codistill --label-smoothing 0 --label-smoothing-decay-updates 0
draw "Figure 12: translation, no label smoothing"
