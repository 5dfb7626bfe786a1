#!/usr/bin/env bash
# The demonstration: two small German to English models, embedded data, one command. Minutes on two CPU cores.
#
#   bash recipes/demo/run.sh [further settings of fairseq-train]
#
# DEMO_OUT (default demo-output), DEMO_PAIRS, DEMO_MIN_BLEU: where, how many training pairs, what counts as failed.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/translation.sh
source "$REPOSITORY/recipes/translation.sh"

SOURCE=de TARGET=en
NUM_MODELS=2
SHARED+=(--share-devices) # it is to run on whatever is there
SETTINGS=(
    # model
    --arch transformer_iwslt_de_en --share-all-embeddings
    --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4
    --decoder-layers 2 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4
    # optimisation
    --dropout 0.1 --label-smoothing 0.1
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 2e-3 --lr-scheduler inverse_sqrt --warmup-updates 300
    --max-tokens 1024 --max-epoch 12
    # codistillation: predictions of every batch, in 16 bits
    --codistill-weight 1.0 --codistill-codec fp16
    # housekeeping
    --no-epoch-checkpoints --log-interval 20
)
OUT="${DEMO_OUT:-demo-output}"
NUM_PAIRS="${DEMO_PAIRS:-4000}"
VOCAB_SIZE=600
BEAM=5
MIN_BLEU="${DEMO_MIN_BLEU:-60}"
if is_smoke; then
    NUM_PAIRS=500 MIN_BLEU=0
    SETTINGS+=(--max-epoch 2)
fi

case "${1:-}" in
    -h | --help) show_help ;;
    --) shift ;;
esac
if is_dry_run; then die "the demonstration has no dry run: leave DRY_RUN out, or give DEMO_PAIRS=500"; fi
check_paths "$OUT"
need_modules demo num2words matplotlib
[[ ! -e "$OUT" || -e "$OUT/.demo" ]] || die "$OUT exists and is not of an earlier demo; set DEMO_OUT to another folder"
rm -rf "$OUT"
mkdir -p "$OUT"
touch "$OUT/.demo"

headline "1/4  corpus: German and English number words, made by code"
embedded_corpus "$OUT/data/raw" "$NUM_PAIRS" 200
binarise "$OUT/data" "$VOCAB_SIZE"
# No `head`: it ends early, and the writer before it would die of SIGPIPE now and then.
paste -d '|' "$OUT/data/raw/valid.de" "$OUT/data/raw/valid.en" | sed -n '1,3s/|/   ->   /p'

headline "2/4  training: $NUM_MODELS models teach each other, fp16 predictions at every batch"
train_codistilled "$NUM_MODELS" 1 "$OUT/data/bin" "$OUT" "${SETTINGS[@]}" "$@"

headline "3/4  translation of the test split, beam $BEAM"
for ((model = 0; model < NUM_MODELS; model++)); do
    translate_and_score "model $model" "$OUT/data" "$OUT/$model/checkpoint_best.pt" "$OUT/$model/bleu"
done

headline "4/4  report"
run_module fairseq_codistill.report.page "$OUT" --out "$OUT" --figures --min-bleu "$MIN_BLEU"
