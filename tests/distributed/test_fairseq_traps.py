"""What fairseq does to a criterion between and around updates, with a scripted peer that answers something else.

A real Trainer on real batches; only the transport is replaced, by one whose peer doubles our logits.
"""

import numpy as np
import pytest
import torch
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from helpers import NUM_PARTS, codistill_command
from omegaconf import OmegaConf

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.wire import Kind, Message, parse
from fairseq_codistill.tasks import codistillation  # registers the task and the criterion

STOCK_KEYS = {"loss", "nll_loss", "ntokens", "nsentences", "sample_size"}
ADDRESSES = "127.0.0.1:1,127.0.0.1:2"


class DoublingPeer(Transport):
    """Model 1: answers every post with twice our logits, for the same batch."""

    def __init__(self):
        self.keys = []
        self.change = lambda logits: logits * 2
        self._answers = []

    def send(self, peer_model, header, payload):
        message = parse(header, payload)
        if message.kind is Kind.PREDICTIONS:
            self.keys.append(tuple(message.key))
            codec = make_codec("fp32")
            logits = codec.decode(message.payload, message.num_rows, message.num_classes, 0)
            answer = Message(
                Kind.PREDICTIONS, 1, 0, message.run_id, codec.encode(self.change(logits.clone()), 0),
                message.key, message.fingerprint, message.num_rows, message.num_classes, codec.code,
            )  # fmt: skip
        elif message.kind is Kind.HELLO:
            answer = Message(Kind.HELLO, 1, 0, message.run_id, b'{"incarnation": "peer", "seen": [0]}')
        else:
            return True
        self._answers.append((answer.header(), answer.payload))
        return True

    def receive(self, timeout_s):
        return self._answers.pop(0) if self._answers else None

    def close(self, linger_s):
        pass


class Job:
    """One model's trainer in this process, opposite a :class:`DoublingPeer`."""

    def __init__(self, data, tmp_path, *extra):
        command = codistill_command(data, tmp_path, 0, ADDRESSES, "--codistill-codec", "fp32", "--seed", "3", *extra)
        args = command[3:]
        del args[args.index("--user-dir") : args.index("--user-dir") + 2]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), args))
        metrics.reset()
        np.random.seed(cfg.common.seed)
        utils.set_torch_seed(cfg.common.seed)
        self.task = tasks.setup_task(cfg.task)
        model = self.task.build_model(cfg.model)
        self.criterion = self.task.build_criterion(cfg.criterion)
        self.trainer = Trainer(cfg, self.task, model, self.criterion)
        self.peer = DoublingPeer()
        if self.criterion.config.is_codistilled:
            peers = self.criterion.peers
            peers.coordinator = Coordinator(self.criterion.config, num_kept=peers._num_kept, transport=self.peer)
            peers.has_met = True
        self.updates = self._updates(max(self.criterion.config.update_freq))

    def _updates(self, update_freq):
        """Groups of micro-batches, as fairseq's training loop makes them."""
        from fairseq.data.iterators import GroupedIterator

        epoch = 1
        while True:
            iterator = self.trainer.get_train_iterator(epoch)
            groups = GroupedIterator(iterator.next_epoch_itr(shuffle=True), update_freq)
            self.trainer.begin_epoch(epoch)
            yield from groups
            epoch += 1

    def step(self, samples=None):
        """One update; returns what the trainer logs."""
        return self.trainer.train_step(samples if samples is not None else next(self.updates))

    def run_criterion(self, sample):
        """The criterion alone in training mode: (loss, sample size, logging output)."""
        self.trainer.model.train()
        self.criterion.train()
        return self.criterion(self.trainer.model, sample)


def keys_of(num_batches):
    """What was posted in the first epoch: a key a part of each batch."""
    return [(1, batch, part) for batch in range(num_batches) for part in range(NUM_PARTS)]


def test_positions_follow_the_batches_under_update_freq(toy_data, tmp_path):
    job = Job(toy_data, tmp_path, "--update-freq", "2", "--codistill-parts", "1")
    for _ in range(3):
        logged = job.step()
        assert logged["codistill_peers"] == 1
        assert logged["codistill_mse"] > 0
    assert job.peer.keys == [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 1)]


def test_with_the_lookahead_the_next_batch_is_posted_by_the_update_before(toy_data, tmp_path):
    job = Job(toy_data, tmp_path, "--codistill-lookahead", "--codistill-parts", "1")
    job.step()
    assert job.peer.keys == [(1, 0, 0), (1, 1, 0)]


