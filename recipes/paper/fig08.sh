#!/usr/bin/env bash
# Figures 8 and 9: the setting of appendix A.4, with later drops and weight decay 1e-4, 1e-5, 0.
#
#   fig08.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

arm imagenet shifted_all_reduce all_reduce --arm all_reduce --schedule shifted
arm imagenet shifted_codistilled "2-way" --arm codistill --schedule shifted
draw "Figures 8 and 9: the schedule of appendix A.4"
