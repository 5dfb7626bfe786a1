#!/usr/bin/env bash
# Trains one arm of the comparison. The settings are in settings.sh; an arm adds only what one can see there.
#
#   train.sh --arm plain|codistill|all_reduce [--models 2] [--one-of M] [--devices 8] [--data DIR] [--out DIR]
#            [fairseq settings]
#
# plain       one model on --devices devices
# codistill   --models such models that teach each other
# all_reduce  one model on --models x --devices devices, gradients averaged at every update. Every device takes batches
#             as large as in the other arms: an update of all_reduce is that of Ott et al., one of M models has an M-th of
#             it (M: --models, or --one-of). --max-update ends all arms at the same number of updates.
#
# On the CPU a device is a process. Everything but the options above goes to fairseq-train last, and so wins:
# train.sh --arm plain --max-update 1000. They may stand anywhere; what follows a -- goes there whatever its name.
# Model i and its train.log are in OUT/i (default OUT: checkpoints/wmt16_en_de/ARM). SMOKE=1: a tiny run.
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=recipes/translation.sh
source "$REPOSITORY/recipes/translation.sh"
# shellcheck source=recipes/wmt16_en_de/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

train_arm "$@"
