"""Where a rank of a Ray launch is started again, with a cluster that gives it another place than before."""

from types import SimpleNamespace

import pytest

from fairseq_codistill.launch.plan import Job
from fairseq_codistill.launch.ray_cluster import RayLaunch


def launch(host, gpus, is_relayed):
    """A launch whose one model was on node ``a``, and is placed anew."""
    found = RayLaunch.__new__(RayLaunch)
    found._actors, found._hosts, found._fixed = {}, {0: "a"}, set() if is_relayed else {0}
    killed = []
    found.cluster = SimpleNamespace(
        rank_again=lambda model, rank, give_up: ("actor", host, gpus), ray=SimpleNamespace(kill=killed.append)
    )
    return found, killed


def test_a_rank_that_moves_has_the_devices_of_its_new_place():
    found, killed = launch("b", ["3"], is_relayed=True)
    before = Job(0, None, ("prog",), {"CUDA_VISIBLE_DEVICES": "0", "OTHER": "1"})
    actor, job = found.actor_of(before, lambda: False)
    assert (actor, killed) == ("actor", [])
    assert job.environment == {"CUDA_VISIBLE_DEVICES": "3", "OTHER": "1"}
    assert before.environment["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize(("rank", "is_relayed"), [(None, False), (0, True), (1, False)])
def test_what_others_look_for_at_its_old_place_cannot_move(rank, is_relayed):
    found, killed = launch("b", ["3"], is_relayed)
    with pytest.raises(OSError, match="its place is now on b, and the others look for it at a"):
        found.actor_of(Job(0, rank, ("prog",), {}), lambda: False)
    assert killed == ["actor"]
