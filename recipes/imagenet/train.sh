#!/usr/bin/env bash
# Trains one arm of the comparison on ImageNet, with the schedules of the paper.
#
#   train.sh --arm plain|codistill|all_reduce --data DIR [--schedule step|shifted|a4|cosine] [--preset resnet50_goyal]
#            [--models 2 | --mixed MODEL,MODEL] [--one-of M] [--devices 8] [--rate own|effective] [--stretch 1] [--out DIR]
#            [settings of codistill-vision]
#
# plain       one model on --devices devices: as long as one of --models models
# codistill   --models such models that teach each other; weight decay falls where the learning rate drops
# all_reduce  one model on --models x --devices devices; as many updates as the others, of larger batches
#
# all_reduce goes through the data 90 times, one of M models 90/M times: as many updates. M is --models, or --one-of:
# --models 4 --one-of 2 makes four models train as long as each of two would.
#
# --schedule  step: Goyal's drops; shifted: the tuned ones, later; a4: these with appendix A.4's weight decay; cosine.
#             Default: step for all_reduce, shifted for the others
# --mixed resnet18,resnet50: codistill with models of these architectures, instead of --models equal ones
# --rate effective: codistilled and plain models learn at the rate that M times their batch would have; M divides the preset's
#             lr_batch_size
# --stretch 0.5: half of the updates, with all schedules shortened
#
# DIR holds train/ and val/, with a folder of images for each class. Everything but the options above goes to
# codistill-vision last, and so wins: train.sh --arm codistill --data DIR --codistill-interval 10
# Model i, its log.jsonl and its checkpoints are in OUT/i (default OUT: checkpoints/imagenet/ARM).
# SCALE=small: WRN-16-1 on 16 pixels, 7,020 updates; DIR is what tools/shrink_images.py made of CIFAR-10.
# SMOKE=1: three updates on images made by code, on the CPU; needs no --data.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/vision.sh
source "$REPOSITORY/recipes/vision.sh"
# shellcheck source=recipes/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
# shellcheck source=recipes/imagenet/arms.sh
source "$(dirname "${BASH_SOURCE[0]}")/arms.sh"

train_images "$@"
