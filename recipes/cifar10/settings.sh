# shellcheck shell=bash disable=SC2034
# Every setting of this recipe; train.sh reads it after common.sh. The presets are in vision/configs.

PRESET=wrn16_1_cifar # for a CPU; wrn28_10_cifar is that of the paper
NUM_DEVICES=1        # of one model
SETTINGS=()          # for all arms
OUT_DEFAULT=checkpoints/cifar10

# The first group of the multi-view arms: "frozen", "pretrained" (and trained on) or "random".
FIRST_GROUP=random

if is_small; then # on what tools/shrink_images.py made of CIFAR-10
    PRESET=wrn10_2_cifar
    OUT_DEFAULT+=-small
fi
if is_smoke; then
    OUT_DEFAULT+=-smoke
    SETTINGS+=(
        --image-size 8 --batch-size 16 --lr-batch-size 0 --max-updates 12 --log-updates 4 --num-workers 0
        --no-channels-last --cpu
    )
fi
