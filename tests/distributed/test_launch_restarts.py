"""The launcher with real processes: a model that fails is started again, so often, and after a signal none."""

import signal

from launching import finish, lines_until, of_model


def test_a_model_that_fails_is_started_again_with_all_its_ranks(launch, tmp_path):
    launcher = launch(
        """
        tries = f"tries{model}.{rank}"
        open(tries, "a").write("x")
        print("try", len(open(tries).read()), flush=True)
        if model == 1 and rank == 1 and len(open(tries).read()) < 3:
            wait_for("tries1.0")
            while len(open("tries1.0").read()) < len(open(tries).read()):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if model == 1 and len(open(tries).read()) < 3:
            wait_for_the_end()
        """,
        "--devices-per-model",
        "2",
        "--max-restarts",
        "2",
    )
    code, lines = finish(launcher)
    assert code == 0
    text = "\n".join(lines)
    assert "model 1: rank 1 killed by SIGKILL; it is started again (1 restarts left)" in text
    assert "(0 restarts left)" in text
    assert "failed" not in text
    assert (tmp_path / "tries1.0").read_text() == "xxx"
    assert (tmp_path / "tries0.0").read_text() == "x"


def test_keys_that_a_session_took_with_it_are_there_for_a_model_that_is_started_again(launch, tmp_path, monkeypatch):
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    code, lines = finish(
        launch(
            """
            import shutil
            keys = sorted(os.listdir(os.environ["CODISTILL_KEYS"]))
            print("keys", *keys, flush=True)
            open(f"seen{model}", "a").write("x")
            wait_for(f"seen{1 - model}")
            if model == 1 and len(open("seen1").read()) == 1:
                shutil.rmtree("runtime")
                sys.exit(3)
            """,
            "--max-restarts",
            "1",
        )
    )
    assert code == 0
    first, second = (line for line in of_model(lines, "model 1") if line.startswith("keys "))
    assert "model-1.key" in first
    assert first == second


def test_a_model_that_keeps_failing_is_a_failure_after_its_restarts(launch, tmp_path):
    launcher = launch("open(f'tries{model}', 'a').write('x'); sys.exit(3 * model)", "--max-restarts", "2")
    code, lines = finish(launcher)
    assert code == 1
    assert any("model 1 failed: exit code 3" in line for line in lines)
    assert (tmp_path / "tries1").read_text() == "xxx"
    assert (tmp_path / "tries0").read_text() == "x"


def test_nothing_is_started_again_after_a_signal(launch, tmp_path):
    launcher = launch(
        """
        open(f'tries{model}', 'a').write('x')
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        print("ready", model, flush=True)
        wait_for_the_end()
        """,
        "--max-restarts",
        "2",
    )
    lines_until(launcher, "ready 0", "ready 1")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait() == 128 + signal.SIGTERM
    assert (tmp_path / "tries0").read_text() == "x"
