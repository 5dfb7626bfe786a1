"""How long a translation of the test of the claim is trained, and how it ended: from logs, without a training."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/claim"))
import grid
import settings
import text


def validated(folder, values, model=0):
    (folder / str(model)).mkdir(parents=True, exist_ok=True)
    lines = [
        f"INFO | valid | {json.dumps({'epoch': 1 + i, 'valid_nll_loss': f'{v:.3f}'})}\n" for i, v in enumerate(values)
    ]
    (folder / str(model) / "train.log").write_text("".join(lines))


def end_of(values, chunks, folder):
    """The last epoch of a run whose validations are ``values``, killed after as many epochs as ``chunks`` say."""
    run, done = grid.Run("text", "tune", "plain", 1, 0, 5e-3, "dropout0.1"), 0
    for killed_after in (*chunks, 1000):
        while True:
            goal = text.last_epoch(run, folder)
            done = min(goal, killed_after)
            validated(folder, values[:done])
            if done == killed_after or text.state(run, folder, 0) == "complete":
                break
            assert text.state(run, folder, 0) == "goes on"
    return done


@pytest.mark.parametrize("chunks", [(), (3,), (5, 6, 12), tuple(range(1, 19))])
def test_a_translation_ends_some_epochs_after_its_best_wherever_it_was_killed(tmp_path, chunks):
    values = [5 - 0.1 * min(epoch, 12) for epoch in range(1, 60)]
    values[14] = 3.0  # the fifteenth is the best
    assert end_of(values, chunks, tmp_path) == 15 + text.PATIENCE


def test_all_reduce_is_validated_after_as_many_updates_as_one_model_alone_and_has_as_many_of_patience(tmp_path):
    run = grid.Run("text_third", "tune", "all_reduce", 1, 0, 5e-3, "dropout0.1")
    validated(tmp_path, [5.0, 4.0, 3.9, 4.5])  # the third, which is between two validations of one model, is none
    assert text.last_epoch(run, tmp_path) == 2 + 2 * text.PATIENCE
    validated(tmp_path, [5 - 0.001 * epoch for epoch in range(400)])
    assert text.last_epoch(run, tmp_path) == 2 * settings.SETTINGS["text_third"].epochs
    words = text.command(run, Path("DATA"), tmp_path, [])
    assert words[words.index("--validate-interval") + 1] == "2"


def test_epochs_are_counted_by_their_numbers_where_some_are_not_in_the_log(tmp_path):
    run = grid.Run("text", "tune", "plain", 1, 0, 5e-3, "dropout0.1")
    validated(tmp_path, [5 - 0.1 * min(epoch, 20) for epoch in range(1, 31)])  # the twentieth is the best
    log = tmp_path / "0/train.log"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4] + lines[8:]))
    assert text.last_epoch(run, tmp_path) == 20 + text.PATIENCE
    assert text.state(run, tmp_path, 0) == "complete"


def test_a_validation_that_a_full_disk_cut_off_counts_once_it_was_done_again(tmp_path):
    validated(tmp_path, [5.0, 4.0])
    log = tmp_path / "0/train.log"
    line = f"INFO | valid | {json.dumps({'epoch': 3, 'valid_nll_loss': '3.000'})}\n"
    log.write_text(log.read_text() + line[:-9] + "\n")
    assert list(text.validations(log)) == [1, 2]
    log.write_text(log.read_text() + line)
    assert list(text.validations(log)) == [1, 2, 3]


def test_both_models_of_a_pair_end_with_the_mean_of_their_validations(tmp_path):
    run = grid.Run("text", "tune", "kl", 1, 0, 5e-3, "dropout0.1", 1.0)
    validated(tmp_path, [5.0, 4.0, 4.5])
    validated(tmp_path, [5.0, 4.9, 3.0], model=1)
    assert text.last_epoch(run, tmp_path) == 3 + text.PATIENCE
    validated(tmp_path, [5.0], model=1)  # what only one has seen does not count
    assert text.last_epoch(run, tmp_path) == 1 + text.PATIENCE
    words = text.command(run, Path("DATA"), tmp_path, [])
    assert words[words.index("--max-epoch") + 1] == str(1 + text.PATIENCE)
    assert "--patience" not in words


def test_a_translation_whose_gradients_are_not_finite_has_diverged(tmp_path):
    run = grid.Run("text", "tune", "plain", 1, 0, 5e-3, "dropout0.1")
    validated(tmp_path, [5.0])
    assert text.state(run, tmp_path, 1) == "failed"
    with (tmp_path / "0/train.log").open("a") as log:
        log.write("FloatingPointError: gradients are Nan/Inf\n")
    assert text.state(run, tmp_path, 1) == "diverged"
