"""Codistiller in one process: settings, shapes, clock, figures and misuse, opposite a scripted peer."""

import pytest
import torch
import torch.nn.functional as F
from helpers import free_ports
from torch.utils.data import DataLoader, TensorDataset

from fairseq_codistill import AlignmentError, CodistillationConfig, Codistiller, ConfigError, CoordinatedBatches
from fairseq_codistill.testing import Fault, Script, ScriptedTransport

ADDRESSES = "127.0.0.1:29600,127.0.0.1:29700"
NUM_CLASSES = 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def met(batches=None, faults=None, predict=lambda key, logits: logits + 1, update_freq=1, **settings):
    """A Codistiller that has met a peer whose logits are ours plus 1, so that its divergence is 1 a row."""
    settings = {"num_models": 2, "addresses": ADDRESSES, "codec": "fp32", **settings}
    transport = ScriptedTransport(Script(1, ADDRESSES, predict, faults, codec=settings["codec"]))
    peers = Codistiller(update_freq=update_freq, transport=transport, **settings)
    peers.meet(torch.nn.Linear(2, NUM_CLASSES), batches)
    return peers


def alone():
    peers = Codistiller(num_models=1)
    peers.meet(torch.nn.Linear(2, NUM_CLASSES))
    return peers


# --- settings ---


def test_arguments_win_over_the_environment_and_the_environment_over_defaults(monkeypatch):
    monkeypatch.setenv("CODISTILL_NUM_MODELS", "2")
    monkeypatch.setenv("CODISTILL_ADDRESSES", ADDRESSES)
    monkeypatch.setenv("CODISTILL_CODEC", "int8")
    monkeypatch.setenv("CODISTILL_WEIGHT", "0.5")
    monkeypatch.setenv("CODISTILL_REPLICA_WAIT", "1")
    config = Codistiller(codec="bf16", interval=3).config
    assert (config.codistill_num_models, config.codistill_codec, config.codistill_weight) == (2, "bf16", 0.5)
    assert (config.codistill_interval, config.codistill_replica_wait) == (3, True)
    assert config.codistill_divergence == CodistillationConfig().codistill_divergence


def test_a_timeout_that_the_other_ranks_would_not_outwait_is_refused_at_the_meeting(monkeypatch):
    monkeypatch.setattr("fairseq_codistill.exchanger.group_timeout_s", lambda world_size: 600.0)
    met(timeout=479.0)
    with pytest.raises(ConfigError, match="500.*below 480"):
        met(timeout=500.0)


def test_errors_speak_of_arguments_and_not_of_flags():
    with pytest.raises(ConfigError, match=r"^weight_growth is 0; it must be more than 0"):
        Codistiller(weight_growth=0)
    with pytest.raises(ConfigError, match="so codec must be set in it"):
        Codistiller(CodistillationConfig(), codec="fp16")
    elsewhere = Codistiller(num_models=2, addresses="192.0.2.1:1,192.0.2.2:1")
    with pytest.raises(ConfigError, match=r"Run codistill-keys --num-models 2 FOLDER.* pass keys FOLDER"):
        elsewhere.meet(torch.nn.Linear(2, 2))


def test_a_whole_number_does_for_a_fraction():
    assert Codistiller(weight=2).config.codistill_weight == 2


# --- alone ---


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_alone_the_loss_is_cross_entropy(label_smoothing):
    logits, targets = random(4, 3, NUM_CLASSES).requires_grad_(), torch.randint(NUM_CLASSES, (4, 3))
    targets[1, 2] = targets[3, 0] = -100
    loss = alone().loss(logits, targets, range(4), label_smoothing=label_smoothing)
    loss.backward()
    leaf = logits.detach().clone().requires_grad_()
    stock = F.cross_entropy(leaf.movedim(-1, 1), targets, label_smoothing=label_smoothing)
    stock.backward()
    torch.testing.assert_close(loss, stock)
    torch.testing.assert_close(logits.grad, leaf.grad)


def test_alone_one_line_says_so_and_nothing_is_exchanged(caplog):
    with caplog.at_level("INFO"):
        peers = alone()
    assert "trains alone" in caplog.text
    assert peers.term(random(2, NUM_CLASSES).requires_grad_(), range(2)) == 0
    assert peers.figures()["codistill_mbit"] == 0
    assert peers.skip() == 0


def test_a_batch_of_which_nothing_counts_has_loss_0_and_gradient_0():
    logits = random(2, NUM_CLASSES).requires_grad_()
    loss = alone().loss(logits, torch.full((2,), -100), range(2))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


