# shellcheck shell=bash disable=SC2034
# What every corpus of one's own trains with; what depends on its size is in ../tools/choose.py.

SETTINGS=(
    --share-all-embeddings --label-smoothing 0.1
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr-scheduler inverse_sqrt
    --no-epoch-checkpoints --log-interval 20
)
BEAM=5
SMOKE_SETTINGS=()
SMOKE_VOCAB_SIZE=

if has_gpu; then
    SETTINGS+=(--fp16)
fi
if is_smoke; then
    BEAM=2
    SMOKE_VOCAB_SIZE=300
    SMOKE_SETTINGS=(
        --encoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --decoder-layers 1 --decoder-embed-dim 32
        --decoder-ffn-embed-dim 64 --max-tokens 1024 --warmup-updates 10 --log-interval 5 --max-epoch 2
    )
fi
