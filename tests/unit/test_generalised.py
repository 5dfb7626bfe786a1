"""The generalised divergences: hand-computed values, limits, bounds, gradients, and what does not determine them."""

import math

import pytest
import torch
from coordinating import BATCH, identity, predictions_of, run_models
from coordinating import config as coordinator_config
from coordinating import open_coordinators as open_coordinators  # an autouse fixture
from helpers import free_ports

from fairseq_codistill import Codistiller
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.predictions import Tokens, TopK
from fairseq_codistill.losses.chunked import chunked_loss
from fairseq_codistill.losses.distillation import peer_divergence
from fairseq_codistill.losses.generalised import Divergence
from fairseq_codistill.losses.vote import majority
from fairseq_codistill.testing import simulate

FORMS = [
    Divergence("kl", temperature=2.0), Divergence("reverse_kl"), Divergence("reverse_kl", temperature=0.5),
    Divergence("js"), Divergence("js", beta=0.1), Divergence("js", temperature=3.0, beta=0.8),
]  # fmt: skip


def random(*shape, seed):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(mine, theirs, form):
    """Row by row, class by class."""
    total = 0.0
    for row, other in zip(mine.tolist(), theirs.tolist(), strict=True):
        q, p = ([math.exp(value / form.temperature) for value in values] for values in (row, other))
        q, p = ([value / sum(values) for value in values] for values in (q, p))
        beta = {"kl": 0.0, "reverse_kl": 1.0}.get(form.name, form.beta)
        if form.name == "kl":
            found = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        elif form.name == "reverse_kl":
            found = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        else:
            mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
            found = beta * sum(a * math.log(a / m) for a, m in zip(p, mixed, strict=True))
            found += (1 - beta) * sum(b * math.log(b / m) for b, m in zip(q, mixed, strict=True))
        total += form.temperature**2 * found
    return total


def top_of(predictions, number, heat):
    values, classes = (predictions / heat).topk(number, dim=1)
    return TopK(values, classes, torch.logsumexp(predictions / heat, dim=1))


@pytest.mark.parametrize("form", FORMS, ids=str)
class TestEveryForm:
    def test_it_equals_the_slow_loop(self, form):
        mine, theirs = random(4, 6, seed=1), random(4, 6, seed=2)
        assert peer_divergence(mine, theirs, form).item() == pytest.approx(slow(mine, theirs, form), rel=1e-9)

    def test_its_gradient_is_right(self, form):
        mine, theirs = random(3, 5, seed=1).requires_grad_(), random(3, 5, seed=2)
        assert torch.autograd.gradcheck(lambda logits: peer_divergence(logits, theirs, form), mine)
        kept = top_of(theirs, 2, form.temperature)
        assert torch.autograd.gradcheck(lambda logits: peer_divergence(logits, kept, form), mine, atol=1e-4)

    def test_the_largest_logits_give_a_lower_bound_that_all_of_them_reach(self, form):
        mine, theirs = random(4, 9, seed=1), random(4, 9, seed=2)
        dense = peer_divergence(mine, theirs, form).item()
        for number in (1, 3, 8):
            assert -1e-5 <= peer_divergence(mine, top_of(theirs, number, form.temperature), form).item() <= dense + 1e-5
        whole = peer_divergence(mine, top_of(theirs, 9, form.temperature), form).item()
        assert whole == pytest.approx(dense, rel=1e-5)

    def test_identical_predictions_do_not_diverge(self, form):
        mine = random(4, 9, seed=1)
        assert abs(peer_divergence(mine, mine, form).item()) < 1e-9

    @pytest.mark.parametrize("peer_weights", [None, (0.25, 1.0)])
    def test_the_pass_over_the_rows_has_the_same_value_and_gradient(self, form, peer_weights):
        logits = random(5, 7, seed=1).requires_grad_()
        peers = [random(5, 7, seed=2), top_of(random(5, 7, seed=3), 3, form.temperature)]
        target = torch.tensor([0, 1, 2, 3, 4])
        found = chunked_loss(logits, peers, form, 0.7, None, target, 0.1, peer_weights)
        each = torch.stack([peer_divergence(logits, peer, form) for peer in peers])
        mean = (each * torch.tensor(peer_weights or (1.0, 1.0), dtype=torch.float64)).mean()
        expected = chunked_loss(logits, [], "mse", 0.0, None, target, 0.1).total + 0.7 * mean
        assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
        slope, right = (torch.autograd.grad(value, logits)[0] for value in (found.total, expected))
        torch.testing.assert_close(slope, right, rtol=1e-5, atol=1e-6)

    def test_drawn_classes_determine_it_only_where_they_are_unbiased(self, form):
        mine, drawn = random(3, 5, seed=1), Tokens(torch.tensor([[0, 1], [2, 2], [3, 4]]))
        if form.name == "kl":
            assert peer_divergence(mine, drawn, form).item() > 0
            return
        with pytest.raises(ValueError, match="does not determine"):
            chunked_loss(mine, [drawn], form)


