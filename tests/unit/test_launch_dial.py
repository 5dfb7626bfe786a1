"""The one dial: what is proposed for a link, that it is taken, and what is asked for where something is missing."""

import re

import pytest

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.launch.cli import main
from fairseq_codistill.launch.dial import parse_link, propose

COMMAND = ["--", "python", "x.py", "--cpu", "--seed", "{model}"]


class TestDial:
    def test_a_fast_link_gets_dense_logits_and_a_slow_one_drawn_classes(self):
        fast, slow = (propose(link, 0.5, 3584, 32768, 2).settings for link in (400e9, 20e6))
        assert fast == {"--codistill-codec": "fp16"}
        assert slow == {"--codistill-codec": "counts:16", "--codistill-divergence": "kl"}
        assert propose(2e6, 0.5, 3584, 32768, 2).settings == {**slow, "--codistill-parts": "2"}

    def test_a_link_that_carries_nothing_at_every_update_gets_an_interval(self):
        found = propose(100e3, 0.5, 3584, 32768, 2)
        assert int(found.settings["--codistill-interval"]) > 50
        assert any("T = " in reason for reason in found.why)

    def test_many_models_on_a_slow_link_talk_to_one_at_a_time(self):
        assert propose(3e6, 0.5, 3584, 32768, 8).settings["--codistill-peers-per-position"] == "1"
        assert "--codistill-peers-per-position" not in propose(400e9, 0.5, 3584, 1000, 8).settings

    def test_what_is_proposed_is_taken(self):
        for link in (1e4, 1e6, 2e7, 1e9, 1e12):
            settings = propose(link, 0.5, 3584, 32768, 4).settings
            named = {name[2:].replace("-", "_"): value for name, value in settings.items()}
            numbers = {name: int(value) for name, value in named.items() if name.endswith(("interval", "position"))}
            addresses = "a:1,b:2,c:3,d:4"
            CodistillationConfig(
                codistill_num_models=4, codistill_addresses=addresses, **{**named, **numbers}
            ).validate()

    @pytest.mark.parametrize("link", [20e6, 1e3])
    def test_a_model_with_batch_normalisation_is_not_cut(self, link):
        images = (link, 0.1, 32, 1000, 2)
        assert propose(*images).settings["--codistill-parts"] == "2"
        whole = propose(*images, whole="because")
        assert "--codistill-parts" not in whole.settings
        assert any(reason.startswith("1 part: ") for reason in whole.why)
        assert ("1 part: because" in whole.why) == (link == 1e3)

    @pytest.mark.parametrize(("model", "is_cut"), [("resnet18", False), ("vit_tiny_patch16_224", True)])
    def test_a_dry_run_looks_for_it_in_the_model(self, model, is_cut, capsys):
        images = ["--", "codistill-vision", "--no-save", "--model", model, "--dataset", "imagefolder:none"]
        images += ["--batch-size", "32", "--seed", "{model}"]
        assert main(["--num-models", "2", "--dry-run", "--link", "20mbit", "--plan-step-s", "0.1", *images]) == 0
        proposed = capsys.readouterr().out.partition("Proposed")[2]
        assert ("--codistill-parts 2" in proposed) == is_cut

    @pytest.mark.parametrize("link", ["20", "fast", "0mbit", "1.2.3mbit", "-1mbit"])
    def test_a_speed_that_is_none_is_named(self, link):
        with pytest.raises(ConfigError, match="--link is"):
            parse_link(link)

    def test_a_dry_run_proposes_and_says_why(self, capsys):
        plan = "--plan-classes 32768 --plan-rows 3584 --plan-parameters 210000000 --plan-step-s 0.5"
        assert main(["--num-models", "2", "--dry-run", "--link", "20mbit", *plan.split(), *COMMAND]) == 0
        out = capsys.readouterr().out
        assert "Proposed for a link of 20 Mbit/s" in out
        assert "--codistill-codec counts:16 --codistill-divergence kl" in out

    def test_what_goes_through_a_relay_leaves_once(self, capsys):
        plan = "--plan-classes 32768 --plan-rows 3584 --plan-parameters 210000000 --plan-step-s 0.5"
        relay = ["--codistill-relay", "relay:29700", "--codistill-keys", "keys"]
        taken = []
        for more in ([], relay):
            assert main(["--num-models", "4", "--dry-run", "--link", "1gbit", *plan.split(), *COMMAND, *more]) == 0
            taken.append(float(re.search(r"predictions takes ([0-9.]+) ms", capsys.readouterr().out)[1]))
        assert taken[0] == pytest.approx(3 * taken[1], rel=0.05)

    @pytest.mark.parametrize("flag", ["--codistill-lookahead", "--codistill-own-data"])
    def test_what_cuts_no_batch_is_not_told_to(self, flag, capsys):
        plan = "--plan-classes 32768 --plan-rows 3584 --plan-parameters 210000000 --plan-step-s 0.5 --link 1mbit"
        for more, is_cut in (([], True), ([flag], False)):
            assert main(["--num-models", "2", "--dry-run", *plan.split(), *COMMAND, *more]) == 0
            out = capsys.readouterr().out
            assert ("--codistill-parts" in out.partition("Proposed")[2]) == is_cut
        assert f"1 part: with {flag} no batch is cut" in out

    def test_for_checkpoints_nothing_is_proposed(self, capsys):
        plan = "--plan-classes 9 --plan-rows 9 --plan-parameters 9 --plan-step-s 0.5 --link 1mbit"
        with pytest.raises(SystemExit):
            main(["--num-models", "2", "--dry-run", *plan.split(), *COMMAND, "--codistill-exchange", "checkpoints"])
        assert "--link is '1mbit' with --codistill-exchange checkpoints" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--link", "20mbit"], "without --dry-run"),
            (["--no-bits"], "--no-bits is for --dry-run"),
            (["--link", "20mbit", "--dry-run", "--no-bits"], "--no-bits is for --dry-run"),
            (["--link", "20mbit", "--dry-run", "--plan-classes", "9"], "--plan-step-s and --plan-rows"),
        ],
    )
    def test_what_it_lacks_is_named(self, options, message, capsys):
        with pytest.raises(SystemExit):
            main(["--num-models", "2", *options, *COMMAND])
        assert message in capsys.readouterr().err
