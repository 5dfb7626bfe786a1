# shellcheck shell=bash disable=SC2034
# Every setting of this recipe; prepare.sh, train.sh and evaluate.sh read it after translation.sh.

# What codistillation adds to the plain arm. The paper grows alpha by 1.1 an epoch and does not say where it begins, nor
# that it ends; label smoothing is removed where models teach each other (A.3, A.5), or decays (4.2).
CODISTILL_SETTINGS=(
    --codistill-divergence mse
    --codistill-weight 1
    --codistill-weight-growth 1.1
    --codistill-weight-max 10 # after 25 epochs
    --codistill-codec fp16
    --label-smoothing 0 # or --label-smoothing 0.1 --label-smoothing-decay-updates 50000
)

MAX_EPOCH= # --max-update ends every arm, all at the same number of updates
SETTINGS=(
    # model; the over-parameterised one of the paper's A.7: --arch transformer_vaswani_wmt_en_de_big
    --arch transformer_iwslt_de_en --share-all-embeddings
    # optimisation, as fairseq's example has it
    --dropout 0.3 --weight-decay 0.0001 --label-smoothing 0.1 --clip-norm 0
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000
    --max-tokens 4096 --max-update 50000
    # housekeeping
    --keep-last-epochs 10 --log-interval 100
)

SOURCE=de
TARGET=en
VOCAB_SIZE_DEFAULT=10000 # fairseq's example; the paper has 32000
BEAM=5
NUM_AVERAGED=10 # the last epochs that evaluate.sh averages, at most what --keep-last-epochs keeps
DATA_DEFAULT=data-bin/iwslt14_de_en
OUT_DEFAULT=checkpoints/iwslt14_de_en
ARCHIVE=https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz

if has_gpu; then
    SETTINGS+=(--fp16)
fi
if is_smoke; then
    VOCAB_SIZE_DEFAULT=300
    NUM_AVERAGED=2
    BEAM=2
    DATA_DEFAULT+=-smoke
    OUT_DEFAULT+=-smoke
    SETTINGS+=(
        --encoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2
        --decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 2
        --max-tokens 1024 --max-update 40 --warmup-updates 10 --log-interval 5
    )
fi
