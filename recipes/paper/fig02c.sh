#!/usr/bin/env bash
# Figure 2 c, figure 11 and table 1: larger batches, learning rate and number of updates scaled.
#
#   fig02c.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

refuse "the batch is what its arms differ in, by devices or images" --devices --batch-size --update-freq
for batch in $(scaled "128 256 512 1024 2048" "16 32 64 128 256"); do
    if is_small; then
        size=(--batch-size "$batch")
    else
        size=(--devices $((batch / 32)))
    fi
    is_smoke && size=(--devices 1)
    arm imagenet "batch_$batch" "2 x $batch" --arm codistill "${size[@]}"
done
draw "Figure 2 c, figure 11, table 1: batch size"
