# shellcheck shell=bash disable=SC2034
# Every setting of this recipe; prepare.sh, train.sh and evaluate.sh read it after translation.sh.

# What codistillation adds to the plain arm; nothing else differs.
CODISTILL_SETTINGS=(
    --codistill-divergence kl     # from the peer's softmax; mse of the logits gained less, see results/
    --codistill-weight 1          # alpha
    --codistill-weight-growth 1   # alpha is multiplied by this at every epoch
    --codistill-burn-in 0         # updates without distillation at the start
    --codistill-codec fp16
    # A schedule of label smoothing belongs here: --label-smoothing-drop-epoch, --label-smoothing-decay-epochs.
)

MAX_EPOCH=60 # of the all_reduce arm; one of two models has 30, as many updates
SETTINGS=(
    # model
    --arch transformer_iwslt_de_en --share-all-embeddings
    --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4
    --decoder-layers 2 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4
    # optimisation
    --dropout 0.1 --label-smoothing 0.1
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 5e-3 --lr-scheduler inverse_sqrt --warmup-updates 500
    --max-tokens 4096
    # housekeeping
    --keep-last-epochs 5 --log-interval 20
)

SOURCE=en
TARGET=de
VOCAB_SIZE_DEFAULT=3000
BEAM=5
NUM_AVERAGED=5 # the last epochs that evaluate.sh averages, at most what --keep-last-epochs keeps
DATA_DEFAULT=data-bin/multi30k_en_de
OUT_DEFAULT=checkpoints/multi30k_en_de
DOWNLOAD_BASE=https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw
SPLIT_FILES=(train:train:29000 valid:val:1014 test:test_2016_flickr:1000) # our name, name of the files, sentences

if is_small; then # for many arms on two CPU cores
    MAX_EPOCH=40
    OUT_DEFAULT+=-small
    SETTINGS+=(
        --encoder-layers 1 --encoder-embed-dim 64 --encoder-ffn-embed-dim 128
        --decoder-layers 1 --decoder-embed-dim 64 --decoder-ffn-embed-dim 128
        --max-tokens 2048 --warmup-updates 300
    )
fi
if is_smoke; then
    VOCAB_SIZE_DEFAULT=300
    NUM_AVERAGED=2
    BEAM=2
    DATA_DEFAULT+=-smoke
    OUT_DEFAULT+=-smoke
    MAX_EPOCH=4
    SETTINGS+=(
        --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64
        --max-tokens 1024 --warmup-updates 10 --log-interval 5
    )
fi