def test_batches_are_cut_from_the_position_on_that_the_models_agreed_on_and_a_dummy_never(toy_data, tmp_path):
    job = Job(toy_data, tmp_path, "--update-freq", "2", "--codistill-parts", "auto")
    parting = job.criterion.peers._parting
    parting.hear(1, {"splits": True, "schedule": [1, 1, 2, 1]})
    logged = [job.step(), job.step(), job.trainer.train_step([{}, {}])]
    parting.hear(1, {"splits": True, "schedule": [2, 3, 4, 2]})
    logged += [job.step(), job.step()]
    parting.hear(1, {"splits": True, "schedule": [3, 4, 1, 4]})
    logged += [job.step()]
    whole, halves, quarter = [0, 7], [1, 2, 8, 9], [3, 4, 5, 6]  # the last update of the epoch has one batch
    slots = {key[:2]: [] for key in job.peer.keys}
    for key in job.peer.keys:
        slots[key[:2]].append(key[2])
    assert slots == {(1, 0): whole, (1, 1): halves, (1, 2): halves, (1, 3): quarter, (2, 0): whole}
    for log in (*logged[:2], *logged[3:]):
        assert log["codistill_peers"] == 1
        assert log["codistill_mse"] > 0


def test_distilled_loss_is_supervised_loss_plus_weighted_divergence(toy_data, tmp_path):
    job = Job(toy_data, tmp_path, "--codistill-weight", "0.5", "--dropout", "0")
    sample = next(job.updates)[0]
    loss, sample_size, log = job.run_criterion(sample)
    plain = {name: value for name, value in sample.items() if name != "codistill"}
    supervised, _, plain_log = job.run_criterion(plain)
    logits = job.trainer.model(**sample["net_input"])[0]
    rows = logits[sample["target"] != job.task.target_dictionary.pad()]
    expected = (rows**2).mean(-1).sum()  # the peer is twice us: the difference is ourselves
    assert sample_size == rows.size(0) == sample["ntokens"]
    assert log["codistill_divergence"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert (loss - supervised).item() == pytest.approx(0.5 * expected.item(), rel=1e-4)
    assert log.keys() == plain_log.keys()


def test_padding_never_reaches_the_divergence(toy_data, tmp_path):
    job = Job(toy_data, tmp_path, "--dropout", "0")
    sample = next(job.updates)[0]
    pad = job.task.target_dictionary.pad()
    _, _, log = job.run_criterion(sample)
    padded = {**sample, "net_input": dict(sample["net_input"])}
    padded["target"] = torch.nn.functional.pad(sample["target"], (0, 3), value=pad)
    previous = sample["net_input"]["prev_output_tokens"]
    padded["net_input"]["prev_output_tokens"] = torch.nn.functional.pad(previous, (0, 3), value=pad)
    padded["codistill"] = {**sample["codistill"], "key": (1, 1, 0)}
    _, _, padded_log = job.run_criterion(padded)
    assert padded_log["codistill_rows"] == log["codistill_rows"]
    assert padded_log["codistill_divergence"].item() == pytest.approx(log["codistill_divergence"].item(), rel=1e-5)


def test_dummy_batch_is_nobodys_position(toy_data, tmp_path):
    job = Job(toy_data, tmp_path)
    job.step()
    job.trainer.train_step([{}])  # how fairseq fills a ragged shard
    job.step()
    assert job.peer.keys == keys_of(2)


def test_batch_fed_again_is_neither_posted_nor_waited_for_again(toy_data, tmp_path):
    job = Job(toy_data, tmp_path, *"--amp --update-freq 2 --dropout 0 --lr 0 --codistill-parts 1".split())
    samples = next(job.updates)
    first = job.step(samples)
    job.peer.change = lambda logits: logits * 100
    again = job.step(samples)
    assert job.peer.keys == [(1, 0, 0), (1, 0, 1)]
    assert again["codistill_mse"] == pytest.approx(first["codistill_mse"])
    assert again["codistill_mbit"] == 0


def test_rerun_of_the_nan_detector_with_positional_arguments_gets_the_same_peers(toy_data, tmp_path):
    job = Job(toy_data, tmp_path)
    samples = next(job.updates)
    job.step(samples)
    trainer = job.trainer
    arguments = (samples[0], trainer.model, trainer.criterion, trainer.optimizer, trainer.get_num_updates())
    _, _, log = job.task.train_step(*arguments, ignore_grad=False)
    assert log["codistill_peers"] == 1
    assert job.peer.keys == keys_of(1)


def test_skipped_update_of_an_overflow_does_not_shift_positions(toy_data, tmp_path, monkeypatch):
    job = Job(toy_data, tmp_path)
    job.step()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self: self)

        def overflow(*args, **kwargs):
            raise OverflowError("gradient overflow")

        patch.setattr(job.trainer, "clip_grad_norm", overflow)
        job.step()
    job.step()
    assert job.trainer.get_num_updates() == 2
    assert job.peer.keys == keys_of(3)


