"""Which folder a script of the recipes trains in, and what of it, from earlier, it takes for its own.

Nothing is trained: a stand-in for ``codistill-launch`` prints what it was asked to start.
"""

from test_recipe_lengths import start, tools

__all__ = ["tools"]  # a fixture


def test_seeds_of_other_settings_are_not_taken_into_the_mean_of_an_arm(tools, tmp_path):
    """The arm of seed 1 was trained at another learning rate than seed 2 is to be."""
    folder = tmp_path / "imagenet/all_reduce/1"
    folder.mkdir(parents=True)
    (folder / "finished.txt").write_text("E/n, SCALE=full SMOKE=0, data images: --arm all_reduce\n")
    arguments = ("paper/fig07.sh", "--data", "images/", "--out", tmp_path, "--lr", "0.4")
    refusal = f"{folder} was trained with other settings"
    refused = start(tools, *arguments, check=False, SEEDS="2", DRY_RUN="0")
    assert refusal in refused
    assert "training:" not in refused
    planned = start(tools, *arguments, SEEDS="2")
    assert refusal in planned
    assert "imagenet/all_reduce/2/{model" in planned


def test_a_folder_of_any_name_is_no_pattern_and_no_place_for_a_seed(tools, tmp_path):
    out = tmp_path / "SEED[1] b=2"
    folder = out / "imagenet/all_reduce/1"
    (folder / "0").mkdir(parents=True)
    (folder / "0/checkpoint_last.pt").touch()
    (folder / "settings.txt").write_text("others\n")
    assert f"{folder} was trained with other settings" in start(
        tools, "paper/fig07.sh", "--data", "x", "--out", out, SEEDS="1"
    )
    printed = start(tools, "paper/fig06.sh", "--data", "x", "--out", out, SEEDS="3")
    assert f"{out}/cifar10/all_channels/3/0/checkpoint_last.pt" in printed.replace("'", "")


def test_one_seed_is_asked_for_as_in_any_other_script(tools, tmp_path):
    printed = start(tools, "paper/fig07.sh", "--out", tmp_path, SEEDS="", SEED="2")
    assert "all_reduce/2/{model" in printed
    assert "all_reduce/1/{model" not in printed
    assert "all_reduce/3/{model" not in printed


def test_a_small_model_that_was_taught_otherwise_is_not_taken_for_this_one(tools, tmp_path):
    folder = tmp_path / "alone1"
    (folder / "0").mkdir(parents=True)
    (folder / "0/bleu.json").write_text("{}")
    arguments = ("multi30k_en_de/distil.sh", "--data", "pairs", "--out", tmp_path, "--teacher", "t.pt", "--seeds", "1")
    planned = start(tools, *arguments)
    assert f"{folder} was trained with other settings: 'settings that an earlier version did not keep'" in planned
    assert not (folder / "done").exists()
    (folder / "finished.txt").write_text("SCALE=small SMOKE=0, data pairs: --arm plain\n")
    assert f"{folder} is finished already" in start(tools, *arguments)
    assert f"{folder} was trained with other settings" in start(tools, *arguments, "--dropout", "0.5")
