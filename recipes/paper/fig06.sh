#!/usr/bin/env bash
# Figure 6: multi-view. Each model sees one of 8 splits of the channels after the first group, which is pretrained and
# frozen, pretrained and trained on, or begins at random (then all models see the same split of their own).
#
#   fig06.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

preset=$(scaled wrn28_10_cifar wrn10_2_cifar)
numbers=$(scaled "1 2 4 8" "1 2 4")
if is_smoke; then
    preset=wrn10_2_cifar # eight models of 36 million parameters are no test for a laptop
    numbers="1 2"
fi
arm cifar10 all_channels "all channels, one model" --arm plain --preset "$preset"
pretrained="$OUT/cifar10/all_channels/SEED/0/checkpoint_last.pt"
for group in frozen pretrained random; do
    from=()
    [[ "$group" == random ]] || from=(--from "$pretrained")
    for models in $numbers; do
        arm cifar10 "${group}_$models" "$group, n = $models" \
            --arm multiview --preset "$preset" --first-group "$group" --models "$models" "${from[@]}"
    done
done
draw "Figure 6: multi-view" --kind arms
