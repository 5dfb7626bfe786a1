#!/usr/bin/env bash
# Not in the paper: translation, validation NLL against bits. all_reduce against predictions in full, sampled classes,
# sampled symbols and checkpoints; all after the same number of updates.
#
#   frontier_translation.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see
#   paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

recipe=$(scaled wmt16_en_de multi30k_en_de)
embedded_data "$recipe"
interval=$(scaled 1000 50)
arm "$recipe" all_reduce all_reduce --arm all_reduce
arm "$recipe" codistill "logits as fp16, T = 1" --arm codistill
arm "$recipe" fp16_10 "logits as fp16, T = 10" --arm codistill --codistill-interval 10
sampled=columns:256
if is_smoke; then sampled=columns:64; fi # the embedded corpus has 300 symbols
arm "$recipe" columns "$sampled, T = 1" --arm codistill --codistill-codec "$sampled" \
    --codistill-divergence mse --codistill-weight "$(scaled 1 0.3)" --codistill-weight-growth 1.1 --codistill-weight-max 10
for number in 16 1; do # drawn from the softmax, so the divergence is that of distributions
    arm "$recipe" "tokens_$number" "tokens:$number, T = 1" --arm codistill --codistill-codec "tokens:$number" \
        --codistill-divergence kl --codistill-weight 1
done
arm "$recipe" "checkpoints_$interval" "checkpoints, T = $interval" \
    --arm codistill --codistill-exchange checkpoints --codistill-interval "$interval"
draw "Translation: accuracy at equal bits" --kind bits
