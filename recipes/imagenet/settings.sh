# shellcheck shell=bash disable=SC2034
# Every setting of this recipe; train.sh and slurm.sbatch read it after vision.sh. The presets are in vision/configs.

PRESET=resnet50_goyal # or resnext101_goyal; --model MODEL at the end takes any model of timm
PRESET_MODELS=2       # the presets of plain and codistilled models (half, codistill_*) are those of one of two
SCHEDULE=             # step, shifted, a4 or cosine; empty: step for all_reduce, shifted for the others
RATE=own              # the learning rate is that of a model's own batch, or of the "effective" one of all models
NUM_DEVICES=8         # of one model; each takes batches of 32
DATASET=imagefolder
SETTINGS=()           # for all arms
OUT_DEFAULT=checkpoints/imagenet

if is_small; then # the same schedules and numbers of epochs on 10,000 images of CIFAR-10
    PRESET=wrn16_1_goyal
    NUM_DEVICES=1
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