# --- with a peer ---


def test_the_loss_is_cross_entropy_plus_alpha_times_the_divergence():
    logits, targets = random(4, NUM_CLASSES).requires_grad_(), torch.tensor([0, 1, 2, 3])
    loss = met(weight=3.0).loss(logits, targets, range(4))
    loss.backward()
    leaf = logits.detach().clone().requires_grad_()
    reference = F.cross_entropy(leaf, targets) + 3 * (leaf - (leaf.detach() + 1)).square().mean()
    reference.backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(logits.grad, leaf.grad)


def test_the_term_alone_is_alpha_times_the_divergence():
    logits = random(4, NUM_CLASSES).requires_grad_()
    term = met(weight=3.0).term(logits, torch.arange(4))
    term.backward()
    assert term.item() == pytest.approx(3.0)
    # d/dx 3 (x - (x + 1))^2 / C, mean over 4 rows
    torch.testing.assert_close(logits.grad, torch.full_like(logits, -6 / NUM_CLASSES / 4))


def test_of_a_sequence_only_what_the_mask_lets_through_travels_and_counts():
    seen = []

    def predict(key, logits):
        seen.append(logits)
        return logits + 1

    logits = random(2, 3, NUM_CLASSES).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    term = met(predict=predict).term(logits, [7, 9], mask)
    term.backward()
    torch.testing.assert_close(seen[0], logits.detach()[mask])
    assert term.item() == pytest.approx(1.0)
    assert not logits.grad[~mask].any()
    assert logits.grad[mask].all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_step_in_parts_takes_the_masks_that_a_loss_takes(dtype):
    model, inputs, ids = torch.nn.Linear(3, NUM_CLASSES), random(4, 6, 3), range(4)
    targets, mask = torch.randint(NUM_CLASSES, (4, 6)), random(4, 6, seed=1) > 0
    whole = met().loss(model(inputs), targets, ids, mask)
    in_parts = met(parts="2").forward_backward(model, inputs, targets, ids, mask.to(dtype))
    torch.testing.assert_close(in_parts, whole.detach())


def test_an_interval_leaves_the_term_out_in_between_and_the_figures_are_means_since_the_last_call():
    peers = met(interval=2, weight=2.0)
    logits = random(4, NUM_CLASSES).requires_grad_()
    values = [peers.term(logits, range(4)).item() for _ in range(4)]
    assert values == pytest.approx([2, 0, 2, 0])
    figures = peers.figures()
    assert figures["codistill_loss"] == pytest.approx(1.0)  # over all rows, the two at which nothing was due as well
    assert figures["codistill_mse"] == pytest.approx(1.0)
    assert (figures["codistill_peers"], figures["codistill_weight"]) == (1, 2)
    assert figures["codistill_mbit"] == pytest.approx(0.5 * (4 * NUM_CLASSES * 4 + 84) * 8e-6)
    assert peers.figures()["codistill_loss"] == 0


def test_calls_of_one_update_share_its_position_and_epochs_begin_anew():
    keys = []

    def predict(key, logits):
        keys.append(tuple(key))
        return logits + 1

    peers = met(3, predict=predict, update_freq=2, parts="1")
    for _ in range(5):
        peers.term(random(2, NUM_CLASSES).requires_grad_(), range(2))
    # three batches an epoch: an update of two, and one of what is left
    assert keys == [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (2, 0, 1)]


def test_a_batch_fed_again_has_the_predictions_of_the_first_time_and_sends_nothing():
    script_calls = []

    def predict(key, logits):
        script_calls.append(key)
        return logits + 1

    peers = met(predict=predict)
    logits = random(2, NUM_CLASSES).requires_grad_()
    first = peers.term(logits, range(2))
    assert torch.equal(peers.term(logits, range(2), again=True), first)
    assert len(script_calls) == 1
    peers.term(logits, range(2), position=5)
    with pytest.raises(RuntimeError, match="position 5 was asked for before"):
        peers.term(logits, range(2), position=5)


def test_a_loss_scale_scales_the_whole_gradient():
    logits, targets = random(4, NUM_CLASSES).half().requires_grad_(), torch.tensor([0, 1, 2, 3])
    (met().loss(logits, targets, range(4)) * 1024).backward()
    leaf = logits.detach().float().requires_grad_()
    met().loss(leaf, targets, range(4)).backward()
    torch.testing.assert_close(logits.grad.float() / 1024, leaf.grad, rtol=2e-3, atol=1e-5)


