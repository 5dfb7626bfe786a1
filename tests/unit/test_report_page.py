"""codistill-report: what the logs of either program say is on the page, and nothing has to be fetched to show it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_codistill import report
from fairseq_codistill.report.charts import MAX_POINTS, run_charts
from fairseq_codistill.report.page import main, write_report
from fairseq_codistill.report.runs import find_runs

STAMP = "2024-01-01 00:00:00 | "
LATER = "2024-01-01 00:%02d:00 | "
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
        figures |= {"lr": "0.001", "wps": "1500"}
        lines.append(f"{LATER % epoch}INFO | train_inner | {json.dumps(figures)}")
        figures = {
            "epoch": epoch,
            "valid_loss": "9",
            "valid_nll_loss": str(value),
            "valid_num_updates": str(10 * epoch),
        }
        lines.append(f"{LATER % epoch}INFO | valid | {json.dumps(figures)}")
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
    without = re.sub(r"<(style|script)[^>]*>.*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"<[^>]*>", " ", without)


def curves_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="curves">(.*?)</script>', page.read_text()).group(1)
    )


def test_models_of_a_run_are_compared_by_what_their_logs_say(tmp_path):
    fairseq_log(tmp_path / "run", 0, away=True)
    fairseq_log(tmp_path / "run", 1, nll=(3.5, 2.5))
    page, record, figure = write_report(tmp_path / "run", tmp_path / "out", with_figures=True).files
    content, text = page.read_text(), text_of(page)
    # Model 0: best and last NLL, last training loss; 2 x 1,000 parameters x 32 bits = 0.064 Mbit, 16 times 0.004.
    assert re.search(r"run\s+0\s+silent\s+20\s+2\s+2\s+3\s+0.004\s+0.064\s+16.0×", text)
    assert re.search(r"run\s+1\s+silent\s+20\s+2.5\s+2.5\s+3.5", text)
    assert "nothing for &lt;position 3&gt; in 10.0 s" in content
    assert "met models" not in content
    differing = content[content.index("Settings that differ") : content.index("All 6 settings")]
    assert "<code>seed</code></td><td>1</td><td>2</td>" in differing
    assert "codistill_codec" not in differing
    assert "(0.9, 0.98)" in content
    assert figure.name == "curves.png"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    first, second = json.loads(record.read_text())["models"]
    assert (first["best_valid_nll_bits"], first["best_valid_ppl"], first["times_fewer_bits"]) == (2, 4, 16)
    assert (second["model"], second["best"], second["state"]) == (1, 2.5, "silent")


@pytest.mark.parametrize(("nll", "best"), [((2100.0, 2200.0), 2100.0), ((float("nan"), float("nan")), None)])
def test_a_training_that_diverged_has_a_page_and_a_record_that_is_json(tmp_path, nll, best):
    fairseq_log(tmp_path / "run", 0, nll=nll)
    _, record = write_report(tmp_path / "run", tmp_path / "out").files
    (model,) = json.loads(record.read_text(), parse_constant=pytest.fail)["models"]
    assert model["best"] == best


def test_the_page_links_its_logs_and_holds_all_else(tmp_path):
    fairseq_log(tmp_path / "a run", 0)
    page = write_report(tmp_path / "a run", tmp_path / "out").files[0]
    content = page.read_text()
    assert re.findall(r'href="([^"]*)"', content) == ["../a%20run/0/train.log"]
    assert not re.search(r"<(link|img|iframe)|src=|@import|url\(", content)
    assert "default-src 'none'" in content


def test_a_folder_of_runs_is_one_page_with_the_runs_side_by_side(tmp_path):
    fairseq_log(tmp_path / "plain", 0)
    fairseq_log(tmp_path / "deep/er/kl", 0)
    fairseq_log(tmp_path / "deep/er/kl", 1)
    vision_log(tmp_path / "images", 0, sent=0.032)
    assert [run.name for run in find_runs(tmp_path)] == ["deep/er/kl", "images", "plain"]
    files = write_report(tmp_path, tmp_path / "out", with_figures=True).files
    assert [file.name for file in files] == [
        "report.html", "report.json", "comparison_nll_loss.png", "run_0.png", "run_1.png", "run_2.png",
    ]  # fmt: skip
    text = text_of(files[0])
    # The best top-1 is the highest; 0.032 Mbit in each of the 10 updates that it tells of.
    assert re.search(r"images\s+0\s+live\s+20\s+40\s+35\s+2.5\s+0.75\s+0.032\s+0.064\s+2.0×", text)
    assert {"all_nll_loss", "all_nll_loss_bits"} < {chart["key"] for chart in curves_of(files[0])}


def test_a_point_has_its_update_and_the_seconds_since_the_run_began(tmp_path):
    fairseq_log(tmp_path / "run", 0)
    curves = {chart["key"]: chart["curves"][0]["points"] for chart in curves_of(write(tmp_path)[0])}
    assert curves["valid_nll_loss"] == [[10, 60, 3.0], [20, 120, 2.0]]
    assert curves["train_lr"] == [[10, 60, 0.001], [20, 120, 0.001]]
    assert "train_wps" in curves
    assert "train_images_per_s" not in curves


def write(tmp_path):
    return write_report(tmp_path / "run", tmp_path / "out").files


def test_a_long_curve_keeps_its_spikes_and_its_end(tmp_path):
    fairseq_log(tmp_path / "run", 0)
    (run,) = find_runs(tmp_path)
    run.models[0].train = [{"num_updates": float(n), "lr": 1e-3} for n in range(20 * MAX_POINTS)]
    run.models[0].train[12345]["lr"] = 7.0
    run.models[0].train[4]["lr"] = float("nan")
    (chart,) = [chart for chart in run_charts(run) if chart.key == "train_lr"]
    points = chart.curves[0].points
    assert len(points) <= MAX_POINTS
    assert (12345.0, None, 7.0) in points
    assert points[-1][0] == 20 * MAX_POINTS - 1
    assert [point[0] for point in points] == sorted(point[0] for point in points)


def test_bleu_stands_beside_its_model_with_its_signature(tmp_path):
    for model in (0, 1):
        fairseq_log(tmp_path / "run", model)
    (tmp_path / "run/1/bleu.json").write_text('{"bleu": 61.5, "signature": "nrefs:1|tok:13a"}')
    page, record = write(tmp_path)
    assert "test BLEU" in text_of(page)
    assert "61.50" in text_of(page)
    assert "nrefs:1|tok:13a" in page.read_text()
    assert [model["bleu"] for model in json.loads(record.read_text())["models"]] == [None, 61.5]


def test_a_run_without_figures_yet_has_a_page_that_says_so(tmp_path):
    fairseq_log(tmp_path / "run", 0, nll=())
    text = text_of(write(tmp_path)[0])
    assert "No figures yet" in text
    assert re.search(r"run\s+0\s+silent\s+0\s+0.064", text)


def test_names_from_logs_cannot_end_the_script_or_become_tags(tmp_path):
    fairseq_log(tmp_path / "<b>run", 0)
    fairseq_log(tmp_path / "<script>x", 0)
    content = write_report(tmp_path, tmp_path / "out").files[0].read_text()
    assert "<b>run" not in content
    assert "<script>x" not in content


def test_a_model_below_the_wanted_bleu_fails_the_report(tmp_path):
    fairseq_log(tmp_path / "run", 0)
    (tmp_path / "run/0/bleu.json").write_text('{"bleu": 12.0, "signature": "nrefs:1"}')
    with pytest.raises(SystemExit, match="models below 60 BLEU: 0"):
        main([str(tmp_path / "run"), "--min-bleu", "60"])
    main([str(tmp_path / "run"), "--min-bleu", "12"])


def test_a_folder_without_logs_is_refused(tmp_path, capsys):
    (tmp_path / "0").mkdir()
    for what in ("holds no log of fairseq-train", "0/train.log in", "does not exist"):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "elsewhere" if "exist" in what else tmp_path)])
        assert what in capsys.readouterr().err
        (tmp_path / "0/train.log").write_text("nothing\n")


BROWSER = shutil.which("chromium")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


def shown_by_browser(page, tmp_path, script="", query="", *flags):
    """The page as a browser has it after ``script`` ran."""
    if script:
        content = page.read_text().replace("</body>", f"<script>{script}</script></body>")
        page = page.with_name("scripted.html")
        page.write_text(content)
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        *flags,
    ]
    command += ["--window-size=1000,800", "--virtual-time-budget=2000", "--dump-dom", page.as_uri() + query]
    return subprocess.run(command, capture_output=True, text=True, timeout=90).stdout


@needs_browser
def test_a_browser_draws_the_curves_with_their_legend(tmp_path):
    for model in (0, 1):
        fairseq_log(tmp_path / "run", model, nll=(3.5, 2.5 - model))
    shown = shown_by_browser(write(tmp_path)[0], tmp_path)
    chart = shown[shown.index('data-key="valid_nll_loss"') : shown.index("</figure>")]
    assert "<canvas" in chart
    assert re.search(r"model 0</div></th><td class=\"u-value\">2.5<", chart)
    assert re.search(r"model 1</div></th><td class=\"u-value\">1.5<", chart)
    assert 'data-shown="10 20"' in chart
    assert re.search(r'<span id="age">(just now|1 minute ago)', shown)


@needs_browser
def test_the_axis_may_be_time(tmp_path):
    fairseq_log(tmp_path / "run", 0)
    shown = shown_by_browser(write(tmp_path)[0], tmp_path, query="?axis=time")
    assert 'data-shown="60 120"' in shown
    assert re.search(r'<button data-axis="time" aria-pressed="true"', shown)


@needs_browser
def test_dragging_over_a_chart_zooms_the_charts_of_its_run_and_a_button_goes_back(tmp_path):
    fairseq_log(tmp_path / "run", 0, nll=[3.0] * 10)
    drag = """
        const over = document.querySelector(".u-over"), box = over.getBoundingClientRect();
        const send = (type, x) => over.dispatchEvent(new MouseEvent(type, {
            bubbles: true, button: 0, clientX: box.left + x, clientY: box.top + 50, movementX: 9, view: window }));
        send("mouseenter", 50); send("mousemove", 50); send("mousedown", 50);
        const up = (x) => document.dispatchEvent(new MouseEvent("mouseup", {
            bubbles: true, button: 0, clientX: box.left + x, clientY: box.top + 50, view: window }));
        send("mousemove", 150); up(150);
        const all = () => [...document.querySelectorAll("figure[data-shown]")].map((one) => one.dataset.shown);
        setTimeout(() => {
            const zoomed = all();
            document.getElementById("reset").click();
            setTimeout(() => { document.title = JSON.stringify([zoomed, all()]); });
        });
    """
    shown = shown_by_browser(write(tmp_path)[0], tmp_path, drag)
    zoomed, back = json.loads(re.search(r"<title>(.*?)</title>", shown).group(1))
    assert len(zoomed) >= 2
    first = [float(end) for end in zoomed[0].split()]
    assert 10 < first[0] < first[1] < 100
    for other in zoomed[1:]:
        assert [float(end) for end in other.split()] == pytest.approx(first, abs=3)
    assert set(back) == {"10 100"}


@needs_browser
def test_dark_is_what_the_system_prefers_until_the_button_says_otherwise(tmp_path):
    fairseq_log(tmp_path / "run", 0)
    page = write(tmp_path)[0]
    prefers_dark = "--blink-settings=preferredColorScheme=0"
    assert 'data-theme="light"' in shown_by_browser(page, tmp_path)
    assert 'data-theme="dark"' in shown_by_browser(page, tmp_path, "", "", prefers_dark)
    click = 'document.getElementById("theme").click()'
    assert 'data-theme="dark"' in shown_by_browser(page, tmp_path, click)
    assert 'data-theme="light"' in shown_by_browser(page, tmp_path, click, "", prefers_dark)


def test_the_console_script_prints_table_and_files(tmp_path):
    fairseq_log(tmp_path / "run", 0)
    command = [sys.executable, "-m", "fairseq_codistill.report.page", str(tmp_path / "run")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| run | 0 | silent | 20 | 2 | 2 | 3 |" in printed
    assert f"page: {tmp_path / 'run/report/report.html'}" in printed.splitlines()


def test_the_report_needs_no_matplotlib(tmp_path):
    fairseq_log(tmp_path / "run", 0)
    hide = "import sys; sys.modules['matplotlib'] = None; "
    code = hide + "from fairseq_codistill.report.page import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    assert "report.html" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    refused = subprocess.run([*command, "--figures"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "fairseq-codistill[demo]" in refused.stderr


def test_what_the_page_is_made_of_is_installed_with_its_licence():
    folder = Path(report.__file__).parent
    pyproject = (folder.parents[1] / "pyproject.toml").read_text()
    assert '"fairseq_codistill.report" = ["assets/*", "vendor/*"]' in pyproject
    assert '"fairseq_codistill/report/vendor/uPlot.LICENSE"' in pyproject
    version = re.search(r"# uPlot (\S+)", (folder / "vendor/README.md").read_text()).group(1)
    assert f"(v{version})" in (folder / "vendor/uPlot.iife.min.js").read_text()[:200]
    assert {file.parent.name for file in folder.rglob("*") if file.suffix in (".js", ".css")} == {"assets", "vendor"}


def test_a_table_that_is_read_only_in_part_is_no_error(tmp_path):
    fairseq_log(tmp_path / "run", 0)
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` has by then
    command = [sys.executable, "-m", "fairseq_codistill.report.page", str(tmp_path / "run")]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "run/report/report.html").exists()
