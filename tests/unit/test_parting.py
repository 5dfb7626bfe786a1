"""In how many parts a batch is cut: all models at the same position, whoever waits, joins late or hears nothing."""

import itertools

import pytest
from torch.distributed import HashStore, TCPStore

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.parting import NOTICE, SLOTS, WINDOW, Parting, Schedule
from fairseq_codistill.coordinator.parts_choice import RECHECK_WINDOWS, PartsChoice
from fairseq_codistill.ranks import Notes


def config_of(index=0, num_models=2, **settings):
    addresses = ",".join(f"127.0.0.1:{29600 + model}" for model in range(num_models))
    names = {f"codistill_{name}": value for name, value in settings.items()}
    return CodistillationConfig(
        codistill_num_models=num_models, codistill_model_index=index, codistill_addresses=addresses, **names
    )


class Model:
    """One rank as the coordinator drives it, in a time that the test makes pass."""

    def __init__(self, index, num_models, interval=1, notes=None):
        self.now = 0.0
        self.parting = Parting(config_of(index, num_models, interval=interval), notes=notes, clock=lambda: self.now)
        self.parting.splits = True
        self.index = index
        self.seen = {}  # position -> parts

    def hear(self, other):
        return self.parting.hear(other.index, other.parting.status().get("parts"))


def train(models, positions, step_s, wait_s, away=(), deaf=()):
    """Lock-step: every model arrives and tells, hears whoever told, then waits. Hellos come before predictions.

    Args:
        step_s, wait_s: functions of the parts in force.
        away: models that do not take part.
        deaf: models that hear nothing.
    """
    present = [model for model in models if model.index not in away]
    for elapsed in positions:
        told = []
        for model in present:
            model.seen[elapsed] = model.parting.at(elapsed)
            others = [other.index for other in present if other is not model]
            if model.parting.arrive(elapsed, others):
                told.append(model)
        while told:
            teller = told.pop(0)
            for model in present:
                if model is not teller and model.index not in deaf and model.hear(teller):
                    told.append(model)
        for model in present:
            parts = model.seen[elapsed]
            model.parting.waited(wait_s(parts))
            model.now += step_s(parts)


def slow_link(parts):
    return {1: 1.3, 2: 1.0, 4: 1.05}[parts]


def waits(parts):
    return {1: 0.3, 2: 0.05, 4: 0.0}[parts]


@pytest.mark.parametrize(("num_models", "interval"), [(2, 1), (3, 1), (2, 10)])
def test_all_models_split_at_the_same_position_where_waiting_costs_more_than_three_percent(num_models, interval):
    models = [Model(index, num_models, interval) for index in range(num_models)]
    train(models, range(0, 6 * WINDOW * interval, interval), slow_link, waits)
    assert all(model.seen == models[0].seen for model in models)
    changes = [at for at, after in itertools.pairwise(models[0].seen.values()) if at != after]
    positions = list(models[0].seen)
    first = next(position for position in positions if models[0].seen[position] == 2)
    assert first == (WINDOW + 1 + NOTICE) * interval  # announced at the second exchange of a window
    # Four parts are slower than two, though nobody waits: tried for one window, and left again.
    assert changes == [1, 2, 4]
    assert models[0].seen[positions[-1]] == 2


def test_a_link_that_is_fast_enough_leaves_batches_whole():
    models = [Model(index, 2) for index in range(2)]
    train(models, range(4 * WINDOW), lambda parts: 1.0, lambda parts: 0.02)
    assert set(models[0].seen.values()) == {1}


def test_who_waits_for_a_slower_model_alone_splits_nothing():
    models = [Model(index, 2) for index in range(2)]
    for elapsed in range(4 * WINDOW):
        train(models, [elapsed], lambda parts: 1.0, lambda parts: 0.0)
        models[0].parting.waited(0.4)  # model 1 never waits: it is the slower one
    assert set(models[0].seen.values()) == set(models[1].seen.values()) == {1}


def test_a_model_whose_loop_cannot_cut_keeps_all_whole():
    models = [Model(index, 2) for index in range(2)]
    models[1].parting.splits = False
    train(models, range(4 * WINDOW), slow_link, waits)
    assert set(models[0].seen.values()) == set(models[1].seen.values()) == {1}


def test_parts_are_given_up_when_the_link_becomes_fast():
    models = [Model(index, 2) for index in range(2)]
    train(models, range(3 * WINDOW), slow_link, waits)
    train(models, range(3 * WINDOW, (6 + RECHECK_WINDOWS) * WINDOW), lambda parts: 1.0, lambda parts: 0.0)
    assert models[0].seen[3 * WINDOW] > 1
    assert models[0].seen == models[1].seen
    assert list(models[0].seen.values())[-1] == 1


def test_a_model_that_comes_back_learns_what_is_in_force_when_it_is_met():
    models = [Model(index, 3) for index in range(3)]
    train(models, range(3 * WINDOW), slow_link, waits, away=[2])
    assert models[2].hear(models[1])  # model 0 need not be the one that says it; and the news are passed on
    assert models[2].parting.at(3 * WINDOW) == models[0].parting.at(3 * WINDOW) > 1


def test_model_0_started_anew_takes_up_what_the_others_do():
    models = [Model(index, 2) for index in range(2)]
    train(models, range(2 * WINDOW), slow_link, waits)
    models[0] = Model(0, 2)
    models[0].hear(models[1])
    models[1].hear(models[0])
    train(models, range(2 * WINDOW, 4 * WINDOW), slow_link, waits)
    assert all(models[1].seen[position] == parts for position, parts in models[0].seen.items())


