"""A model that has finished does not come again: who is started after it is told so, by whoever started both."""

import threading

import pytest
from helpers import free_ports
from test_attendance import make  # noqa: F401 - a fixture

from fairseq_codistill.coordinator.coordinator import NoPeersError
from fairseq_codistill.coordinator.herald import announce_death
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import DataOrder
from fairseq_codistill.coordinator.peers import IN_ORDER
from fairseq_codistill.coordinator.transports.curve_keys import make_keys
from fairseq_codistill.launch import deaths
from fairseq_codistill.launch.deaths import Deaths
from fairseq_codistill.launch.plan import Job
from fairseq_codistill.launch.supervisor import Supervisor

pytestmark = pytest.mark.timeout(60)
# Ends once the file that it is told by is there: with an error at its first start.
WAITS = """\
until [ -e {0}/told ]; do sleep 0.05; done
rm {0}/told
[ -e {0}/again ] || {{ touch {0}/again; exit 3; }}
"""


class Told:
    """In place of :class:`Deaths`: leaves a file."""

    def __init__(self, folder):
        self.said, self._folder = [], folder

    def announce(self, model, reason):
        self.said.append((model, reason))
        (self._folder / "told").touch()

    def close(self):
        pass


def test_models_that_go_on_or_are_started_again_are_told_of_one_that_has_finished(tmp_path):
    told = Told(tmp_path)
    jobs = [Job(0, None, ("true",)), Job(1, None, ("sh", "-c", WAITS.format(tmp_path)))]
    assert Supervisor(jobs, max_restarts=1, deaths=told).run() == 0
    assert told.said == [(0, IN_ORDER)] * 2


def test_a_model_of_which_one_rank_has_finished_has_not(tmp_path):
    told = Told(tmp_path)
    ranks = [
        Job(0, 0, ("true",)),
        Job(0, 1, ("sh", "-c", f"until [ -e {tmp_path}/over ]; do sleep 0.05; done; exit 1")),
    ]
    other = Job(1, None, ("sh", "-c", f"touch {tmp_path}/over; until [ -e {tmp_path}/told ]; do sleep 0.05; done"))
    assert Supervisor([*ranks, other], deaths=told).run() == 1
    assert [model for model, _ in told.said] == [0]
    assert told.said[0][1] != IN_ORDER


def test_a_finished_model_that_nobody_can_be_told_of_is_no_warning(tmp_path, caplog):
    folder = tmp_path / "keys"
    make_keys(str(folder), 2)
    for path in folder.glob("launcher.*"):
        path.unlink()
    addresses = "127.0.0.1:1,127.0.0.1:2"
    assert announce_death(addresses, 2, 1, 1, "", str(folder), IN_ORDER, timeout_s=300.0) == 0
    announcer = Deaths([Job(0, None, ("true",)), Job(1, None, ("true",))], 2, 1)  # which name no addresses
    announcer.announce(1, IN_ORDER)
    announcer.close()
    assert not caplog.records
    announcer.announce(1, "exit code 3")
    announcer.close()
    assert "were not told that model 1 has ended" in caplog.text


@pytest.mark.parametrize("elapsed", [0, 50])
def test_who_goes_on_and_meets_nobody_is_told_that_the_others_may_have_finished(make, elapsed):  # noqa: F811
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    alone = make(0, addresses, codistill_start_timeout=0.2)
    with pytest.raises(NoPeersError) as error:
        alone.meet(Identity({}, {}, "0", 0), DataOrder(100), elapsed=elapsed)
    assert ("as where the others have finished" in str(error.value)) is bool(elapsed)


def test_the_others_are_told_by_what_the_program_itself_goes_by(monkeypatch):
    """fairseq-train has options, and never looks for them in the environment."""
    monkeypatch.setenv("CODISTILL_RUN_ID", "of another session")
    assert deaths._setting(Job(0, None, ("fairseq-train", "data")), "--codistill-run-id") == ""
    assert deaths._setting(Job(0, None, ("python", "loop.py")), "--codistill-run-id") == "of another session"


def test_a_model_that_is_started_again_is_told_of_one_that_has_failed_for_good(tmp_path):
    told = Told(tmp_path)
    # The first fails at once and again; the other one fails once it is told so, and is told once more.
    jobs = [Job(0, None, ("false",)), Job(1, None, ("sh", "-c", WAITS.format(tmp_path)))]
    assert Supervisor(jobs, max_restarts=1, deaths=told).run() == 1
    assert told.said == [(0, "exit code 1"), (0, "given up: exit code 1")]


@pytest.mark.parametrize("elapsed", [0, 50])
def test_who_is_started_again_goes_on_without_one_that_failed_for_good_meanwhile(make, elapsed):  # noqa: F811
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    alone = make(0, addresses, codistill_start_timeout=50.0)
    words = (addresses, 2, 1, 1, "", "", "given up: exit code 3")
    announcer = threading.Thread(target=announce_death, args=words, kwargs={"timeout_s": 20.0})
    announcer.start()
    alone.meet(Identity({}, {}, "0", 0), DataOrder(100), elapsed=elapsed)  # fails without it, and not at once
    announcer.join()
