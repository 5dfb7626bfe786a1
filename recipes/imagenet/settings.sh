# shellcheck shell=bash disable=SC2034
# Every setting of this recipe; train.sh reads it after common.sh. The presets are in vision/configs.

PRESET=resnet50_goyal # or resnext101_goyal; --model MODEL at the end takes any model of timm
SCHEDULE=step         # step, shifted or cosine
NUM_DEVICES=8         # of one model; each takes batches of 32
STRETCH=1             # an epoch of the schedule is so many runs through the data
DATASET=imagefolder
SETTINGS=()           # for all arms
OUT_DEFAULT=checkpoints/imagenet

if is_small; then # the same schedules in a tenth of the images, on CIFAR-10
    PRESET=wrn16_1_goyal
    NUM_DEVICES=1
    STRETCH=0.1
    DATASET=cifar10
    OUT_DEFAULT+=-small
fi
if is_smoke; then
    NUM_DEVICES=1
    DATASET=fake
    OUT_DEFAULT+=-smoke
    SETTINGS+=(
        --image-size 64 --fake-images 64 --fake-classes 10 --batch-size 4 --max-updates 3 --log-updates 1 --num-workers 0
        --no-channels-last --cpu
    )
fi