def test_other_batches_are_an_error_that_says_how_to_share_them():
    faults = {(1, position, 0): Fault.MISALIGNED for position in range(3)}
    peers = met(DataLoader(TensorDataset(torch.zeros(20)), batch_size=2), faults)
    logits = random(2, NUM_CLASSES).requires_grad_()
    assert [peers.term(logits, range(2)).item() for _ in range(2)] == [0, 0]  # never distilled from
    with pytest.raises(AlignmentError, match="use fairseq_codistill.CoordinatedBatches"):
        peers.term(logits, range(2))


# --- misuse ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(4)}, ValueError, "the classes come last"),
        ({"logits": torch.zeros(4, NUM_CLASSES, dtype=torch.int64)}, ValueError, "they must be floats"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets are \(3,\) and logits \(4, 5\)"),
        ({"targets": torch.zeros(4)}, ValueError, "must be int64 classes"),
        ({"mask": torch.ones(4, NUM_CLASSES, dtype=torch.bool)}, ValueError, r"mask must be \(4,\)"),
        ({"ids": torch.zeros(4)}, ValueError, "ids are torch.float32; they must be whole numbers"),
        ({"ids": ["a", "b", "c", "d"]}, ValueError, "ids cannot be read as whole numbers"),
        ({"ids": range(3)}, ValueError, "one for each of the 4 samples"),
        ({"label_smoothing": 10}, ValueError, "label_smoothing is 10; it must be from 0 to 1"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1"),
    ],
)
def test_what_does_not_belong_together_is_told_by_name(arguments, error, message):
    given = {"logits": torch.zeros(4, NUM_CLASSES), "targets": torch.zeros(4, dtype=torch.int64), "ids": range(4)}
    with pytest.raises(error, match=message):
        alone().loss(**(given | arguments))


def test_the_order_of_calls_is_told_by_name():
    peers = Codistiller(num_models=1)
    logits = torch.zeros(2, NUM_CLASSES)
    with pytest.raises(RuntimeError, match=r"call meet\(model, batches\) before"):
        peers.term(logits, range(2))
    model = torch.nn.Linear(2, NUM_CLASSES)
    batch = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), range(2)
    for call in (peers.forward_backward, peers.look_ahead):  # which would train alone without a word
        with pytest.raises(RuntimeError, match=r"call meet\(model, batches\) before"):
            call(model, *batch)
    peers.meet(model)
    with pytest.raises(RuntimeError, match="meets its peers once"):
        peers.meet(model)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) comes before meet"):
        peers.load_state_dict(peers.state_dict())
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are off"):
        peers.term(logits, range(2))


@pytest.mark.parametrize("burn_in", [0, 1000])
def test_copies_of_the_peers_need_a_way_to_predict_and_the_first_batch_says_so(burn_in):
    peers = met(exchange="checkpoints", burn_in=burn_in)
    with pytest.raises(ConfigError, match="forward=lambda copy: copy"):
        peers.term(torch.zeros(2, NUM_CLASSES, requires_grad=True), range(2))


# --- the batches ---


def test_coordinated_batches_go_on_where_the_codistiller_is_whatever_a_loader_fetched_in_advance():
    batches = CoordinatedBatches(10, 2, data_seed=3)
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_sampler=batches, num_workers=1, prefetch_factor=4)
    peers = alone_with(loader)
    seen = []
    for (samples,) in loader:
        peers.term(torch.zeros(2, NUM_CLASSES, requires_grad=True), samples)
        seen.append(samples.tolist())
        if len(seen) == 2:
            break
    assert batches.elapsed == 2
    seen += [samples.tolist() for (samples,) in loader]
    assert seen == list(CoordinatedBatches(10, 2, data_seed=3))


def test_too_few_samples_for_a_batch_are_told_of_in_the_words_of_a_loop():
    with pytest.raises(ConfigError, match=r"batch_size is 4 on each of 3 ranks, but num_samples is 11") as error:
        CoordinatedBatches(11, 4, world_size=3)
    assert "--" not in str(error.value)
    assert len(CoordinatedBatches(12, 4, world_size=3)) == 1


def alone_with(batches):
    peers = Codistiller(num_models=1)
    peers.meet(torch.nn.Linear(2, NUM_CLASSES), batches)
    return peers


