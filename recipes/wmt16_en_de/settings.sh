# shellcheck shell=bash disable=SC2034
# Every setting of this recipe; prepare.sh, train.sh, slurm.sbatch and evaluate.sh read it after translation.sh.

# What codistillation adds to the plain arm. The paper grows alpha by 1.1 an epoch and does not say where it begins, nor
# that it ends; it decays label smoothing over training (its section 4.2) or has none (A.3, A.5: put --label-smoothing 0 at
# the end).
CODISTILL_SETTINGS=(
    --codistill-divergence mse
    --codistill-weight 1
    --codistill-weight-growth 1.1
    --codistill-weight-max 10 # after 25 epochs
    --codistill-codec fp16 # 100 times fewer bits and more: --codistill-divergence kl --codistill-codec tokens:16
    --label-smoothing-decay-updates 30000
)

NUM_DEVICES=8      # of a model, where --devices does not say otherwise
# Batches of --max-tokens that make one update of all_reduce: Ott et al. 2018 take 16 of 8 GPUs. One of M models has an M-th.
BATCH_DEVICES=128
MAX_EPOCH=         # --max-update ends every arm, all at the same number of updates
MAX_TOKENS=3584
SETTINGS=(
    # model and optimisation: Ott et al. 2018, "Scaling Neural Machine Translation"
    --arch transformer_vaswani_wmt_en_de_big --share-all-embeddings
    --dropout 0.3 --weight-decay 0 --label-smoothing 0.1 --clip-norm 0
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 1e-3 --lr-scheduler inverse_sqrt --warmup-updates 4000
    --warmup-init-lr 1e-7 --max-tokens "$MAX_TOKENS" --max-update 30000
    # housekeeping
    --keep-last-epochs 10 --log-interval 100
)

SOURCE=en
TARGET=de
VOCAB_SIZE_DEFAULT=32000
BEAM=4
LENGTH_PENALTY=0.6
NUM_AVERAGED=10 # the last epochs that evaluate.sh averages, at most what --keep-last-epochs keeps
DATA_DEFAULT=data-bin/wmt16_en_de
OUT_DEFAULT=checkpoints/wmt16_en_de
ARCHIVES=(
    https://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz
    https://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz
    https://data.statmt.org/wmt16/translation-task/training-parallel-nc-v11.tgz
    https://data.statmt.org/wmt16/translation-task/dev.tgz
    https://www.statmt.org/wmt14/test-full.tgz
)

if has_gpu; then
    SETTINGS+=(--fp16)
fi
if is_smoke; then
    VOCAB_SIZE_DEFAULT=300
    NUM_DEVICES=1
    BATCH_DEVICES=4
    NUM_AVERAGED=2
    BEAM=2
    DATA_DEFAULT+=-smoke
    OUT_DEFAULT+=-smoke
    MAX_TOKENS=512
    SETTINGS+=(
        --encoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2
        --decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 2
        --max-tokens "$MAX_TOKENS" --max-update 40 --warmup-updates 10 --log-interval 5
    )
    CODISTILL_SETTINGS+=(--label-smoothing-decay-updates 40)
fi

# finish_settings ARM: the update frequency that follows from the devices, and what an update then is. Every device takes
# batches of the same size in all arms; the all_reduce arm has as many devices as all models of the codistilled one.
finish_settings() {
    local arm=$1 update_freq models=1 devices=$NUM_DEVICES
    [[ $((BATCH_DEVICES % (ONE_OF * NUM_DEVICES))) -eq 0 ]] ||
        die "--devices is $NUM_DEVICES, of one of $ONE_OF models; their product must divide $BATCH_DEVICES, the batches of" \
            "one update of all of them (BATCH_DEVICES in settings.sh)"
    update_freq=$((BATCH_DEVICES / (ONE_OF * NUM_DEVICES)))
    SETTINGS+=(--update-freq "$update_freq")
    [[ "$arm" != codistill ]] || models=$NUM_MODELS
    [[ "$arm" != all_reduce ]] || devices=$((NUM_MODELS * NUM_DEVICES))
    echo "$arm: $models model(s) x $devices device(s) x update-freq $update_freq =" \
        "$((devices * update_freq)) batches in an update of a model, each of up to $MAX_TOKENS tokens or the --max-tokens given"
}
