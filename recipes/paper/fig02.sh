#!/usr/bin/env bash
# Figure 2 a and b: weight decay that stays and that falls, from 5e-4 (section 4.1) and from 1e-4 (appendix A.4, Goyal et
# al.), and later drops of the learning rate. From one arm to the next one thing changes.
#
#   fig02.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

refuse "it is what its arms differ in" --schedule --weight-decay
arm_all_reduce
for value in 5e-4 1e-4; do
    arm_constant_decay "$value"
    arm imagenet "falling_decay_$value" "2-way, weight decay $value, 1e-5, 0" \
        --arm codistill --schedule step --weight-decay "$value" 1e-5 0
done
arm_codistilled "2-way, 5e-4, 1e-5, 0, later drops"
arm imagenet shifted_codistilled "2-way, 1e-4, 1e-5, 0, later drops" --arm codistill --schedule a4
draw "Figure 2 a, b: weight decay"
