"""The criterion against fairseq's own on the same logits, without sockets: peers are there already, or are not."""

import json
import typing
from types import GenericAlias, SimpleNamespace, UnionType

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.models import FairseqDecoder, FairseqLanguageModel
from torch.profiler import ProfilerActivity, profile

from fairseq_codistill import Codistiller, figures
from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.predictions import Exchange
from fairseq_codistill.criterion import CodistillationCriterion, CodistillationCriterionConfig
from fairseq_codistill.fairseq_side import stock_checkpoint
from fairseq_codistill.fairseq_side.batches import TAG
from fairseq_codistill.fairseq_side.parts import counted_rows, cut, num_tokens_each
from fairseq_codistill.fairseq_side.shareable import refuse_what_differs
from fairseq_codistill.losses import sweep
from fairseq_codistill.losses.distillation import peer_divergence
from fairseq_codistill.tasks.codistillation import CodistillationTaskMixin
from fairseq_codistill.testing import Script, ScriptedTransport

PAD, NUM_CLASSES, WEIGHT = 1, 9, 0.7
TARGET = torch.tensor([[4, 5, 6, 2], [7, 2, PAD, PAD], [3, 8, 2, PAD]])
TASK = SimpleNamespace(target_dictionary=SimpleNamespace(pad=lambda: PAD))


class GivenLogits(FairseqLanguageModel):
    """A model whose logits are its only parameters."""

    def __init__(self, logits):
        super().__init__(FairseqDecoder(SimpleNamespace()))
        self.logits = torch.nn.Parameter(logits.clone())

    def forward(self):
        return self.logits, None


class OwnProbabilities(GivenLogits):
    """A model whose probabilities are not the softmax of its logits, but sharper."""

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        assert log_probs
        return torch.log_softmax(3 * net_output[0], dim=-1)


