#!/usr/bin/env bash
# Figure 2 a and b: weight decay that stays, that falls, and later drops of the learning rate.
#
#   fig02.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

arm_all_reduce
arm imagenet constant_decay "2-way, weight decay 1e-4" --arm codistill --weight-decay 1e-4 --weight-decay-milestones
arm_codistilled "2-way, weight decay 5e-4, 1e-5, 0"
arm imagenet later_drops "2-way, falling weight decay, later drops" \
    --arm codistill --schedule shifted --weight-decay 5e-4 1e-5 0
draw "Figure 2 a, b: weight decay"
