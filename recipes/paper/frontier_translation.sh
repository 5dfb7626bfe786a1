#!/usr/bin/env bash
# Not in the paper: translation, validation NLL against bits. all_reduce against predictions in full, sampled classes,
# sampled symbols and checkpoints; all after the same number of updates.
#
#   frontier_translation.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see
#   paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

refuse "it is what its arms differ in" --codistill-interval --codistill-exchange --codistill-codec
recipe=$(scaled wmt16_en_de multi30k_en_de)
embedded_data "$recipe"
interval=$(scaled 1000 50)
decay=() decaying=
if is_small; then
    decay=(--label-smoothing-decay-epochs 20) # the recipe of this scale has none, nor have its arms of those names
    decaying=_decaying
fi
arm "$recipe" all_reduce all_reduce --arm all_reduce
codistilled=codistill
if is_small; then codistilled=decaying; fi # as fig04.sh has it
arm "$recipe" "$codistilled" "logits as fp16, T = 1" --arm codistill "${decay[@]}"
arm "$recipe" "fp16_10$decaying" "logits as fp16, T = 10" --arm codistill "${decay[@]}" --codistill-interval 10
sampled=columns:256
if is_smoke; then sampled=columns:64; fi # the embedded corpus has 300 symbols
arm "$recipe" "columns$decaying" "$sampled, T = 1" --arm codistill "${decay[@]}" --codistill-codec "$sampled" \
    --codistill-divergence mse --codistill-weight "$(scaled 1 0.3)" --codistill-weight-growth 1.1 --codistill-weight-max 10
for number in 16 1; do # drawn from the softmax, so the divergence is that of distributions
    arm "$recipe" "tokens_$number$decaying" "tokens:$number, T = 1" --arm codistill "${decay[@]}" \
        --codistill-codec "tokens:$number" --codistill-divergence kl --codistill-weight 1
done
arm "$recipe" "checkpoints_$interval$decaying" "checkpoints, T = $interval" --arm codistill "${decay[@]}" \
    --codistill-exchange checkpoints --codistill-interval "$interval"
draw "Translation: accuracy at equal bits" --kind bits
