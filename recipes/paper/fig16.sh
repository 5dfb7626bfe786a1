#!/usr/bin/env bash
# Figure 16: a k-th of the data, k times as often.
#
#   fig16.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

refuse "it is what its arms differ in" --data-fraction
for part in 1 2 4 8; do
    data=()
    [[ "$part" == 1 ]] || data=(--data-fraction "1/$part")
    names=(all_reduce predictions_1 alone)
    [[ "$part" == 1 ]] || names=("all_reduce_part_$part" "codistilled_part_$part" "alone_part_$part")
    arm imagenet "${names[0]}" "all_reduce, 1/$part of the data" --arm all_reduce "${data[@]}"
    arm imagenet "${names[1]}" "2-way, 1/$part of the data" --arm codistill "${data[@]}"
    arm_alone "${names[2]}" "one model, 1/$part of the data" "${data[@]}"
done
draw "Figure 16: less data" --kind arms --reference "all_reduce, 1/1 of the data"
