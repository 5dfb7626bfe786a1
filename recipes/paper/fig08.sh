#!/usr/bin/env bash
# Figures 8 and 9: the setting of appendix A.4, with later drops and weight decay 1e-4, 1e-5, 0, for two architectures.
# all_reduce with the later drops as well, since they were tuned for the other arm.
#
#   fig08.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

large=$(large_model)
arm_all_reduce
arm imagenet shifted_all_reduce "all_reduce, later drops" --arm all_reduce --schedule shifted
arm imagenet shifted_codistilled "2-way, 1e-4, 1e-5, 0, later drops" --arm codistill --schedule a4
arm imagenet large_all_reduce "all_reduce, $large" --arm all_reduce --model "$large"
arm imagenet large_shifted_all_reduce "all_reduce, $large, later drops" --arm all_reduce --schedule shifted --model "$large"
arm imagenet large_shifted_codistilled "2-way, $large" --arm codistill --schedule a4 --model "$large"
draw "Figures 8 and 9: the schedule of appendix A.4"
