#!/usr/bin/env bash
# Figure 4: translation, all_reduce against 2-way codistillation with label smoothing that decays.
#
#   fig04.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

recipe=$(scaled wmt16_en_de multi30k_en_de)
embedded_data "$recipe"
decay=() name=codistill
if is_small; then
    decay=(--label-smoothing-decay-epochs 20) # the recipe of this scale has none, nor has its arm of that name
    name=decaying
fi
arm "$recipe" all_reduce all_reduce --arm all_reduce
arm "$recipe" "$name" "2-way, label smoothing decays" --arm codistill "${decay[@]}"
draw "Figure 4: translation, label smoothing decays"
