"""The page of runs that go on: it follows them, hands out nothing else, and is readable in every state of a run."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import live_runs
import pytest

from fairseq_codistill.report import snapshots, status
from fairseq_codistill.report.live import make_server
from fairseq_codistill.report.page import main as report_main
from fairseq_codistill.report.runs import find_runs
from fairseq_codistill.report.snapshots import Reader, Snapshot
from fairseq_codistill.report.standing import standing
from fairseq_codistill.report.state import model_state


@pytest.fixture
def serving():
    """Function from a folder to the address of a server of it."""
    with contextlib.ExitStack() as stack:

        def start(folder, **options):
            server = stack.enter_context(make_server(folder, "127.0.0.1", 0, **options))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start


def get(url, **headers):
    """Status, headers and body of an answer."""
    try:
        with status.DIRECTLY.open(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_a_model_says_of_each_peer_what_its_log_last_said(tmp_path):
    live_runs.make_run(tmp_path, num_models=3, dead=1)
    (run,) = find_runs(tmp_path)
    stands = standing(run, time.time())
    assert [model.state.word for model in stands.models] == ["live", "failed", "live"]
    assert [(view.model, view.state) for view in stands.models[0].peers] == [(1, "away"), (2, "present")]
    assert "nothing for epoch 7" in stands.models[2].peers[1].why
    assert [one.model for one in stands.warnings] == ["0", "2", "1"]
    assert stands.warnings[2].what.startswith("rank 0 killed by SIGKILL")
    assert stands.models[0].sent_megabits_per_update == pytest.approx(12.4)


def test_of_several_ranks_the_gravest_view_is_shown(tmp_path):
    live_runs.make_run(tmp_path, num_updates=40)
    (tmp_path / "model-0.rank1.log").write_text(live_runs.peer(time.time(), 1, "away", "present", "nothing came"))
    (run,) = find_runs(tmp_path)
    (view,) = standing(run, time.time()).models[0].peers
    assert (view.state, view.why) == ("away", "rank 1: nothing came")


def test_an_open_page_is_told_of_what_is_new_and_of_nothing_else(serving, tmp_path):
    live_runs.make_run(tmp_path / "run", num_updates=100)
    url = serving(tmp_path / "run", every_s=0.2)
    code, headers, body = get(f"{url}/page.json")
    assert code == 200
    version = headers["ETag"]
    assert "<td>100</td>" in json.loads(body)["body"]
    assert get(f"{url}/page.json", **{"If-None-Match": version})[0] == 304
    assert get(f"{url}/page.json", **{"Accept-Encoding": "gzip"})[1]["Content-Encoding"] == "gzip"
    with (tmp_path / "run/model-0.log").open("a") as log:
        log.write(live_runs.inner(time.time(), 0, 120))
    deadline = time.monotonic() + 30
    while (answer := get(f"{url}/page.json", **{"If-None-Match": version}))[0] == 304:
        assert time.monotonic() < deadline
    assert "<td>120</td>" in json.loads(answer[2])["body"]


def test_logs_are_read_for_a_tenth_of_the_time_however_many_ask(tmp_path, monkeypatch):
    live_runs.make_run(tmp_path, num_updates=40)
    now, num_readings, read = [1000.0], [], snapshots.read

    def slow_read(*arguments):
        num_readings.append(now[0])
        now[0] += 3.0  # a reading takes three seconds
        return read(*arguments)

    monkeypatch.setattr(snapshots, "read", slow_read)
    monkeypatch.setattr(snapshots, "monotonic", lambda: now[0])
    reader = Reader(tmp_path, every_s=2.0)
    for _ in range(100):
        reader.snapshot()
        now[0] += 1.0
    assert num_readings == [1000.0, 1030.0, 1060.0, 1090.0]


def test_nothing_but_the_logs_that_are_shown_is_handed_out(serving, tmp_path):
    live_runs.make_run(tmp_path / "run", num_updates=40)
    (tmp_path / "secret.txt").write_text("secret")
    url = serving(tmp_path / "run")
    code, headers, body = get(f"{url}/log/1")
    assert (code, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert body == (tmp_path / "run/model-1.log").read_bytes()
    for path in ("log/2", "log/-1", "log/x", "log/../../secret.txt", "../secret.txt", "log/%2e%2e/secret.txt", "run"):
        assert get(f"{url}/{path}")[0] == 404, path
    refused = urllib.request.Request(url, data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        status.DIRECTLY.open(refused, timeout=30)


def test_a_page_from_elsewhere_cannot_read_it_through_a_name_of_its_own(serving, tmp_path):
    live_runs.make_run(tmp_path, num_updates=40)
    url = serving(tmp_path)
    assert get(f"{url}/status.json", Host="evil.example")[0] == 403
    assert get(f"{url}/status.json", Host="[bad")[0] == 403
    assert get(f"{url}/status.json", Host="localhost:6010")[0] == 200
    assert "default-src 'none'" in get(url)[2].decode()


def test_an_address_that_cannot_be_had_is_an_error_that_names_the_options(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        report_main([str(tmp_path), "--serve", "--port", str(taken.getsockname()[1])])
    assert "--port 0 picks a free one" in capsys.readouterr().err
    for wrong in (["--port", "70000"], ["--every", "0"], ["--figures"], ["--out", "x"]):
        with pytest.raises(SystemExit):
            report_main([str(tmp_path), "--serve", *wrong])
        assert wrong[0] in capsys.readouterr().err


def test_metrics_are_what_a_scraper_of_openmetrics_understands(serving, tmp_path):
    live_runs.make_run(tmp_path / 'a "run"', num_models=3, dead=1)
    code, headers, body = get(f"{serving(tmp_path)}/metrics")
    text = body.decode()
    assert (code, headers["Content-Type"].split(";")[0]) == (200, "application/openmetrics-text")
    assert text.endswith("# EOF\n")
    named = r'run="a \"run\"",model="0"'
    assert f"codistill_updates{{{named}}} 1200\n" in text
    assert f"codistill_sent_bits_total{{{named}}} " in text
    assert f'codistill_state{{{named},codistill_state="live"}} 1\n' in text
    assert f'codistill_peer_state{{{named},peer="1",codistill_peer_state="away"}} 1\n' in text
    families = re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)
    assert len(families) == len(set(families))
    for line in text.splitlines():
        assert re.fullmatch(r'# (TYPE|HELP) .*|# EOF|\w+(\{(\w+="(\\.|[^"\\])*",?)+\})? [-+\w.]+', line), line
    parser = pytest.importorskip("prometheus_client.openmetrics.parser", reason="prometheus-client is not installed")
    assert {family.name for family in parser.text_string_to_metric_families(text)} == set(families)


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    command = [sys.executable, "-m", "fairseq_codistill.report.page", str(tmp_path / "later"), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            url = re.match(r"(http://127\.0\.0\.1:\d+/) shows ", said).group(1)
            assert "is not there yet" in process.stdout.readline()
            assert b"No log of a training is here yet" in get(url)[2]
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()


def told(capsys, *arguments):
    """Exit code and text of codistill-status."""
    code = status.main([*map(str, arguments)])
    return code, capsys.readouterr().out


def test_the_terminal_has_a_line_a_model_and_the_last_warnings(tmp_path, capsys):
    live_runs.make_run(tmp_path / "lost", num_models=3, dead=1)
    code, text = told(capsys, tmp_path)
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == "lost  live  model 1 has failed: rank 0 killed by SIGKILL"
    assert lines[1].split() == "model state updates updates/s train valid best agree wait sent peers".split()
    assert re.match(r"  0      live +1,200 .* 1 away, 2 present$", lines[2])
    units = "agree: share of 1; wait: ms an update; sent: Mbit an update"
    assert lines[5] == f"  (valid, best: validation NLL (bits per target token); {units})"
    assert "model 1 is away (was present)" in lines[6]
    assert "\033[" not in text


def test_an_address_and_a_folder_say_the_same(serving, tmp_path, capsys):
    live_runs.make_run(tmp_path / "run", num_updates=100)
    url = serving(tmp_path)
    assert told(capsys, url) == told(capsys, url.removeprefix("http://")) == told(capsys, tmp_path)
    of_address, of_folder = (json.loads(told(capsys, place, "--json")[1]) for place in (url, tmp_path))
    assert of_address["runs"] == of_folder["runs"]


def test_an_address_is_asked_past_the_proxy_of_the_environment(serving, tmp_path):
    live_runs.make_run(tmp_path / "run", num_updates=40)
    nowhere = "http://127.0.0.1:1"
    settings = {**os.environ, "http_proxy": nowhere, "HTTP_PROXY": nowhere, "all_proxy": nowhere}
    settings.pop("no_proxy", None)
    settings.pop("NO_PROXY", None)
    command = [sys.executable, "-m", "fairseq_codistill.report.status", serving(tmp_path)]
    asked = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    assert "live" in asked.stdout


def test_scripts_are_told_by_the_exit_code_whether_all_is_well(tmp_path, capsys):
    assert told(capsys, tmp_path)[0] == 1
    live_runs.make_run(tmp_path / "run", num_updates=40)
    assert told(capsys, tmp_path)[0] == 0
    for log in (tmp_path / "run").iterdir():
        os.utime(log, (1, 1))
    code, text = told(capsys, tmp_path, "--watch", "1")  # no run is live: it ends
    assert (code, "silent" in text) == (1, True)


def test_a_watch_that_was_answered_goes_on_where_one_question_is_not(tmp_path, capsys, monkeypatch):
    live_runs.make_run(tmp_path / "run", num_updates=40)
    for log in (tmp_path / "run").iterdir():
        os.utime(log, (1, 1))
    ended = status.ask(str(tmp_path))
    live = {**ended, "runs": [{**run, "state": "live"} for run in ended["runs"]]}
    answers = iter([live, OSError("gone"), ended])

    def ask(place):
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(status, "ask", ask)
    assert status.main([str(tmp_path), "--watch", "0.2"]) == 1
    assert "gone; asked again" in capsys.readouterr().err


def test_what_is_no_number_is_none_in_json(tmp_path, capsys, monkeypatch):
    live_runs.make_run(tmp_path / "run", num_updates=40)
    found = status.ask(str(tmp_path))
    found["runs"][0]["models"][0]["throughput"] = (float("inf"), "words/s")
    monkeypatch.setattr(status, "ask", lambda place: found)
    model = json.loads(told(capsys, tmp_path, "--json")[1], parse_constant=pytest.fail)["runs"][0]["models"][0]
    assert model["throughput"] == [None, "words/s"]


def test_a_log_that_goes_while_it_is_judged_is_no_error(tmp_path):
    live_runs.make_run(tmp_path / "run", num_updates=40)
    (run,) = find_runs(tmp_path)
    for log in (tmp_path / "run").iterdir():
        log.unlink()
    assert model_state(run.models[0], 1e9).word == "silent"


@pytest.mark.parametrize("module", ["status", "page"])
def test_a_locale_without_a_dash_is_no_failed_run(tmp_path, module):
    live_runs.make_run(tmp_path / "run", num_updates=400)
    log = tmp_path / "run/model-1.log"  # not validated yet: a dash stands for it
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "| valid |" not in line))
    command = [sys.executable, "-m", f"fairseq_codistill.report.{module}", str(tmp_path)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert b"?" in ended.stdout


@pytest.mark.parametrize("place", ["nowhere", "127.0.0.1:1", "http://127.0.0.1:1/"])
def test_a_place_that_is_none_is_an_error(place, capsys):
    with pytest.raises(SystemExit) as ended:
        status.main([place])
    assert ended.value.code == 2
    assert place in capsys.readouterr().err


BROWSER = shutil.which("chromium")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
DARK = "--blink-settings=preferredColorScheme=0"


def browse(url, tmp_path, *flags):
    """The document that a browser has of ``url`` after some seconds of its own time."""
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        *flags,
    ]
    command += ["--window-size=1280,1500", "--virtual-time-budget=6000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture
def measured(monkeypatch):
    """The page measures itself: its title becomes what is too wide, how many charts are drawn, and its errors."""
    script = """<script>
        const errors = [];
        addEventListener("error", (event) => errors.push(event.message));
        addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
        setTimeout(() => {
            const wide = [document.documentElement, ...document.querySelectorAll("table.now")]
                .filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.className || one.tagName);
            const colour = getComputedStyle(document.body).backgroundColor;
            const canvases = [...document.querySelectorAll("canvas")];
            const blank = canvases.filter((one) => !one.getContext("2d")
                .getImageData(0, 0, one.width, one.height).data.some((value) => value)).length;
            document.title = JSON.stringify({ wide, colour, drawn: canvases.length, blank, errors });
        }, 4000);
    </script></body>"""
    page = Snapshot.html.func

    class Measured(Snapshot):
        html = property(lambda self: page(self).replace(b"</body>", script.encode()))

    monkeypatch.setattr(snapshots, "Snapshot", Measured)


CASES = {
    "two": {"num_models": 2},
    "eight": {"num_models": 8},
    "dead": {"num_models": 3, "dead": 1},
    "empty": None,
}


def screens():
    """Every case in light and in dark; the suite that is run by default takes one of the two."""
    for name, theme in (("two", "light"), ("eight", "dark"), ("dead", "light"), ("empty", "dark")):
        other = "dark" if theme == "light" else "light"
        yield pytest.param(name, theme, id=f"{name}-{theme}")
        yield pytest.param(name, other, id=f"{name}-{other}", marks=pytest.mark.screens)


@needs_browser
@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(("name", "theme"), screens())
def test_the_served_page_is_whole_in_every_state_of_a_run(serving, tmp_path, name, theme):
    folder = tmp_path / name
    folder.mkdir()
    if CASES[name]:
        live_runs.make_run(folder / "run", **CASES[name])
    shown = browse(serving(folder), tmp_path, *([DARK] if theme == "dark" else []))
    found = json.loads(re.search(r"<title>(.*?)</title>", shown).group(1))
    assert found["errors"] == []
    assert found["wide"] == []
    assert found["blank"] == 0
    assert found["colour"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 27)"}[theme]
    assert (found["drawn"] >= 6) == (name != "empty")
    assert re.search(r'<span id="link"[^>]* class="on">up to date', shown)
    wanted = {
        "two": r"<b>1</b> present",
        "eight": r"<b>0, 1, 2, 3, 4, 5, 6</b> present",
        "dead": r'<span class="peer away"[^>]*><b>1</b> away',
        "empty": "No log of a training is here yet",
    }
    assert re.search(wanted[name], shown)
    assert ("Last warnings" in shown) == (name == "dead")


@needs_browser
def test_an_open_page_follows_the_run_and_keeps_what_a_person_has_chosen(serving, tmp_path, monkeypatch):
    live_runs.make_run(tmp_path / "run", num_updates=1000)
    script = """<script>
        document.querySelector("details").open = true;
        document.querySelector("figure .u-series:nth-child(3) .u-label").click();
    </script></body>"""
    page, packed, asked = Snapshot.html.func, Snapshot.packed_page.func, []

    class Growing(Snapshot):
        html = property(lambda self: page(self).replace(b"</body>", script.encode()))

        @property
        def packed_page(self):
            """After the first of its questions was answered, the run goes on."""
            if not asked:
                live_runs.make_run(tmp_path / "run", num_updates=1200)
                (tmp_path / "second").mkdir()
                shutil.copy(tmp_path / "run/model-0.log", tmp_path / "second/model-0.log")
            asked.append(self.version)
            return packed(self)

    monkeypatch.setattr(snapshots, "Snapshot", Growing)
    # A browser's virtual seconds take no time: so that logs are read again, each question takes the server one, too.
    monkeypatch.setattr(snapshots, "monotonic", itertools.count().__next__)
    shown = browse(serving(tmp_path, every_s=0.2), tmp_path)
    assert len(set(asked)) >= 2
    assert "<td>1,200</td>" in shown
    assert 'data-shown="100 1200"' in shown
    assert re.search(r'<details data-key="incidents run" open', shown)
    chart = shown[shown.index('data-group="run-run" data-key="valid_nll_loss"') :]
    chart = chart[: chart.index("</figure>")]
    assert re.search(r'<tr class="u-series u-off"[^>]*>(?:(?!</tr>).)*model 1', chart)
    assert shown.count('data-key="all_nll_loss"') == 1  # of the run that came meanwhile