def test_without_model_0_nothing_changes():
    models = [Model(index, 3) for index in range(3)]
    train(models, range(2 * WINDOW), slow_link, waits)
    before = models[1].seen[2 * WINDOW - 1]
    train(models, range(2 * WINDOW, 6 * WINDOW), slow_link, waits, away=[0])
    assert {models[index].seen[at] for index in (1, 2) for at in range(2 * WINDOW, 6 * WINDOW)} == {before} == {2}


def test_a_lost_announcement_is_made_good_at_the_end_of_the_window():
    models = [Model(index, 2) for index in range(2)]
    train(models, range(2 * WINDOW), slow_link, waits, deaf=[1])
    assert models[0].seen[2 * WINDOW - 1] == 2
    assert models[1].seen[2 * WINDOW - 1] == 1
    train(models, range(2 * WINDOW, 2 * WINDOW + 3), slow_link, waits)
    assert models[1].seen[2 * WINDOW + 2] == models[0].seen[2 * WINDOW + 2]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_other_ranks_of_a_model_cut_where_the_first_does_whatever_they_measure(order):
    stores = [HashStore() for _ in range(2)]
    ranks = [[Model(index, 2, notes=Notes(stores[index], rank, "parts")) for index in range(2)] for rank in range(3)]
    for elapsed in range(6 * WINDOW):
        for rank in order:  # a collective ends every position, so none is ahead by more than that
            train(ranks[rank], [elapsed], *((slow_link, waits) if rank == 0 else (lambda _: 1.0, lambda _: 0.0)))
    first = ranks[0][0].seen
    assert set(first.values()) == {1, 2, 4}
    assert all(model.seen == first for models in ranks for model in models)


def test_notes_are_found_once_and_in_their_order_and_not_those_of_another_name():
    store = HashStore()
    first, second = Notes(store, 0, "a"), Notes(store, 1, "a")
    assert (first.leads, second.leads) == (True, False)
    assert second.find() == []
    first.leave("one")
    first.leave("two")
    assert second.find() == ["one", "two"]
    assert second.find() == []
    assert Notes(store, 1, "b").find() == []


def test_where_the_store_has_gone_there_is_nothing_new():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    del store
    with pytest.raises(RuntimeError):
        client.check(["anything"])
    assert Notes(client, 1, "a").find() == []


def test_the_answer_holds_for_all_of_an_update_whatever_is_heard_meanwhile():
    parting = Parting(config_of(index=1))
    parting.splits = True
    assert parting.at(7) == 1
    parting.hear(0, {"splits": True, "schedule": [1, 5, 2, 1]})
    assert parting.at(7) == 1  # its second micro-batch, or the same batch fed again
    assert parting.at(8) == 2


@pytest.mark.parametrize(
    "content",
    [None, 3, [], {}, {"schedule": [1, 5, 3, 1]}, {"schedule": [1, 5, 2]}, {"schedule": [True, 5, 2, 1]},
     {"schedule": [2**60, 0, 2, 1]}, {"schedule": [1, -5, 2, 1]}, {"schedule": "1521"}, {"schedule": [1, 5.0, 2, 1]}],
)  # fmt: skip
def test_what_is_no_schedule_is_ignored(content):
    parting = Parting(config_of(index=1))
    parting.splits = True
    assert not parting.hear(0, content)
    assert parting.at(10) == 1


def test_wholes_and_parts_of_any_number_never_share_a_name():
    parting = Parting(config_of())
    names = [
        parting.slot(micro_batch, part, num_parts)
        for micro_batch in range(3)
        for num_parts in (1, 2, 4)
        for part in range(num_parts)
    ]
    assert names == list(range(3 * SLOTS))  # in the order of the batches, so that whoever is past one is told from it


def test_a_fixed_number_names_parts_as_it_did():
    parting = Parting(config_of(parts="2"))
    assert [parting.slot(1, part, 2) for part in range(2)] == [2, 3]
    assert parting.slot(1, 0, 1) == 2  # a batch too small to split
    assert parting.at(5) == 2
    assert parting.status() == {}


@pytest.mark.parametrize(
    "settings",
    [{"exchange": "checkpoints"}, {"peers_per_position": 1}, {"budget_mbit": 1.0, "codec": "counts:8"}],
)
def test_where_models_do_not_all_exchange_alike_batches_stay_whole(settings):
    config = config_of(num_models=3, **settings)
    assert config.why_whole
    assert config.most_parts == 1
    assert Parting(config).status() == {}


def test_a_trial_that_brings_nothing_is_repeated_ever_more_rarely():
    choice, parts, trials = PartsChoice(), 1, []
    for window in range(40):
        wanted = choice.next(parts, wait_share=0.2, step_s=1.0)
        if wanted > parts:
            trials.append(window)
        parts = wanted
    gaps = [after - before for before, after in itertools.pairwise(trials)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 2 * gaps[0]


def test_a_split_that_seemed_to_bring_nothing_on_a_machine_that_became_slower_is_taken_up_again():
    choice = PartsChoice()
    assert choice.next(1, wait_share=0.2, step_s=1.0) == 2
    assert choice.next(2, wait_share=0.0, step_s=1.05) == 1  # slower than before, as everything was by then
    assert choice.next(1, wait_share=0.2, step_s=1.4) == 2
    assert choice.next(2, wait_share=0.0, step_s=1.1) == 2


def test_schedules_travel_as_they_are():
    parting = Parting(config_of())
    schedule = Schedule(3, 50, 2, 1)
    assert Schedule.parse([3, 50, 2, 1]) == schedule
    parting.hear(1, {"schedule": [3, 50, 2, 1]})
    assert Schedule.parse(parting.status()["parts"]["schedule"]) == schedule
