#!/usr/bin/env bash
# Figure 5: two models against four, after the same number of updates of each.
#
#   fig05.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

refuse "it is what its arms differ in" --models --one-of
arm_codistilled
arm imagenet four_way "4-way" --arm codistill --models 4 --one-of 2
draw "Figure 5: number of models"
