#!/usr/bin/env bash
# Figures 14 and 15: models of different architecture teach each other; beside them as many of one architecture, all with
# the same number of updates.
#
#   fig14.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

refuse "it is what its arms differ in" --models --mixed --one-of
small=$(scaled resnet18 wrn10_1)
middle=$(scaled resnet50 wrn16_1)
large=$(large_model)
arm_codistilled "two $middle"
arm imagenet three_alike "three $middle" --arm codistill --models 3 --one-of 2
arm imagenet three_architectures "three" --arm codistill --mixed "$small,$middle,$large" --one-of 2
arm imagenet two_architectures "two" --arm codistill --mixed "$middle,$large"
draw "Figures 14 and 15: mixed architectures"
