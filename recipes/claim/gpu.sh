#!/usr/bin/env bash
# The test of the claim on one GPU, in about a quarter of an hour: CIFAR-10 at 32 pixels, WRN-16-4, bf16.
#
#   gpu.sh --from DIR [--work claim-gpu] [--out results/claim/gpu]
#
# DIR holds CIFAR-10, as torchvision unpacks it or as folders of images, train/<class>/ and test/<class>/. Arms: one model alone for 15 passes
# (from the initialisations of both models of a pair) and for 30 (from the first), all_reduce as one process of twice the batch, two models that
# teach each other on the one device (mse, kl); seed 1 on held-out images, seeds 2 to 4 on the test images. Settings are
# those of "gpu" in settings.py, the same for every arm: nothing is tuned in this time. It goes on where it was stopped:
# checkpoints and rows are in WORK. SMOKE=1: one short run of every arm, on the CPU as well.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

FROM=
WORK=claim-gpu
OUT=results/claim/gpu
while [[ $# -gt 0 ]]; do
    case "$1" in
        --from) need_value "$1" $# && FROM=$2 && shift 2 ;;
        --work) need_value "$1" $# && WORK=$2 && shift 2 ;;
        --out) need_value "$1" $# && OUT=$2 && shift 2 ;;
        -h | --help) show_help ;;
        *) die "unknown argument '$1'; see --help" ;;
    esac
done
[[ -n "$FROM" ]] || die "--from is missing; give the folder of CIFAR-10"

ORDER=gpu
IMAGES=40000
if is_smoke; then
    ORDER=smoke
    IMAGES=320
elif ! has_gpu; then
    die "no GPU is there; SMOKE=1 tries everything on the CPU"
fi
headline "images: $IMAGES to train on, $((IMAGES / 4)) others held out"
"$PYTHON" "$TOOLS/shrink_images.py" --from "$FROM" --out "$WORK/data/$IMAGES" --train-images "$IMAGES" \
    --held-out "$((IMAGES / 4))" --size 32
headline "training, into $WORK/runs"
to_its_end "$PYTHON" "$REPOSITORY/recipes/claim/run.py" --order "$ORDER" --data "$WORK/data" --runs "$WORK/runs"
"$PYTHON" "$REPOSITORY/recipes/claim/summary.py" --order "$ORDER" --runs "$WORK/runs" --out "$OUT"