def test_js_is_between_the_two_directions():
    mine, theirs = random(4, 6, seed=1), random(4, 6, seed=2)
    near_kl = peer_divergence(mine, theirs, Divergence("js", beta=1e-5)) / 1e-5
    near_reverse = peer_divergence(mine, theirs, Divergence("js", beta=1 - 1e-5)) / 1e-5
    assert near_kl.item() == pytest.approx(peer_divergence(mine, theirs, "kl").item(), rel=1e-3)
    assert near_reverse.item() == pytest.approx(peer_divergence(mine, theirs, "reverse_kl").item(), rel=1e-3)


@pytest.mark.parametrize("codec", ["tokens:6", "counts:6"])
def test_draws_at_a_temperature_are_unbiased_for_the_divergence_at_it(codec):
    mine, theirs, form = (
        random(40, 6, seed=1).requires_grad_(),
        random(40, 6, seed=2),
        Divergence("kl", temperature=2.0),
    )
    (dense,) = torch.autograd.grad(peer_divergence(mine, theirs, form), mine)
    total, made = torch.zeros_like(dense), make_codec(codec)
    for seed in range(300):
        sent = made.decode(made.encode(theirs / 2.0, seed), 40, 6)
        total += torch.autograd.grad(peer_divergence(mine, sent, form), mine)[0] / 300
    torch.testing.assert_close(total, dense, atol=2 * 4 * 0.5 / (6 * 300) ** 0.5, rtol=0)


def test_ties_of_a_vote_go_to_the_model_of_the_lowest_index_on_all_sides():
    says = {0: [1, 4, 2, 6], 1: [1, 5, 3, -1], 2: [2, 5, 4, -1]}
    ballots = {model: torch.tensor(said) for model, said in says.items()}
    found = []
    for model in (0, 1, 2):
        labels = {other: Tokens(said.unsqueeze(1)) for other, said in ballots.items() if other != model}
        found.append(majority(ballots[model].clamp(min=0), model, labels).classes[:3, 0].tolist())
    assert found == [[1, 5, 2]] * 3


def config(**settings):
    named = {f"codistill_{name}": value for name, value in settings.items()}
    return CodistillationConfig(codistill_num_models=2, codistill_addresses="a:1,b:2", **named)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "js", "divergence_beta": 1.0}, "--codistill-divergence-beta is 1.0"),
        ({"temperature": 0.0, "divergence": "kl"}, "--codistill-temperature is 0.0"),
        ({"temperature": 2.0}, "--codistill-divergence mse"),
        ({"divergence": "reverse_kl", "codec": "tokens:4"}, "use --codistill-divergence kl, or the codec topk:K"),
        ({"divergence": "js", "codec": "counts:4"}, "use --codistill-divergence kl, or the codec topk:K"),
        ({"codec": "label"}, "drawn tokens do not tell the logits"),
        ({"codec": "vote", "divergence": "kl"}, "use 3 models or more"),
        ({"codec": "counts:70000", "divergence": "kl"}, "at most 256"),
        ({"budget_mbit": 1.0}, "only the codec counts:K"),
        ({"budget_mbit": -1.0}, "--codistill-budget-mbit is -1.0"),
        ({"peer_weights": "best"}, "uniform, validation"),
        ({"temperature": 2.0, "divergence": "kl", "teacher_cache": "x", "teacher": "y"}, "--codistill-teacher-cache"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings).validate()


