#!/usr/bin/env bash
# Figure 7: how far the parameters are from their start.
#
#   fig07.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

arm_all_reduce
arm_codistilled
draw "Figure 7: distance from the initial parameters" --panels distance
