#!/usr/bin/env bash
# Figure 17: n models with an n-th of the updates.
#
#   fig17.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

arm imagenet plain "one model" --arm plain
numbers="2 4 8"
if is_smoke; then numbers="2 4"; fi
for models in $numbers; do
    arm imagenet "shortened_$models" "$models-way, 1/$models of the updates" \
        --arm codistill --models "$models" --stretch "$(awk "BEGIN { print 1 / $models }")"
done
draw "Figure 17: n models with 1/n of the updates" --kind arms
