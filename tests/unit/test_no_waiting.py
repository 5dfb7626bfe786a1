"""On an accelerator nothing of a step is looked at: counted on the CPU, along the way that an accelerator takes."""

import pytest
import torch
from test_criterion import NUM_CLASSES, PAD, TARGET, TASK, GivenLogits, GivenPeers, random
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.criterion import CodistillationCriterion, CodistillationCriterionConfig
from fairseq_codistill.fairseq_side.batches import TAG
from fairseq_codistill.fairseq_side.parts import counted_rows, cut, num_tokens_each
from fairseq_codistill.losses import chunked, sweep
from fairseq_codistill.losses.chunked import chunked_loss
from fairseq_codistill.losses.generalised import Divergence
from fairseq_codistill.plain_loop import Rows

ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount"}
KINDS = [
    ("int8", Divergence("mse")), ("int8", Divergence("kl")),
    ("fp32", Divergence("mse")), ("fp32", Divergence("kl")), ("fp16", Divergence("reverse_kl")),
    ("fp32", Divergence("js", 2.0, 0.3)), ("columns:3", Divergence("mse")), ("tokens:4", Divergence("kl")),
    ("topk:3", Divergence("mse")), ("topk:3", Divergence("kl")),
]  # fmt: skip


class Questions(TorchDispatchMode):
    """Operations that an accelerator has to be waited for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        indices = args[1] if name in ("index", "index_put_", "index_put") else ()
        if name in ASKING or any(index is not None and index.dtype == torch.bool for index in indices):
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    for module in (sweep, chunked):
        monkeypatch.setattr(module, "may_ask", lambda values: False)


def test_the_counter_sees_what_asks():
    values = torch.arange(3.0)
    with Questions() as questions:
        values.sum().item()
        bool(values[0] > 1)
        values[values > 1] = 0
        values[values > 1]
        values.nonzero()
        values[:2].add_(1)
        torch.where(values > 1, values, 0.0)
    names = ["_local_scalar_dense", "_local_scalar_dense", "index_put_", "index", "nonzero"]
    assert [name for name in questions.asked if name != "is_nonzero"] == names


def loss_and_gradient(codec, form, rows, spoiled):
    made, logits = make_codec(codec), random(9, 7, seed=0).requires_grad_()
    theirs = random(9 if rows is None else len(rows), 7, seed=1)
    theirs[spoiled] = float("nan")
    peer = made.decode(made.encode(theirs, 0), *theirs.shape, seed=0)
    target = torch.arange(len(theirs)) % 7
    with Questions() as questions:
        found = chunked_loss(logits, [peer], form, 0.7, rows, target, 0.1)
        (2 * found.total).backward()
    counts = [float(count) for count in (found.num_agreeing, found.num_compared, found.num_nonfinite)]
    return questions.asked, found.total.detach(), logits.grad, counts


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 2, 3, 8])])
@pytest.mark.parametrize("spoiled", [[], [1, 3]])
@pytest.mark.parametrize(("codec", "form"), KINDS, ids=lambda kind: getattr(kind, "name", kind))
def test_the_loss_asks_nothing_and_is_the_same(monkeypatch, request, codec, form, spoiled, rows):
    monkeypatch.setattr(sweep, "CHUNK_ELEMENTS_CPU", 3 * 7)
    _, total, gradient, counts = loss_and_gradient(codec, form, rows, spoiled)
    request.getfixturevalue("as_on_an_accelerator")
    asked, other_total, other_gradient, other_counts = loss_and_gradient(codec, form, rows, spoiled)
    assert asked == []
    torch.testing.assert_close(other_total, total)
    torch.testing.assert_close(other_gradient, gradient)
    assert other_counts == counts
    assert counts[2] == len(spoiled)


@pytest.mark.parametrize("form", [form for _, form in KINDS if form.name != "mse"])
def test_a_class_that_all_models_mask_leaves_its_rows_out_and_no_nan_behind(monkeypatch, as_on_an_accelerator, form):
    mine, theirs = random(9, 7, seed=0), random(9, 7, seed=1)
    mine[2:5, 1] = theirs[2:5, 1] = -torch.inf
    mine.requires_grad_()
    found = chunked_loss(mine, [theirs], form)
    found.total.backward()
    kept = [0, 1, 5, 6, 7, 8]
    expected = chunked_loss(mine.detach()[kept].requires_grad_(), [theirs[kept]], form)
    torch.testing.assert_close(found.total, expected.total)
    assert bool(torch.isfinite(mine.grad).all())
    assert float(found.num_nonfinite) == 3


def marked(target):
    tag = {"key": BatchKey(1, 0, 0), "elapsed": 0, "fingerprint": bytes(16), "tokens": num_tokens_each(target, PAD)}
    return {
        "id": torch.arange(len(target)),
        "net_input": {},
        "target": target,
        "ntokens": int(target.ne(PAD).sum()),
        TAG: {**tag, **counted_rows(target, PAD)},
    }


@pytest.mark.parametrize("is_due", [False, True])
@pytest.mark.parametrize("target", [TARGET, TARGET.masked_fill(TARGET.eq(PAD), 4)])
def test_a_step_of_the_criterion_asks_nothing(monkeypatch, as_on_an_accelerator, target, is_due):
    monkeypatch.setattr(GivenPeers, "is_due", lambda peers, elapsed: is_due)
    config = CodistillationCriterionConfig(
        codistill_num_models=2, codistill_divergence="kl", label_smoothing=0.1, sentence_avg=False, update_freq=[1]
    )
    criterion, num_rows = CodistillationCriterion(TASK, config).train(), int(target.ne(PAD).sum())
    criterion.peers.coordinator = GivenPeers([random(num_rows, NUM_CLASSES, seed=1)])
    model, sample = GivenLogits(random(*target.shape, NUM_CLASSES, seed=0)), marked(target)
    sample["ntokens"] = num_rows
    with Questions() as questions:
        loss, _, figures = criterion(model, sample)
        loss.backward()
    assert questions.asked == []
    assert float(figures["codistill_rows"]) == num_rows * is_due


@pytest.mark.parametrize("target", [TARGET, TARGET.masked_fill(TARGET.eq(PAD), 4)])
def test_parts_know_their_rows(target):
    for part in cut(marked(target), 2, TAG):
        expected = counted_rows(part["target"], PAD)
        assert part[TAG]["shape"] == expected["shape"]
        flat = part["target"].reshape(-1)
        rows = [flat if found is None else flat[found] for found in (part[TAG]["rows"], expected["rows"])]
        assert torch.equal(*rows)


def test_a_batch_whose_size_is_not_that_of_its_targets_stays_whole():
    """Of masked language models all symbols are counted, and a few are targets: parts would weigh more."""
    sample = marked(TARGET)
    assert len(cut(sample, 2, TAG)) == 2
    sample["ntokens"] += 1
    assert cut(sample, 2, TAG) == [sample]


def test_rows_of_a_target_that_was_changed_since_are_looked_for_again():
    criterion = CodistillationCriterion(TASK, CodistillationCriterionConfig(sentence_avg=False, update_freq=[1]))
    sample = marked(TARGET)
    sample["target"] = torch.nn.functional.pad(TARGET, (0, 3), value=PAD)
    model = GivenLogits(random(*sample["target"].shape, NUM_CLASSES, seed=0))
    _, rows, target = criterion._rows(model, model(), sample)
    assert torch.equal(target, TARGET[TARGET.ne(PAD)])
    assert len(rows) == len(target)


@pytest.mark.parametrize("mask", [None, TARGET.ne(PAD)])
def test_a_loop_that_leaves_its_targets_on_the_cpu_asks_nothing_of_the_device(mask):
    target = TARGET.masked_fill(TARGET.eq(PAD), -100)
    logits = torch.empty(*TARGET.shape, NUM_CLASSES, device="meta")  # nothing can be read off it
    rows = Rows.of(logits, target, mask)
    assert (rows.index.device, rows.targets.device) == (logits.device, logits.device)
    assert torch.equal(rows.given, target[target != -100])
    assert rows.num_rows == rows.index.numel() == len(rows.given)
    here = Rows.of(torch.zeros(*TARGET.shape, NUM_CLASSES), target, mask)
    assert torch.equal(here.targets, rows.given)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_the_loss_waits_for_nothing_on_a_gpu(codec):
    logits = random(64, 1000, seed=0).cuda().requires_grad_()
    made, target = make_codec(codec), torch.arange(64).cuda()
    peer = made.decode(made.encode(random(32, 1000, seed=1), 0), 32, 1000, 0)  # as it has come
    rows = torch.arange(0, 64, 2).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunked_loss(logits, [peer], "kl", 0.7, rows, target[:32], 0.1).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
