#!/usr/bin/env bash
# Table 2: BLEU of n translation models that teach each other, after the same number of updates. Label smoothing is removed
# where models are taught (A.5), and kept for the one that is alone.
#
#   tab02.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

refuse "it is what its arms differ in" --models --one-of
recipe=$(scaled iwslt14_de_en multi30k_en_de)
embedded_data "$recipe"
arm "$recipe" plain "n = 1" --arm plain
score "$recipe" plain
# Not in the paper: what of a difference to n = 1 is that of label smoothing.
arm "$recipe" plain_no_smoothing "n = 1, no label smoothing" --arm plain --label-smoothing 0
score "$recipe" plain_no_smoothing
numbers=$(scaled "2 4 8" "2 4")
if is_smoke; then numbers="2 4"; fi
for models in $numbers; do
    arm "$recipe" "n_$models" "n = $models" --arm codistill --models "$models" --one-of 2 --label-smoothing 0
    score "$recipe" "n_$models"
done
draw "Table 2: number of translation models"
