#!/usr/bin/env bash
# Figures 14 and 15: models of different architecture teach each other.
#
#   fig14.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

small=$(scaled resnet18 wrn10_1)
middle=$(scaled resnet50 wrn16_1)
large=$(scaled resnext101_32x4d wrn16_2)
arm_codistilled "two $middle"
arm imagenet three_architectures "three" --arm codistill --mixed "$small,$middle,$large"
arm imagenet two_architectures "two" --arm codistill --mixed "$middle,$large"
draw "Figures 14 and 15: mixed architectures"
