#!/usr/bin/env bash
# Not in the paper: accuracy against bits of what one would pick instead. Averaged gradients in full, as fp16, by PowerSGD
# and after local steps (torch's hooks), against predictions and checkpoints; all after the same number of updates.
#
#   frontier.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

refuse "it is what its arms differ in" --codistill-interval --codistill-exchange --codistill-codec --comm-hook
start=$(scaled 1000 100)
decay=(--hook-start-epochs 30) # of all_reduce, where its learning rate first falls
if is_smoke; then start=2 decay=(--hook-start 2); fi
interval=$(scaled 625 20)
arm_alone alone "one model"
arm_all_reduce
arm imagenet hook_fp16 "all_reduce, fp16" --arm all_reduce --comm-hook fp16
arm imagenet hook_powersgd "PowerSGD, rank 2" --arm all_reduce --comm-hook powersgd --hook-start "$start"
# Local steps begin where the learning rate first falls, as Lin et al. (2020) have it: before, it is that of all devices'
# batches together, too large for one device's own.
arm imagenet hook_localsgd "post-local SGD, period 10" \
    --arm all_reduce --comm-hook post_localsgd --localsgd-period 10 "${decay[@]}"
arm_codistilled "predictions, T = 1"
arm imagenet predictions_10 "predictions, T = 10" --arm codistill --codistill-interval 10
arm imagenet "checkpoints_$interval" "checkpoints, T = $interval" \
    --arm codistill --codistill-exchange checkpoints --codistill-interval "$interval"
draw "Accuracy at equal bits" --kind bits
