#!/usr/bin/env bash
# Figure 7: how far the parameters are from their start, with weight decay that stays the same. One model alone as well: what
# is seen may be the batch and its learning rate, and not the peers.
#
#   fig07.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

arm_all_reduce
arm_constant_decay 1e-4
arm imagenet plain_step "one model" --arm plain --schedule step
draw "Figure 7: distance from the initial parameters" --panels distance
