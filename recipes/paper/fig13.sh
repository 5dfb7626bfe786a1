#!/usr/bin/env bash
# Figure 13: predictions, checkpoints and all_reduce over the training.
#
#   fig13.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

refuse "it is what its arms differ in" --codistill-interval --codistill-exchange
interval=$(scaled 625 20)
arm_all_reduce
arm_codistilled "predictions, T = 1"
arm imagenet "checkpoints_$interval" "checkpoints, T = $interval" \
    --arm codistill --codistill-exchange checkpoints --codistill-interval "$interval"
draw "Figure 13: predictions, checkpoints and all_reduce"
