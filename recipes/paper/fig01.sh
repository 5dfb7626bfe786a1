#!/usr/bin/env bash
# Figure 1: accuracy against the bits that a device sends, predictions and checkpoints at several intervals.
#
#   fig01.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

refuse "it is what its arms differ in" --codistill-interval --codistill-exchange
arm_all_reduce
arm_codistilled "predictions, T = 1"
for interval in 5 10 100; do
    arm imagenet "predictions_$interval" "predictions, T = $interval" --arm codistill --codistill-interval "$interval"
done
for interval in $(scaled "625 1250 2500 5000" "20 40 80 160"); do
    arm imagenet "checkpoints_$interval" "checkpoints, T = $interval" \
        --arm codistill --codistill-exchange checkpoints --codistill-interval "$interval"
done
draw "Figure 1: accuracy against bits" --kind bits
