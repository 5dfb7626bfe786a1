"""How fairseq processes end: errors as one line and an exit code, and ranks that it spawned with their parent."""

import time

import pytest
from helpers import (
    codistill_command,
    free_ports,
    gloo_ranks,
    json_logs,
    load_checkpoint,
    make_toy_data,
    run_together,
    spawning,
    start,
)

SECONDS = 240


def addresses(world_size=1):
    return ",".join(f"127.0.0.1:{port}" for port in free_ports(2, world_size))


def errors_of(result):
    return [line for line in result.output.splitlines() if "error: " in line]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--codistill-interval", "1.5"], "--codistill-interval is '1.5'; it must be a whole number"),
        (["--codistill-codek", "fp16"], "--codistill-codek is no option; did you mean --codistill-codec?"),
        (["--codistill-codec", "gif"], "--codistill-codec is 'gif'"),
        (["--task", "translation"], "use --task codistill_translation"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(toy_data, tmp_path, option, message):
    [result] = run_together([codistill_command(toy_data, tmp_path, 0, addresses(), "--seed", "1", *option)], SECONDS)
    assert result.returncode == 2
    assert "Traceback" not in result.output
    assert "usage:" not in result.output
    assert len(errors_of(result)) == 1
    assert message in errors_of(result)[0]


def test_other_batches_are_one_line_and_exit_code_1(toy_data, tmp_path):
    where = addresses()
    commands = [
        codistill_command(
            toy_data, tmp_path / str(model), model, where, "--seed", str(model + 1), "--codistill-max-mismatches", "1",
            "--required-batch-size-multiple", "1", "--max-epoch", "2",
        )
        for model in range(2)
    ]  # fmt: skip
    commands[1][3] = str(make_toy_data(tmp_path / "data", shift=1, dictionary=toy_data))
    for result in run_together(commands, SECONDS):
        assert result.returncode == 1
        assert "Traceback" not in result.output
        assert len(errors_of(result)) == 1
        assert "batches in a row differ" in errors_of(result)[0]
    for model in range(2):  # the update at which they differ is made without the other, and saved
        saved = load_checkpoint(tmp_path / str(model) / "checkpoint_last.pt")
        assert saved["optimizer_history"][-1]["num_updates"] == 1


def test_ranks_that_are_left_alone_save_what_they_learned_and_go_on_from_there(toy_data, tmp_path):
    where, ports = addresses(2), free_ports(3)
    settings = ["--codistill-require-peers", "always", "--codistill-timeout", "3", "--max-epoch", "1000"]
    commands, outputs = [], [tmp_path / f"{number}.log" for number in range(4)]
    for model in range(2):
        command = codistill_command(toy_data, tmp_path / str(model), model, where, "--seed", str(model + 1), *settings)
        commands += gloo_ranks(command, 2, ports[model])
    for output in outputs:
        output.touch()
    processes = [start(command, str(output)) for command, output in zip(commands, outputs, strict=True)]
    try:
        deadline = time.monotonic() + SECONDS
        while '"num_updates": "5"' not in outputs[0].read_text():
            assert time.monotonic() < deadline, outputs[0].read_text()
            time.sleep(0.02)
        for process in processes[2:]:
            process.kill()
        assert [process.wait(SECONDS) for process in processes[:2]] == [1, 1], outputs[0].read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    output = "\n".join(path.read_text() for path in outputs[:2])
    assert "fairseq-train: error: no model is left to teach model 0" in output
    assert "Traceback" not in output
    num_updates = int(json_logs(outputs[0].read_text(), "train_inner")[-1]["num_updates"])
    saved = load_checkpoint(tmp_path / "0" / "checkpoint_last.pt")
    assert saved["optimizer_history"][-1]["num_updates"] == num_updates
    alone = ["--codistill-require-peers", "never", "--codistill-start-timeout", "0.1", "--max-update"]
    command = codistill_command(toy_data, tmp_path / "0", 0, where, "--seed", "1", *alone, str(num_updates + 2))
    results = run_together(gloo_ranks(command, 2, ports[2]), SECONDS)
    assert [result.returncode for result in results] == [0, 0], results[0].output
    logged = [int(log["num_updates"]) for log in json_logs(results[0].output, "train_inner")]
    assert logged == [num_updates + 1, num_updates + 2]


def test_peers_that_were_never_met_are_one_line_that_says_what_was_seen_and_exit_code_1(toy_data, tmp_path):
    where = f"127.0.0.1:{free_ports(1)[0]},no-such-host.invalid:29600"
    settings = ["--seed", "1", "--codistill-keys", "none", "--codistill-start-timeout", "2"]
    [result] = run_together([codistill_command(toy_data, tmp_path, 0, where, *settings)], SECONDS)
    assert result.returncode == 1
    assert "Traceback" not in result.output
    [line] = errors_of(result)
    assert "'no-such-host.invalid' does not resolve" in line
    assert "--codistill-require-peers never" in line


def test_ranks_that_fairseq_spawns_end_their_parent_with_their_line_and_exit_code(toy_data, tmp_path):
    command = codistill_command(toy_data, tmp_path, 0, addresses(2), "--seed", "1", "--codistill-codec", "gif")
    [result] = run_together([spawning(command, free_ports(1)[0])], SECONDS)
    assert result.returncode == 2
    assert "Traceback" not in result.output
    assert 1 <= len(errors_of(result)) <= 2
    assert "--codistill-codec is 'gif'" in errors_of(result)[0]


def test_an_error_that_is_not_a_setting_keeps_its_traceback(toy_data, tmp_path):
    [result] = run_together(
        [spawning(codistill_command(toy_data, tmp_path, 0, addresses(2), "--train-subset", "none"), free_ports(1)[0])],
        SECONDS,
    )
    assert result.returncode == 1
    assert "Traceback" in result.output
