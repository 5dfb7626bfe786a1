"""How errors name a setting to whoever wrote Python and not a command line."""

import pytest
import torch
from helpers import free_ports

from fairseq_codistill import Codistiller, ConfigError
from fairseq_codistill.coordinator.attendance import NoPeersError
from fairseq_codistill.wording import NamedAsArguments


@pytest.mark.parametrize("kind", [ConfigError, NoPeersError])
def test_settings_are_named_as_arguments_where_there_is_no_command_line(kind):
    with pytest.raises(kind, match=r"^set require_peers never, start_timeout 2, seed 1$"), NamedAsArguments(True):
        raise kind("set --codistill-require-peers never, --codistill-start-timeout 2, --seed 1")
    with pytest.raises(kind, match="--codistill-require-peers"), NamedAsArguments(False):
        raise kind("set --codistill-require-peers never")


def test_whoever_meets_nobody_reads_what_to_set_in_python():
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    with (
        Codistiller(num_models=2, model_index=0, addresses=addresses, start_timeout=0.3) as codistiller,
        pytest.raises(NoPeersError, match=r"\(start_timeout 0.3\).* set require_peers never"),
    ):
        codistiller.meet(torch.nn.Linear(2, 2), 4)