class Wrapper(torch.nn.Module):
    """As those for data-parallel training: a module around the model that passes names on."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self):
        return self.module()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class GivenPeers:
    """Stands in for the coordinator."""

    def __init__(self, predictions):
        self.predictions, self.posted = predictions, []

    def is_due(self, elapsed):
        return True

    def poll(self, elapsed):
        pass

    def num_behind(self, elapsed, within_reach=True):
        return 0

    def post(self, key, fingerprint, predictions, targets=None):
        self.posted.append(predictions)

    def collect(self, key=None):
        return Exchange(predictions=dict(enumerate(self.predictions, start=1)))


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(model, peers=None, weight=WEIGHT, divergence="kl", report_accuracy=True, **settings):
    """One training step of ours, with ``peers``, or of the stock criterion, with None."""
    smoothing, prefix = settings.get("label_smoothing", 0.1), settings.get("ignore_prefix_size", 0)
    if peers is None:
        criterion = LabelSmoothedCrossEntropyCriterion(TASK, False, smoothing, prefix, report_accuracy)
    else:
        config = CodistillationCriterionConfig(
            codistill_num_models=len(peers) + 1, codistill_divergence=divergence, codistill_weight=weight,
            label_smoothing=smoothing, ignore_prefix_size=prefix, report_accuracy=report_accuracy, sentence_avg=False,
            update_freq=[1],
        )  # fmt: skip
        criterion = CodistillationCriterion(TASK, config)
        criterion.peers.coordinator = GivenPeers(peers)
    sample = {"net_input": {}, "target": TARGET, "ntokens": int(TARGET.ne(PAD).sum())}
    sample[TAG] = {"key": (1, 0, 0), "elapsed": 0, "fingerprint": b""}
    loss, _, figures = criterion.train()(model, sample)
    loss.backward()
    return loss.detach(), model.get_parameter(next(iter(dict(model.named_parameters())))).grad, figures


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.0}, {"ignore_prefix_size": 1}])
@pytest.mark.parametrize(("peers", "weight"), [([], 1.0), (["not asked"], 0.0)])
def test_where_nothing_is_distilled_it_is_the_stock_criterion_bit_for_bit(peers, weight, settings):
    logits = random(*TARGET.shape, NUM_CLASSES, seed=0)
    loss, gradient, figures = run(GivenLogits(logits), peers, weight, **settings)
    stock_loss, stock_gradient, stock_figures = run(GivenLogits(logits), **settings)
    assert torch.equal(loss, stock_loss)
    assert torch.equal(gradient, stock_gradient)
    assert {key: figures[key] for key in stock_figures} == stock_figures
    assert figures["codistill_peers"] == 0


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.0}, {"ignore_prefix_size": 1}])
@pytest.mark.parametrize("is_due", [False, True])
@pytest.mark.parametrize("model_class", [GivenLogits, OwnProbabilities])
def test_an_update_without_an_exchange_is_the_stock_criterion(monkeypatch, model_class, is_due, settings):
    monkeypatch.setattr(GivenPeers, "is_due", lambda peers, elapsed: is_due)
    monkeypatch.setattr(GivenPeers, "collect", lambda peers, key=None: Exchange(predictions={}))
    logits = random(*TARGET.shape, NUM_CLASSES, seed=0)
    loss, gradient, figures = run(model_class(logits), ["does not answer"], **settings)
    stock_loss, stock_gradient, stock_figures = run(model_class(logits), **settings)
    torch.testing.assert_close(loss, stock_loss)
    torch.testing.assert_close(gradient, stock_gradient)
    for key in stock_figures:
        assert float(figures[key]) == pytest.approx(float(stock_figures[key]), rel=1e-6), key


class PerSentence(FairseqLanguageModel):
    """The same logits for every sentence that it is given."""

    def __init__(self):
        super().__init__(FairseqDecoder(SimpleNamespace()))
        self.logits = torch.nn.Parameter(random(TARGET.size(1), NUM_CLASSES, seed=0))

    def forward(self, sentences):
        return self.logits.expand(len(sentences), -1, -1), None


def test_a_part_that_the_budget_leaves_out_has_figures_of_its_own(monkeypatch):
    monkeypatch.setattr(GivenPeers, "has_room", lambda peers, elapsed, num_rows: not peers.posted, raising=False)
    monkeypatch.setattr(GivenPeers, "collect", lambda peers, key=None: Exchange(predictions={}, sent_bytes=1000))
    config = CodistillationCriterionConfig(
        codistill_num_models=2, codistill_divergence="kl", codistill_codec="counts:4", codistill_parts="2",
        codistill_budget_mbit=1.0, sentence_avg=False, update_freq=[1], label_smoothing=0.0, ignore_prefix_size=0,
        report_accuracy=False,
    )  # fmt: skip
    criterion, model = CodistillationCriterion(TASK, config).train(), PerSentence()
    criterion.peers.coordinator = GivenPeers([])
    target = torch.cat([TARGET, TARGET])
    sample = {"net_input": {"sentences": torch.arange(6)}, "target": target, "ntokens": 18, "nsentences": 6}
    sample[TAG] = {
        "key": (1, 0, 0), "elapsed": 0, "fingerprint": bytes(16), "tokens": num_tokens_each(target, PAD),
        **counted_rows(target, PAD),
    }  # fmt: skip
    sample["id"] = torch.arange(6)
    parts = cut(sample, 2, TAG)
    begun = [criterion.begin(model, part) for part in parts]
    figures = [criterion.finish(model, part, one)[2] for part, one in zip(parts, begun, strict=True)]
    assert [found["codistill_mbit"] for found in figures] == [pytest.approx(0.008), 0]
    assert [found["codistill_exchanges"] for found in figures] == [1, 0]


def test_an_update_without_an_exchange_takes_half_of_the_stock_memory_at_most(monkeypatch, tmp_path):
    monkeypatch.setattr(GivenPeers, "is_due", lambda peers, elapsed: False)
    monkeypatch.setattr(sweep, "CHUNK_ELEMENTS_CPU", 100_000)  # a row at a time, as a few of many are
    logits, peaks = random(*TARGET.shape, 100_000, seed=0), {}
    for name, peers in (("ours", ["not asked"]), ("stock", None)):
        model, live, peaks[name] = GivenLogits(logits), 0, 0
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run(model, peers, report_accuracy=False)
        profiler.export_chrome_trace(str(tmp_path / name))
        events = json.loads((tmp_path / name).read_text())["traceEvents"]
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
            live += event["args"]["Bytes"]
            peaks[name] = max(peaks[name], live)
    assert peaks["ours"] < 0.5 * peaks["stock"], peaks


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.0}, {"ignore_prefix_size": 1}])
@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("model_class", [GivenLogits, OwnProbabilities, lambda logits: Wrapper(GivenLogits(logits))])
def test_with_peers_it_is_the_stock_criterion_and_the_weighted_mean_divergence(model_class, divergence, settings):
    logits = random(*TARGET.shape, NUM_CLASSES, seed=0)
    target = TARGET[:, settings.get("ignore_prefix_size", 0) :]
    kept = target.ne(PAD)
    peers = [random(int(kept.sum()), NUM_CLASSES, seed=seed) for seed in (1, 2)]
    loss, gradient, figures = run(model_class(logits), peers, divergence=divergence, **settings)
    stock_loss, stock_gradient, stock_figures = run(model_class(logits), **settings)
    leaf = logits.clone().requires_grad_()
    mine = leaf[:, settings.get("ignore_prefix_size", 0) :][kept]
    each = torch.stack([peer_divergence(mine, peer, divergence) for peer in peers])
    (WEIGHT * each.mean()).backward()
    torch.testing.assert_close(loss, stock_loss + WEIGHT * each.mean().detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, stock_gradient + leaf.grad, rtol=1e-5, atol=1e-6)
    for key in stock_figures.keys() - {"loss"}:
        assert float(figures[key]) == pytest.approx(float(stock_figures[key]), rel=1e-6), key
    assert figures["loss"] == loss
    assert figures["codistill_loss"].item() == pytest.approx(WEIGHT * each.mean().item(), rel=1e-5)
    assert figures["codistill_divergence"].item() == pytest.approx(each.sum().item(), rel=1e-5)
    agreeing = sum(int((mine.argmax(dim=1) == peer.argmax(dim=1)).sum()) for peer in peers)
    assert figures["codistill_agreeing"] == agreeing
    assert figures["codistill_rows"] == figures["codistill_compared"] == 2 * int(kept.sum())


def test_the_supervised_loss_of_a_model_with_probabilities_of_its_own_is_taken_from_these():
    """Else the test above would hold for it by luck: softmax and its own probabilities must give different losses."""
    logits = random(*TARGET.shape, NUM_CLASSES, seed=0)
    peers = [random(int(TARGET.ne(PAD).sum()), NUM_CLASSES, seed=1)]
    _, _, plain = run(GivenLogits(logits), peers)
    _, _, own = run(OwnProbabilities(logits), peers)
    assert abs(plain["nll_loss"] - own["nll_loss"]) > 0.1
    assert plain["codistill_divergence"] == own["codistill_divergence"]


def test_keys_and_kinds_of_the_figures_are_the_same_with_and_without_peers():
    logits = random(*TARGET.shape, NUM_CLASSES, seed=0)
    peers = [random(int(TARGET.ne(PAD).sum()), NUM_CLASSES, seed=1)]
    _, _, some = run(GivenLogits(logits), peers)
    _, _, none = run(GivenLogits(logits), [])
    kinds = [{key: (type(value), getattr(value, "dtype", None)) for key, value in log.items()} for log in (some, none)]
    assert kinds[0] == kinds[1]


def test_the_types_of_options_are_ones_that_every_release_of_omegaconf_reads():
    """omegaconf 2.0, which fairseq 0.12.2 brings, fails on list[int] and int | None, and with it the whole plugin."""
    types = typing.get_type_hints(CodistillationCriterionConfig)
    assert {name for name, kind in types.items() if isinstance(kind, (GenericAlias, UnionType))} == set()
    assert types["max_tokens"] == typing.Optional[int]  # noqa: UP045


def test_agreement_in_validation_and_a_transfer_set_exclude_each_other():
    config = CodistillationCriterionConfig(
        codistill_num_models=2, codistill_addresses="127.0.0.1:1,127.0.0.1:2", codistill_transfer="shared",
        codistill_validate_agreement=True, update_freq=[1],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="--codistill-validate-agreement is set with --codistill-transfer shared"):
        config.validate()
    config.codistill_transfer, config.codistill_lookahead = "", True  # by which a peer seems to be past it
    with pytest.raises(ConfigError, match="--codistill-validate-agreement is set with --codistill-lookahead"):
        config.validate()


def test_peers_are_answered_during_a_validation():
    """Or else one that is started again meanwhile meets nobody."""

    class Stock:
        def valid_step(self, sample, model, criterion):
            return torch.tensor(2.0), 3, {"nll_loss": 2.0, "ntokens": 3}

    class Task(CodistillationTaskMixin, Stock):
        def __init__(self, criterion):
            self._criterion, self._stopping, self._batches = criterion, None, None

    polled = []
    criterion = SimpleNamespace(
        peers=SimpleNamespace(poll=lambda: polled.append(1)),
        config=SimpleNamespace(codistill_validate_agreement=False),
        unless_failed=lambda ask: ask(),
    )
    task = Task(criterion)
    for _ in range(3):
        task.valid_step({}, None, criterion)
    assert len(polled) == 3


@pytest.mark.parametrize("masked", ["all", "none"])
def test_predictions_of_which_nothing_can_be_learned_are_told_of_once(masked, caplog):
    figures._warn_of_nothing_learned.cache_clear()
    classes = 5
    logits, peer = random(4, classes, seed=1), random(4, classes, seed=2)
    if masked == "all":
        logits[:, 0] = peer[:, 0] = -torch.inf
    script = Script(1, "127.0.0.1:1,127.0.0.1:2", lambda key, received: peer)
    with Codistiller(
        num_models=2, addresses="127.0.0.1:1,127.0.0.1:2", codec="fp32", divergence="kl",
        transport=ScriptedTransport(script),
    ) as peers:  # fmt: skip
        peers.meet(torch.nn.Linear(2, classes))
        for position in range(2):
            peers.loss(logits.clone().requires_grad_(), torch.ones(4, dtype=torch.int64), range(4), position=position)
            peers.figures()
    assert caplog.text.count("nothing was learned from the peers") == (masked == "all")


def test_what_a_task_keeps_of_the_model_it_builds_stays_that_of_ours_when_a_teacher_is_built():
    """With --eval-bleu a translation task makes a generator of the model that it built last."""

    class Stock:
        def build_model(self, cfg):
            self.sequence_generator = f"of {cfg}"
            return f"model {cfg}"

    class Task(CodistillationTaskMixin, Stock):
        def __init__(self):
            self._criterion = self._model = None

    task = Task()
    Stock.build_model(task, "ours")
    assert task._build_other("the teacher") == "model the teacher"
    assert task.sequence_generator == "of ours"


@pytest.mark.parametrize(
    ("settings", "filename", "is_new"),
    [
        ({"reset_dataloader": False, "finetune_from_model": None}, "a/checkpoint_last.pt", False),
        ({"reset_dataloader": True, "finetune_from_model": None}, "a/checkpoint_last.pt", True),
        ({"reset_dataloader": False, "finetune_from_model": "b.pt"}, "b.pt", True),
        ({"reset_dataloader": False, "finetune_from_model": "b.pt"}, "a/checkpoint_last.pt", False),
    ],
)
def test_a_run_that_begins_at_the_parameters_of_another_takes_over_neither_its_peers_nor_its_settings(
    settings, filename, is_new
):
    trainer = SimpleNamespace(cfg=SimpleNamespace(checkpoint=SimpleNamespace(**settings)))
    assert stock_checkpoint._begins_anew(trainer, filename, False, reset_meters=True) is is_new


@pytest.mark.parametrize("on_accelerator", [False, True])
def test_figures_are_of_the_same_kinds_whether_or_not_anybody_answered(on_accelerator, monkeypatch):
    """Ranks reduce tensors and numbers apart: one whose peer is late would enter another collective than the rest."""
    if on_accelerator:
        monkeypatch.setattr(sweep, "may_ask", lambda *_: False)
    kinds = []
    for answers in ([random(*TARGET.shape, NUM_CLASSES, seed=7)[TARGET.ne(PAD)]], []):
        config = CodistillationCriterionConfig(
            codistill_num_models=2, codistill_divergence="kl", sentence_avg=False, update_freq=[1]
        )
        criterion = CodistillationCriterion(TASK, config)
        criterion.peers.coordinator = GivenPeers(answers)
        sample = {"net_input": {}, "target": TARGET, "ntokens": int(TARGET.ne(PAD).sum())}
        sample[TAG] = {"key": (1, 0, 0), "elapsed": 0, "fingerprint": b""}
        _, _, found = criterion.train()(GivenLogits(random(*TARGET.shape, NUM_CLASSES, seed=3)), sample)
        kinds.append({name: isinstance(value, torch.Tensor) for name, value in found.items()})
    assert kinds[0] == kinds[1]
    assert kinds[0]["codistill_rows"]
    compared = figures.no_comparison(torch.zeros(2))
    assert compared["codistill_rows"].dtype is compared["codistill_compared"].dtype is torch.float32


@pytest.mark.parametrize("settings", [{"codistill_transfer": "shared"}, {"codistill_own_data": True}])
def test_data_of_ones_own_need_epochs_that_are_alike(settings):
    config = SimpleNamespace(**{"codistill_transfer": "", "codistill_own_data": False, **settings}, is_codistilled=True)
    vars(config).update(codistill_burn_in=0, codistill_interval=1)
    refuse_what_differs(config, True, object())
    with pytest.raises(ConfigError, match="give one data folder, no --virtual-epoch-size, no --grouped-shuffling"):
        refuse_what_differs(config, False, object())


def test_all_of_an_update_is_kept_where_amp_may_feed_it_again():
    settings = {"codistill_num_models": 2, "codistill_parts": "1", "update_freq": [4], "sentence_avg": False}
    for amp, kept in ((True, 4), (False, 1)):
        criterion = CodistillationCriterion(TASK, CodistillationCriterionConfig(amp=amp, **settings))
        assert criterion.peers._num_kept == kept