def test_validation_is_the_plain_supervised_loss_and_posts_nothing(toy_data, tmp_path):
    job = Job(toy_data, tmp_path, "--label-smoothing", "0.1", "--label-smoothing-drop-epoch", "1")
    job.step()
    assert job.criterion.eps == 0.0  # dropped for training
    sample = next(job.updates)[0]
    job.trainer.model.eval()
    job.criterion.eval()
    with torch.no_grad():
        _, _, log = job.criterion(job.trainer.model, sample)
    assert log.keys() == STOCK_KEYS
    assert job.criterion.eps == 0.1
    assert job.peer.keys == keys_of(1)


def test_a_checkpoint_that_follows_a_validation_knows_what_it_came_to(toy_data, tmp_path):
    """fairseq saves at once, before the update that tells the peers."""
    job = Job(toy_data, tmp_path, "--codistill-peer-weights", "validation")
    job.step()
    job.task.load_dataset("valid")
    for batch in job.trainer.get_valid_iterator("valid").next_epoch_itr(shuffle=False):
        job.trainer.valid_step(batch)
    loss, num_tokens = (float(sum(column)) for column in zip(*job.task._validated, strict=True))
    job.trainer.consolidate_optimizer()  # which fairseq does before it saves
    saved = job.trainer.state_dict()["extra_state"]["codistill_replicas"]
    assert saved == {"validation": pytest.approx(loss / num_tokens)}
    job.step()
    assert job.trainer.state_dict()["extra_state"]["codistill_replicas"] == saved


def test_nonfinite_row_of_a_peer_is_counted_and_left_out(toy_data, tmp_path):
    job = Job(toy_data, tmp_path)
    sample = next(job.updates)[0]

    def spoil(logits):
        logits = logits * 2
        logits[0, 3] = float("nan")
        logits[2, 1] = float("inf")
        return logits

    job.peer.change = spoil
    loss, _, log = job.run_criterion(sample)
    assert torch.isfinite(loss)
    assert log["codistill_nonfinite"] == 2
    assert log["codistill_rows"] == sample["ntokens"] - 2


def test_same_keys_at_every_training_step_with_and_without_peers(toy_data, tmp_path):
    distilled = Job(toy_data, tmp_path).step()
    burning_in = Job(toy_data, tmp_path, "--codistill-burn-in", "100")
    assert burning_in.step().keys() == distilled.keys()
    assert burning_in.peer.keys == []
    alone = Job(toy_data, tmp_path, "--codistill-num-models", "1", "--codistill-addresses", "")
    assert alone.step().keys() == distilled.keys()
    wanted = "loss mse weight agreement peers skipped wait_ms mbit".split()
    assert {f"codistill_{name}" for name in wanted} < distilled.keys()


def test_weight_grows_every_epoch_and_waits_for_the_burn_in(toy_data, tmp_path):
    job = Job(
        toy_data, tmp_path, "--codistill-weight", "2", "--codistill-weight-growth", "1.5", "--codistill-burn-in", "1"
    )
    weights = {}
    for samples in job.updates:
        key = tuple(samples[0]["codistill"]["key"])
        weights[key[:2]] = job.step(samples)["codistill_weight"]
        if key[0] == 2:
            break
    assert weights.pop((1, 0)) == 0
    assert weights.pop((2, 0)) == 3
    assert set(weights.values()) == {2}


def test_weight_ends_at_its_ceiling_and_is_in_the_log_once_an_epoch(toy_data, tmp_path, caplog):
    job = Job(
        toy_data, tmp_path, "--codistill-weight", "2", "--codistill-weight-growth", "1.5", "--codistill-weight-max", "4"
    )
    with caplog.at_level("INFO"):
        for samples in job.updates:
            weight = job.step(samples)["codistill_weight"]
            if samples[0]["codistill"]["key"][0] == 4:
                break
    assert weight == 4
    told = [record.getMessage() for record in caplog.records if "alpha is" in record.getMessage()]
    assert told == [f"codistillation: alpha is {alpha} in epoch {epoch}" for epoch, alpha in enumerate((2, 3, 4, 4), 1)]


