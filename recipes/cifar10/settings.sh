# shellcheck shell=bash disable=SC2034
# Every setting of this recipe; train.sh reads it after vision.sh. The presets are in vision/configs.

PRESET=wrn16_1_cifar # for a CPU; wrn28_10_cifar is that of the paper
PRESET_MODELS=1      # the epochs of the presets are those of all_reduce, and of each multi-view model
NUM_DEVICES=1        # of one model
DATASET=cifar10
SETTINGS=()          # for all arms
OUT_DEFAULT=checkpoints/cifar10

# The first group of the multi-view arms: "frozen", "pretrained" (and trained on) or "random".
FIRST_GROUP=random
SPLITS=8 # of the channels after the first group

if is_small; then # on what tools/shrink_images.py made of CIFAR-10
    PRESET=wrn10_2_cifar
    OUT_DEFAULT+=-small
fi
if is_smoke; then
    DATASET=digits
    OUT_DEFAULT+=-smoke
    SETTINGS+=(
        --augmentation crop --image-size 8 --batch-size 16 --lr-batch-size 0 --max-updates 12 --log-updates 4
        --num-workers 0 --no-channels-last --cpu
    )
fi
