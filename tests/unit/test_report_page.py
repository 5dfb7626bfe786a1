"""codistill-report: what the logs of either program say is on the page, and nothing has to be fetched to show it."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from fairseq_codistill.report.page import main, write_page
from fairseq_codistill.report.runs import find_runs, read_model

STAMP = "2024-01-01 00:00:00 | "
SETTINGS = (
    "{'_name': None, 'common': {'_name': None, 'seed': %d, 'log_format': 'json'}, 'task': Namespace(lr=[0.1], "
    "adam_betas='(0.9, 0.98)', codistill_codec='tokens:16', other=inf)}"
)


def fairseq_log(folder, model, nll=(3.0, 2.0), away=False):
    lines = [
        f"{STAMP}INFO | fairseq_cli.train | {SETTINGS % (model + 1)}",
        f"{STAMP}INFO | fairseq_cli.train | num. shared model params: 1,010 (num. trained: 1,000)",
        f"{STAMP}INFO | fairseq_codistill.coordinator.peers | codistillation: met models [1] in 0.1 s",
    ]
    for epoch, value in enumerate(nll, start=1):
        figures = {"epoch": epoch, "nll_loss": str(value + 1), "codistill_mbit": "0.004", "codistill_peers": "1"}
        figures |= {"codistill_mse": "0.5", "codistill_wait_ms": "3", "num_updates": str(10 * epoch)}
        lines.append(f"{STAMP}INFO | train_inner | {json.dumps(figures)}")
        figures = {
            "epoch": epoch,
            "valid_loss": "9",
            "valid_nll_loss": str(value),
            "valid_num_updates": str(10 * epoch),
        }
        lines.append(f"{STAMP}INFO | valid | {json.dumps(figures)}")
    if away:
        what = "codistillation: model 1 is away (was present): nothing for <position 3> in 10.0 s"
        lines.append(f"{STAMP}WARNING | fairseq_codistill.coordinator.peers | {what}")
    (folder / str(model)).mkdir(parents=True)
    (folder / str(model) / "train.log").write_text("\n".join(lines) + "\n")


def vision_log(folder, model, sent):
    start = {"kind": "start", "update": 0, "parameters": 1000, "options": {"seed": model + 1, "lr": 0.1}}
    train = {"kind": "train", "update": 10, "nll_loss": 2.5, "codistill_mbit": sent, "codistill_agreement": 0.75}
    valid = [{"kind": "valid", "update": 10, "valid_top1": 40.0}, {"kind": "valid", "update": 20, "valid_top1": 35.0}]
    (folder / str(model)).mkdir(parents=True)
    text = "\n".join(map(json.dumps, [start, train, *valid])) + '\n{"kind": "train", "upd'  # cut short
    (folder / str(model) / "log.jsonl").write_text(text)


def text_of(page):
    return re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.DOTALL))


def test_models_of_a_run_are_compared_by_what_their_logs_say(tmp_path):
    fairseq_log(tmp_path / "run", 0, away=True)
    fairseq_log(tmp_path / "run", 1, nll=(3.5, 2.5))
    page, figure = write_page(tmp_path / "run", tmp_path / "out")
    content, text = page.read_text(), text_of(page)
    # Model 0: best and last NLL, last training loss; 2 x 1,000 parameters x 32 bits = 0.064 Mbit, 16 times 0.004.
    assert re.search(r"run\s+0\s+20\s+2\s+2\s+3\s+–\s+0.004\s+0.064\s+16.0×", text)
    assert re.search(r"run\s+1\s+20\s+2.5\s+2.5\s+3.5", text)
    assert "nothing for &lt;position 3&gt; in 10.0 s" in content
    assert "met models" not in content
    differing = content[content.index("Settings that differ") : content.index("All 6 settings")]
    assert "<code>seed</code></td><td>1</td><td>2</td>" in differing
    assert "codistill_codec" not in differing
    assert "(0.9, 0.98)" in content
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert not re.search(r'(src|href)="(?!data:)', content)


def test_a_folder_of_runs_is_one_page_with_the_runs_side_by_side(tmp_path):
    fairseq_log(tmp_path / "plain", 0)
    fairseq_log(tmp_path / "deep/er/kl", 0)
    fairseq_log(tmp_path / "deep/er/kl", 1)
    vision_log(tmp_path / "images", 0, sent=0.032)
    assert [run.name for run in find_runs(tmp_path)] == ["deep/er/kl", "images", "plain"]
    files = write_page(tmp_path, tmp_path / "out")
    assert [file.name for file in files] == [
        "report.html", "comparison_nll_loss.png", "run_0.png", "run_1.png", "run_2.png",
    ]  # fmt: skip
    text = text_of(files[0])
    # The best top-1 is the highest; 10 updates of 0.032 Mbit over 20.
    assert re.search(r"images\s+0\s+20\s+40\s+35\s+2.5\s+0.75\s+0.016\s+0.064\s+4.0×", text)


def test_what_is_sent_again_after_a_restart_counts_again(tmp_path):
    fairseq_log(tmp_path, 0)
    log = read_model(0, tmp_path / "0/train.log")
    log.train = [{"num_updates": n, "codistill_mbit": 1.0} for n in (10.0, 20.0, 15.0, 20.0)]
    assert log.sent_megabits()[1] == [0, 10, 20, 20, 25]


def test_a_folder_without_logs_is_refused(tmp_path, capsys):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/train.log").write_text("nothing\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "holds no MODEL/train.log" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page(tmp_path):
    fairseq_log(tmp_path / "run", 0)
    page = write_page(tmp_path / "run", tmp_path / "out")[0]
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run([*browser, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=90)
    assert "validation NLL" in shown.stdout
    script = "<script>document.title = [...document.images].map(i => i.naturalWidth > 100).join()</script></body>"
    page.write_text(page.read_text().replace("</body>", script))
    shown = subprocess.run([*browser, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=90)
    assert "<title>true</title>" in shown.stdout


def test_the_console_script_prints_the_files(tmp_path):
    fairseq_log(tmp_path / "run", 0)
    command = [sys.executable, "-m", "fairseq_codistill.report.page", str(tmp_path / "run")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[0] == str(tmp_path / "run/report/report.html")
