#!/usr/bin/env bash
# Figure 6: multi-view. Each model sees one of 8 splits of the channels after the first group, which is pretrained and
# frozen, pretrained and trained on, or begins at random (then all models see the same split of their own). For every n, all
# 8 splits are seen by one model each, in 8 / n groups of n models, and their mean is drawn.
#
# The figure can only show something where a split tells less than all channels: it ends (unless FORCE=1) where all channels
# are not 3 points better than one frozen split.
#
#   fig06.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

preset=$(scaled wrn28_10_cifar wrn10_2_cifar)
numbers="1 2 4 8"
rotations=all
if is_smoke; then
    preset=wrn10_2_cifar # eight models of 36 million parameters are no test for a laptop
    numbers="1 2"
    rotations=1
fi
view() { # view GROUP N
    local from=()
    [[ "$1" == random ]] || from=(--from "$OUT/cifar10/all_channels/@SEED@/0/checkpoint_last.pt")
    arm cifar10 "$1_$2" "$1, n = $2" --arm multiview --preset "$preset" --first-group "$1" --models "$2" \
        --rotations "$rotations" "${from[@]}"
}
arm cifar10 all_channels "all channels, one model" --arm plain --one-of 1 --preset "$preset"
view frozen 1
require_lead 3 cifar10/all_channels cifar10/frozen_1
for group in frozen pretrained random; do
    for models in $numbers; do
        if [[ "$group $models" != "frozen 1" ]]; then view "$group" "$models"; fi
    done
done
draw "Figure 6: multi-view" --kind arms