def test_state_goes_on_from_the_same_batch():
    batches = CoordinatedBatches(10, 2)
    peers = alone_with(batches)
    for _ in range(7):
        peers.term(torch.zeros(2, NUM_CLASSES, requires_grad=True), range(2))
    resumed, later = Codistiller(num_models=1), CoordinatedBatches(10, 2)
    resumed.load_state_dict(peers.state_dict())
    resumed.meet(torch.nn.Linear(2, NUM_CLASSES), later)
    assert (later.elapsed, later.epoch) == (7, 2)
    assert list(later) == list(batches)


def test_a_peer_far_ahead_is_followed_and_the_batches_with_it():
    batches = CoordinatedBatches(100, 2)
    peers = met(batches)
    peers.coordinator.num_behind = lambda elapsed, within_reach=True: max(0, 60 - elapsed) if elapsed < 55 else 0
    peers.term(torch.zeros(2, NUM_CLASSES, requires_grad=True), range(2))
    assert peers.skip() == 59
    assert (batches.elapsed, batches.epoch) == (60, 2)
    assert peers.skip() == 0


def test_too_few_samples_are_an_error():
    with pytest.raises(ConfigError, match="num_samples is 0"):
        CoordinatedBatches(0, 2)
    with pytest.raises(ConfigError, match="num_samples is 3"):
        CoordinatedBatches(3, 4)


def test_a_run_that_goes_on_with_other_settings_is_told_old_and_new(caplog):
    state = Codistiller(num_models=2, addresses=ADDRESSES, codec="int8", interval=5).state_dict()
    Codistiller(num_models=2, addresses=ADDRESSES, codec="int8", interval=5).load_state_dict(state)
    assert "going on otherwise" not in caplog.text
    Codistiller(num_models=2, addresses=ADDRESSES, interval=5).load_state_dict(state)
    assert "--codistill-codec was 'int8' and is 'fp16'" in caplog.text
    assert "interval" not in caplog.text
    copies = Codistiller(num_models=2, addresses=ADDRESSES, exchange="checkpoints").state_dict()
    three = Codistiller(num_models=3, addresses=ADDRESSES + ",127.0.0.1:1", exchange="checkpoints")
    with pytest.raises(ConfigError, match="num_models was 2 and is 3"):
        three.load_state_dict(copies)


def test_a_step_in_parts_takes_no_transfer_set_and_says_so():
    data = TensorDataset(torch.zeros(20, 2), torch.arange(20))
    shared = DataLoader(data, batch_sampler=CoordinatedBatches(20, 2))
    transport = ScriptedTransport(Script(1, ADDRESSES, lambda key, logits: logits + 1, codec="fp32"))
    peers = Codistiller(num_models=2, addresses=ADDRESSES, codec="fp32", transport=transport)
    model = torch.nn.Linear(2, NUM_CLASSES)
    peers.meet(model, transfer=shared)
    with pytest.raises(RuntimeError, match=r"a transfer set was given to meet\(\): call loss"):
        peers.forward_backward(model, torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), range(2))


@pytest.mark.parametrize("is_split", [False, True])
def test_an_ignored_target_does_not_count_whatever_the_mask_says(is_split):
    targets = torch.tensor([[1, -100, 2], [0, 3, -100]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    logits = random(2, 3, NUM_CLASSES).requires_grad_()
    expected = F.cross_entropy(logits[[0, 1, 1], [0, 0, 1]], torch.tensor([1, 0, 3]))
    peers = met(weight=0.0)
    if is_split:
        model = torch.nn.Linear(NUM_CLASSES, NUM_CLASSES)
        with torch.no_grad():
            model.weight.copy_(torch.eye(NUM_CLASSES))
            model.bias.zero_()
        found = peers.forward_backward(model, logits.detach(), targets, [0, 1], mask)
    else:
        found = peers.loss(logits, targets, [0, 1], mask)
    torch.testing.assert_close(found, expected.detach() if is_split else expected)


def test_a_term_of_nobody_is_0_and_has_a_gradient():
    logits = torch.full((2, NUM_CLASSES), float("nan"), requires_grad=True)
    term = alone().term(logits, [0, 1])
    term.backward()
    assert (float(term), float(logits.grad.abs().max())) == (0, 0)


def test_the_option_transport_can_be_given_as_any_other():
    peers = Codistiller(num_models=2, model_index=0, addresses=addresses_for_two(), transport="gloo")
    assert peers.config.codistill_transport == "gloo"
    peers.close()
    with pytest.raises(ConfigError, match="transport is 'nope'"):
        Codistiller(num_models=2, model_index=0, addresses=ADDRESSES, transport="nope")


def addresses_for_two():
    return ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
