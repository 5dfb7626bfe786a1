# shellcheck shell=bash disable=SC2034
# Every setting of this recipe; train.sh reads it after common.sh. The presets are in vision/configs.

PRESET=resnet50_goyal # or resnext101_goyal; --model MODEL at the end takes any model of timm
SCHEDULE=step         # step, shifted or cosine
NUM_DEVICES=8         # of one model; each takes batches of 32
SETTINGS=()           # for all arms
OUT_DEFAULT=checkpoints/imagenet

if is_smoke; then
    NUM_DEVICES=1
    OUT_DEFAULT+=-smoke
    SETTINGS+=(
        --image-size 64 --fake-images 64 --fake-classes 10 --batch-size 4 --max-updates 3 --log-updates 1 --num-workers 0
        --no-channels-last --cpu
    )
fi