def test_burn_in_counts_updates_over_epochs_of_different_update_freq(toy_data, tmp_path):
    job = Job(toy_data, tmp_path, "--update-freq", "1,4")
    elapsed = []
    for epoch in (1, 2):
        iterator = job.trainer.get_train_iterator(epoch)
        iterator.epoch = epoch
        elapsed += [batch["codistill"]["elapsed"] for batch in iterator.next_epoch_itr(shuffle=True)]
    half = len(elapsed) // 2
    assert elapsed[:half] == list(range(half))
    assert elapsed[half:] == [half + index // 4 for index in range(half)]


def begins_at(job, num_behind):
    """Epoch and position of the first batch, where the others are so many updates ahead."""
    job.criterion.peers.num_behind = lambda elapsed, within_reach=True: num_behind
    return next(job.updates)[0]["codistill"]["key"][:2]


def test_nobody_is_followed_past_the_own_last_epoch(toy_data, tmp_path, caplog):
    assert begins_at(Job(toy_data, tmp_path, "--max-epoch", "1"), 1000) == (1, 0)
    assert "past --max-epoch 1" in caplog.text


def test_batches_made_anew_for_every_epoch_are_skipped_within_their_epoch_only(toy_data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tasks.FairseqTask, "can_reuse_epoch_itr", lambda task, dataset: False)
    assert begins_at(Job(toy_data, tmp_path), 1000) == (1, 0)
    assert "made anew for every epoch" in caplog.text
    assert begins_at(Job(toy_data, tmp_path), 3) == (1, 3)


@pytest.mark.parametrize("is_on", [False, True])
def test_models_compare_whether_the_seed_is_that_of_the_epoch(toy_data, tmp_path, monkeypatch, is_on):
    job = Job(toy_data, tmp_path, *["--update-ordered-indices-seed"][: int(is_on)])
    job.criterion.peers.has_met, compared = False, []
    monkeypatch.setattr(job.criterion.peers, "meet", lambda *_, batch_settings, **__: compared.append(batch_settings))
    next(job.updates)
    assert [given.get("--update-ordered-indices-seed") for given in compared] == [True if is_on else None]


def test_sentence_average_divides_by_sentences(toy_data, tmp_path):
    job = Job(toy_data, tmp_path, "--sentence-avg")
    sample = next(job.updates)[0]
    _, sample_size, log = job.run_criterion(sample)
    assert sample_size == sample["target"].size(0)
    assert log["codistill_rows"] == sample["ntokens"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task", "translation"], "use --task codistill_translation"),
        (["--codistill-codec", "fp8"], "--codistill-codec is 'fp8'"),
        (["--codistill-addresses", "127.0.0.1:1"], "2 HOST:PORT entries"),
        (["--codistill-model-index", "2"], "--codistill-model-index is 2"),
        (["--label-smoothing", "1.5"], "--label-smoothing is 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(toy_data, tmp_path, extra, message):
    with pytest.raises(ConfigError, match=message):
        Job(toy_data, tmp_path, *extra)


@pytest.mark.parametrize(
    ("extra", "ranks", "skips"), [([], 2, True), (["--use-bmuf"], 2, False), (["--use-bmuf"], 1, True)]
)
def test_ranks_skip_inside_an_epoch_where_all_of_them_know_the_figures(
    toy_data, tmp_path, monkeypatch, extra, ranks, skips
):
    job = Job(toy_data, tmp_path, *extra)
    next(job.updates)
    before = job.task._batches.elapsed
    monkeypatch.setattr(codistillation, "rank_and_world_size", lambda: (0, ranks))
    stock = dict.fromkeys(("loss", "nll_loss", "ntokens", "sample_size"), 1)
    with metrics.aggregate(new_root=True):
        job.task.reduce_metrics([{**stock, "codistill_behind": 3.0, "codistill_lagging": 1.0}], job.criterion)
    assert (job.task._batches.elapsed - before > 0) == skips


def test_another_criterion_is_refused_by_the_task(toy_data, tmp_path):
    task = Job(toy_data, tmp_path).task
    with pytest.raises(ConfigError, match="needs --criterion codistillation"):
        task.build_criterion(OmegaConf.create({"_name": "cross_entropy", "sentence_avg": False}))


def test_adaptive_softmax_is_refused_before_training(toy_data, tmp_path):
    job = Job(toy_data, tmp_path)
    job.criterion.peers.has_met = False
    job.trainer.get_model().decoder.adaptive_softmax = torch.nn.Identity()
    with pytest.raises(ConfigError, match="--adaptive-softmax-cutoff"):
        next(job.updates)
