"""In which order one model alone goes through the data: as the models that it is compared with do."""

import itertools

from test_fairseq_traps import Job

ALONE = ("--codistill-num-models", "1", "--codistill-addresses", "")


def order(job):
    """Ids of the sentences of the first updates."""
    return [sample["id"].tolist() for samples in itertools.islice(job.updates, 4) for sample in samples]


def test_the_data_seed_orders_the_batches_of_one_model_too_whatever_its_own_seed(toy_data, tmp_path):
    pair = order(Job(toy_data, tmp_path, "--codistill-data-seed", "5"))
    assert order(Job(toy_data, tmp_path, *ALONE, "--codistill-data-seed", "5")) == pair
    assert order(Job(toy_data, tmp_path, *ALONE, "--codistill-data-seed", "5", "--seed", "102")) == pair
    assert order(Job(toy_data, tmp_path, *ALONE, "--codistill-data-seed", "6")) != pair
