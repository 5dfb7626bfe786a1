"""Owns the figures of runs as OpenMetrics text, for Prometheus and what reads the same. It must never read a log.

Source: the OpenMetrics specification 1.0.0.
"""

from collections.abc import Iterable, Iterator

from fairseq_codistill.report.standing import PEER_STATES, ModelStanding, Standing

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
STATES = ("live", "finished", "failed", "stopped", "silent")
GAUGES = (  # name, help, attribute, what a unit of it is in a base unit
    ("codistill_epoch", "Epoch at hand.", "epoch", 1.0),
    ("codistill_updates_per_second", "Updates a second.", "updates_per_s", 1.0),
    ("codistill_train_loss", "Supervised training loss, in the unit of the log.", "train_loss", 1.0),
    ("codistill_valid", "Last validation, by the metric of the model.", "valid", 1.0),
    ("codistill_valid_best", "Best validation so far.", "best", 1.0),
    ("codistill_agreement", "Share of predictions equal to those of the peers.", "agreement", 1.0),
    ("codistill_divergence", "Divergence from the peers.", "divergence", 1.0),
    ("codistill_weight", "Weight alpha of the divergence.", "weight", 1.0),
    ("codistill_wait_seconds", "Wait for the peers, an update.", "wait_ms", 1e-3),
    ("codistill_sent_bits_per_update", "Sent by a device in an update, lately.", "sent_megabits_per_update", 1e6),
    ("codistill_peers", "Peers that taught, mean over exchanges.", "num_peers", 1.0),
)

Label = tuple[str, str]
Sample = tuple[str, list[Label], float]  # suffix of the name, labels, value


def exposition(standings: list[Standing], read_at: float) -> str:
    """The text that a scraper gets.

    Args:
        standings: of all runs.
        read_at: seconds since 1970 when their logs were read.
    """
    models = [
        ([("run", stands.run.name), ("model", str(model.log.index))], model)
        for stands in standings
        for model in stands.models
    ]
    lines = _family("codistill_read_timestamp_seconds", "gauge", "When the logs were read.", [("", [], read_at)])
    updates: list[Sample] = [("", labels, model.log.num_updates) for labels, model in models]
    lines += _family("codistill_updates", "gauge", "Updates done.", updates)
    for name, explained, attribute, unit in GAUGES:
        samples: list[Sample] = [
            ("", labels + _metric(name, model), value * unit)
            for labels, model in models
            if (value := getattr(model, attribute)) is not None
        ]
        lines += _family(name, "gauge", explained, samples)
    sent: list[Sample] = [("_total", labels, model.sent_megabits * 1e6) for labels, model in models]
    lines += _family("codistill_sent_bits", "counter", "Sent by a device since training began.", sent)
    warned: list[Sample] = [
        ("_total", labels, sum(level != "INFO" for _, level, _ in model.log.incidents)) for labels, model in models
    ]
    lines += _family("codistill_warnings", "counter", "Lines of the log that warn or tell of an error.", warned)
    states: list[Sample] = [
        ("", [*labels, ("codistill_state", word)], model.state.word == word)
        for labels, model in models
        for word in STATES
    ]
    lines += _family("codistill_state", "stateset", "What the training of a model is doing.", states)
    peers: list[Sample] = [
        ("", [*labels, ("peer", str(view.model)), ("codistill_peer_state", word)], view.state == word)
        for labels, model in models
        for view in model.peers
        for word in PEER_STATES
    ]
    lines += _family("codistill_peer_state", "stateset", "What a model says of another.", peers)
    return "\n".join([*lines, "# EOF"]) + "\n"


def _metric(name: str, model: ModelStanding) -> list[Label]:
    return [("metric", model.log.metric.key)] if name.startswith("codistill_valid") else []


def _family(name: str, kind: str, explained: str, samples: Iterable[Sample]) -> list[str]:
    """A metric with its samples; without samples there is none of it."""
    lines = list(_samples(name, samples))
    return [f"# TYPE {name} {kind}", f"# HELP {name} {explained}", *lines] if lines else []


def _samples(name: str, samples: Iterable[Sample]) -> Iterator[str]:
    for suffix, labels, value in samples:
        inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
        shown = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(str(float(value)), f"{float(value):.12g}")
        yield f"{name}{suffix}{{{inner}}} {shown}" if inner else f"{name}{suffix} {shown}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
