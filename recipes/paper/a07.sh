#!/usr/bin/env bash
# Appendix A.7: an over-parameterised model, the big transformer on IWSLT'14. Label smoothing is removed where models are
# taught. all_reduce goes through the data as often as the recipe's 50,000 updates of one device do.
#
#   a07.sh --data DIR [--out DIR] [settings of every training]; SCALE, SEEDS, SMOKE and DRY_RUN: see paper.sh
# shellcheck source=recipes/paper/paper.sh
source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"

recipe=$(scaled iwslt14_de_en multi30k_en_de)
embedded_data "$recipe"
big=(--arch transformer_vaswani_wmt_en_de_big)
if is_small; then
    big=(--encoder-embed-dim 256 --encoder-ffn-embed-dim 512 --decoder-embed-dim 256 --decoder-ffn-embed-dim 512)
elif is_smoke; then
    big=()
else
    big+=(--max-update 25000)
fi
arm "$recipe" big_all_reduce all_reduce --arm all_reduce "${big[@]}"
arm "$recipe" big_codistilled "2-way" --arm codistill --label-smoothing 0 "${big[@]}"
# Not in the paper: what of the difference is that of fewer passes through the data, and of label smoothing.
arm "$recipe" big_plain "one model, no label smoothing" --arm plain --label-smoothing 0 "${big[@]}"
draw "Appendix A.7: an over-parameterised model"
