"""A model whose processes end with exit code 0 has finished, however its script ends, and leaves nobody in want."""

import pytest
from launching import finish, lines_until

LOOP = """
    import torch
    from fairseq_codistill import Codistiller

    torch.manual_seed(model)
    net = torch.nn.Linear(2, 3)

    def update():
        peers.loss(net(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0]), range(4)).backward()

    def train():
        peers.meet(net)
        update()
        while model == 0 and not peers.coordinator.peers[1].is_done:
            update()
        update()

    # Longer than the launcher takes to see that a process has ended, and to tell.
    peers = Codistiller(require_peers="always", timeout=60)
"""
ENDS = {
    "the end of the script": """
    train()
    """,
    "sys.exit(0) within": """
    with peers:
        train()
        sys.exit(0)
    """,
    "close()": """
    train()
    peers.close()
    """,
}


@pytest.mark.parametrize("end", ENDS)
def test_who_goes_on_alone_comes_to_its_end(launch, end):
    code, lines = finish(launch(LOOP + ENDS[end], "--log-dir", "none"))
    assert code == 0, lines


def test_who_failed_has_not_finished(launch):
    # Its way out of the block is that of an error, and the other one is alone.
    fails = """
    with peers:
        train() if model == 0 else (peers.meet(net), update(), sys.exit(3))
    """
    code, lines = finish(launch(LOOP.replace("timeout=60", "timeout=2") + fails, "--log-dir", "none"))
    assert code != 0
    assert any("NoPeersError" in line and "failed: SystemExit" in line for line in lines), lines


def test_who_is_started_again_after_the_other_one_failed_for_good_comes_to_its_end(launch, tmp_path):
    once = f"""
    if model == 0:
        sys.exit(3)
    if not os.path.exists("{tmp_path}/again"):
        open("{tmp_path}/again", "w").close()
        wait_for("{tmp_path}/failed")
        sys.exit(4)
    with Codistiller(start_timeout=100) as peers:
        peers.meet(net)
        update()
    """
    launcher = launch(LOOP.split("    # Longer")[0] + once, "--log-dir", "none", "--max-restarts", "1")
    seen = lines_until(launcher, "the other models go on without it")
    (tmp_path / "failed").touch()
    code, lines = finish(launcher)
    assert code == 1, [*seen, *lines]
    assert not any("model 1 failed" in line for line in lines), lines
