#!/usr/bin/env bash
# Figure 17: n models with an n-th of the updates, against one model with all of them (45 epochs), and one model alone with
# an n-th.
#
#   fig17.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

refuse "it is what its arms differ in" --stretch --models --one-of
arm_alone alone "one model"
numbers="2 4 8"
if is_smoke; then numbers="2 4"; fi
for models in $numbers; do
    part=$(LC_ALL=C awk "BEGIN { print 1 / $models }")
    arm imagenet "shortened_$models" "$models-way, 1/$models of the updates" \
        --arm codistill --models "$models" --one-of 2 --stretch "$part"
    arm_alone "shortened_alone_$models" "one model, 1/$models of the updates" --stretch "$part"
done
draw "Figure 17: n models with 1/n of the updates" --kind arms
