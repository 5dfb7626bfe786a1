"""Owns what the models tell each other when they meet, and whether they fit together."""

import dataclasses
import itertools
import json
import logging
import secrets
from typing import Any

import torch
from torch import nn

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.keys import parameters_digest
from fairseq_codistill.coordinator.peers import Peer

logger = logging.getLogger(__name__)
LONG = 8  # entries of a list from where on an error names the first that differs, not all
_introduced: set[tuple[str | int, ...]] = set()  # by this process: the names of its runs, and which model it was


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a rank tells the others about its job.

    Attributes:
        settings: must be equal on all models; name (as the user knows it) -> JSON value.
        remarks: listed beside the settings when batches do not align, but free to differ.
        parameters_digest: hex digest of the model's parameters at the start.
        seed: the job's own seed.
        num_updates: updates of the whole run, None where nobody knows: for a warning only.
    """

    settings: dict[str, Any]
    remarks: dict[str, Any]
    parameters_digest: str
    seed: int
    num_updates: int | None = None


def identity_of(
    model: nn.Module, settings: dict[str, Any], remarks: dict[str, Any], seed: int, num_updates: int | None = None
) -> Identity:
    """What the other models are told of this one."""
    remarks = {"torch version": str(torch.__version__), **remarks}
    return Identity(settings, remarks, parameters_digest(model.parameters()), seed, num_updates)


class Introduction:
    """What this rank says of itself, and what it makes of what others say.

    Args:
        config: validated options.
        identity: of the job.
        world_size: X, ranks of this model.

    Attributes:
        hello: JSON-serialisable; new at every start of the process.
    """

    def __init__(self, config: CodistillationConfig, identity: Identity, world_size: int):
        self._config, self._identity = config, identity
        self._equals: set[int] = set()  # models that start as this one does, of which was warned
        named = (config.codistill_run_id, config.codistill_addresses, config.codistill_relay, config.codistill_keys)
        me = (*named, config.codistill_model_index)
        if me in _introduced and any(named):
            logger.warning(
                "codistillation: this process was in a run of this name before; give one that comes after it another "
                "--codistill-run-id, or a model that is still in the one before is taken for one that is far ahead"
            )
        _introduced.add(me)
        is_tempered = config.takes_temperature(config.codistill_codec)
        self.hello: dict[str, Any] = {
            "incarnation": secrets.token_hex(8),
            "settings": {
                **identity.settings,
                "--codistill-num-models": config.codistill_num_models,
                # An order that is nobody else's is nobody else's affair.
                **({} if config.codistill_own_data else {"--codistill-data-seed": config.codistill_data_seed}),
                "--codistill-own-data": config.codistill_own_data,
                "--codistill-burn-in": config.codistill_burn_in,
                "--codistill-weight above 0": config.codistill_weight > 0,
                "--codistill-interval": config.codistill_interval,
                "--codistill-peers-per-position": config.codistill_peers_per_position,
                "--codistill-budget-mbit": config.codistill_budget_mbit,
                "--codistill-peer-weights": config.codistill_peer_weights,
                "--codistill-parts": config.codistill_parts,
                "--codistill-lookahead": config.codistill_lookahead,
                "--codistill-codec": config.codistill_codec,
                "--codistill-exchange": config.codistill_exchange,
                "--codistill-replica-wait": config.codistill_replica_wait,
                "--codistill-max-message-mb": config.codistill_max_message_mb,
                **({"--codistill-temperature": config.codistill_temperature} if is_tempered else {}),
                "devices per model": world_size,
            },
            "remarks": identity.remarks,
            "parameters_digest": identity.parameters_digest,
            "seed": identity.seed,
        }
        self.hello = json.loads(json.dumps(self.hello))  # as the others get it: lists for tuples, text for keys

    def why_unfit(self, peer: Peer) -> str | None:
        """Why codistillation with that peer makes no sense, as an error says it; None if it does."""
        assert peer.hello is not None
        mine, theirs = self._config.codistill_model_index, peer.model
        differences = self.differences(peer, "settings")
        if differences:
            return f"model {mine} and model {theirs} do not fit together; make equal: " + "; ".join(differences)
        if peer.hello.get("parameters_digest") != self._identity.parameters_digest:
            return None
        same_seed = peer.hello.get("seed") == self._identity.seed
        if self._config.codistill_allow_identical_init and not same_seed:
            if theirs in self._equals:
                return None
            self._equals.add(theirs)
            logger.warning(
                "codistillation: models %d and %d start from identical parameters; only what their seeds draw can tell "
                "them apart: without dropout, or a part of each that begins anew, they stay equal and teach nothing",
                mine,
                theirs,
            )
            return None
        return (
            f"model {mine} (--seed {self._identity.seed}) and model {theirs} (--seed {peer.hello.get('seed')}) start "
            "from identical parameters, so they have nothing to teach each other; give every model its own --seed"
            + ("" if same_seed else ", or pass --codistill-allow-identical-init to fine-tune one checkpoint")
        )

    def differences(self, peer: Peer, part: str) -> list[str]:
        """What differs between here and there in ``settings`` or ``remarks``, one text for each."""
        mine, theirs = self.hello.get(part, {}), (peer.hello or {}).get(part)
        theirs = theirs if isinstance(theirs, dict) else {}
        return [
            _difference(name, mine.get(name), theirs.get(name), peer.model)
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
            and json.dumps(mine.get(name), sort_keys=True) != json.dumps(theirs.get(name), sort_keys=True)  # NaN
        ]


def _difference(name: str, mine: Any, theirs: Any, model: int) -> str:
    """As an error says it; of long lists their first entry that differs, counted from 0."""
    if isinstance(mine, list) and isinstance(theirs, list) and max(len(mine), len(theirs)) > LONG:
        pairs = enumerate(itertools.zip_longest(mine, theirs))
        number, (mine, theirs) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        name = f"{name}, number {number}"
    here, there = (
        f"{len(one)} of them" if isinstance(one, list) and len(one) > LONG else repr(one) for one in (mine, theirs)
    )
    return f"{name}: {here} here, {there} on model {model}"