def test_settings_that_can_work_are_taken():
    for settings in (
        {"divergence": "js", "codec": "topk:4"}, {"divergence": "kl", "codec": "counts:8", "budget_mbit": 0.2},
        {"divergence": "kl", "codec": "tokens:8", "temperature": 2.0, "peer_weights": "validation"},
    ):  # fmt: skip
        config(**settings).validate()


def simulated(num_models, **settings):
    generator = torch.Generator().manual_seed(5)
    data = torch.utils.data.TensorDataset(
        torch.randn(32, 6, generator=generator), torch.randint(4, (32,), generator=generator)
    )
    return simulate(
        num_models, lambda index: torch.nn.Linear(6, 4), data, batch_size=8, num_updates=6, divergence="kl",
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1), **settings,
    )  # fmt: skip


def test_models_that_vote_count_all_peers_and_learn_from_one_class():
    found = simulated(3, codec="vote")
    for updates in found.figures:
        assert all(update["codistill_peers"] == 2 for update in updates)
        assert all(0 < update["codistill_loss"] < 10 for update in updates)


def test_one_voter_beside_this_model_is_no_majority_but_what_is_learned():
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(3))
    peers = Codistiller(num_models=3, model_index=0, addresses=addresses, codec="vote", divergence="kl")
    peers.sums["codistill_weight"] = torch.ones(())
    logits, labels = random(5, 4, seed=1).requires_grad_(), torch.tensor([0, 1, 2, 3, 0])
    total, _ = peers._distil({1: Tokens(labels.unsqueeze(1))}, logits, None, None, 0.0)
    torch.testing.assert_close(total, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))


@pytest.mark.parametrize("form", [*FORMS, Divergence("kl")])
@pytest.mark.parametrize("num_kept", [3, 4, 5])
def test_of_classes_that_are_masked_nothing_is_left_over_where_all_others_travel(form, num_kept):
    mine, theirs = random(6, 8, seed=1), random(6, 8, seed=2)
    is_masked = torch.zeros(6, 8, dtype=torch.bool)
    is_masked[:, 4:] = True
    is_masked[5, 4] = False  # rows differ
    small, large = (logits.masked_fill(is_masked, -torch.inf).requires_grad_() for logits in (mine, theirs))
    heat = form.temperature
    values, classes = (large.detach() / heat).topk(num_kept, dim=1)
    sent = TopK(values, classes, torch.logsumexp(large.detach() / heat, 1))
    usable = slice(5, 6) if num_kept == 5 else slice(None)  # 5 of 4 classes: -inf travels, and such rows are left out
    part = TopK(sent.values[usable], sent.classes[usable], sent.log_norm[usable])
    found = chunked_loss(small[usable], (part,), form).total
    (gradient,) = torch.autograd.grad(found, small)
    assert bool(gradient.isfinite().all())
    if num_kept == 3:
        return  # a bound only
    rows = range(6)[usable] if num_kept == 5 else range(5)
    kept = [4 if row < 5 else 5 for row in rows]
    exact = sum(slow(mine[r : r + 1, :k], theirs[r : r + 1, :k], form) for r, k in zip(rows, kept, strict=True))
    mine_alone = [TopK(sent.values[r : r + 1], sent.classes[r : r + 1], sent.log_norm[r : r + 1]) for r in rows]
    alone = sum(chunked_loss(small[r : r + 1], (one,), form).total for r, one in zip(rows, mine_alone, strict=True))
    assert alone.item() == pytest.approx(float(exact), abs=1e-5)


def test_a_weak_peer_counts_less_and_a_strong_one_whole():
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))

    def job(model):
        coordinator = Coordinator(
            coordinator_config(model, addresses, codistill_peer_weights="validation", codistill_divergence="kl")
        )
        coordinator.meet(identity(model))
        assert coordinator.peer_weight(1 - model) == 1.0  # before either has said anything
        coordinator.tell_validation([1.0, 3.0][model])
        coordinator.post(BatchKey(1, 0), BATCH, predictions_of(model, 0))
        coordinator.collect()
        coordinator.close("finished")
        return coordinator.peer_weight(1 - model)

    assert run_models([lambda: job(0), lambda: job(1)]) == [pytest.approx(math.exp(-2)), 1.0]
