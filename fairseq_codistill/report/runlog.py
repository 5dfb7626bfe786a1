"""Owns the meaning of one line that ``fairseq-train`` or ``codistill-launch`` wrote: figures, time, settings, an end.

Figures are read from ``--log-format json`` and from ``simple``, which is also what ``tqdm`` writes where there is no
terminal. It must never guess: what is not understood is None, and it opens no file.
"""

import ast
import datetime
import json
import re
import signal

from fairseq_codistill.report.model import Ending, Record

LABEL = re.compile(r"^\[model (\d+)(?: rank (\d+))?\] ?")  # codistill-launch, in front of every line
PARAMETERS = re.compile(r"num\. shared model params: [\d,]+ \(num\. trained: ([\d,]+)\)")

_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:,\d+)? \| ")
_JSON = re.compile(r"\| (train_inner|train|valid) \| (\{.*\})\s*$")
_SIMPLE = re.compile(r"\| (train_inner|train|valid) \| epoch (\d+)(:| \|) (.*)$")
_SETTINGS = re.compile(r"\| fairseq_cli\.(?:hydra_)?train \| (\{'_name': None.*\})\s*$")
# "2026-01-31 12:00:00 | WARNING | name | codistillation: model 1 is away (was present): ..."
_INCIDENT = re.compile(r"(\d{4}-\S+ [\d:]+)(?:,\d+)? \| (\w+) \| [\w.]+ \| codistillation: (.*)")
_STATE_CHANGE = re.compile(r"model \d+ is \w+ \(was \w+\)")
_LAUNCH_FAILURE = re.compile(
    r"^\[launch\] model (\d+)(?: failed)?: (?=(?:rank \d+ )?(?:exit code|killed by|cannot be))(.*)"
)
_LAUNCH_END = re.compile(r"^\[launch\] model (\d+)(?: rank \d+)? ended: ((?:exit code [1-9]|killed by|cannot be).*)")
# The command, after which it runs; the launcher speaks of exit codes and of its logs in the same form.
_LAUNCH_START = re.compile(r"^\[launch\] model (\d+)(?: rank \d+)?: (?!exit code|killed by|cannot be|\[Errno)")
_LAUNCH_STOP = re.compile(
    r"^\[launch\] model (\d+)(?: rank \d+)?(?: failed| ended)?: (?:rank \d+ )?exit code (\d+)(?:;.*)?$"
)
_STOP = re.compile(r"\| codistillation: stopped by (?:(SIG\w+)|a signal to another rank) after update")
# 128 + the signal: who ends so was asked to, and has saved.
STOPPED = {128 + number: number.name for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}


def parse_line(line: str) -> tuple[str, Record] | None:
    """The figures of a line.

    Returns:
        kind (``train_inner``: every ``--log-interval`` updates; ``train`` and ``valid``: every epoch) and its figures
        by name without the prefix of the kind, or None for any other line.
    """
    if match := _JSON.search(line):
        try:
            raw = json.loads(match.group(2))
        except json.JSONDecodeError:
            return None
        pairs = [(key.removeprefix(match.group(1) + "_"), value) for key, value in raw.items()]
    elif match := _SIMPLE.search(line):
        text = match.group(4)
        if match.group(3) == ":":  # "     5 / 31 loss=9.853, nll_loss=8.025"
            pairs = re.findall(r"(\w+)=([^\s,]+)", text)
        else:  # "valid on 'valid' subset | loss 7.6 | nll_loss 7.528"
            pairs = re.findall(r"(?:^|\| )(\w+) ([^\s|]+)(?= \||\s*$)", text)
        pairs.insert(0, ("epoch", match.group(2)))
    else:
        return None
    record: Record = {}
    for key, value in pairs:
        try:
            record[key] = float(value)
        except (TypeError, ValueError):
            continue  # not a figure, for example a best checkpoint that does not exist yet
    return match.group(1), record


def parse_time(line: str) -> float | None:
    """Seconds since 1970 of a stamped line; stamps are taken for this machine's local time."""
    match = _STAMP.search(line)
    try:
        return None if match is None else datetime.datetime.fromisoformat(match.group(1)).timestamp()
    except (ValueError, OverflowError, OSError):  # only looks like one
        return None


def parse_incident(line: str) -> tuple[str, str, str] | None:
    """(time, level, what) of a peer that came or went, or of something that we warned of."""
    match = _INCIDENT.search(line)
    if match is None:
        return None
    when, level, what = match.groups()
    return (when, level, what) if level != "INFO" or _STATE_CHANGE.search(what) or "skipped" in what else None


def parse_launch_failure(line: str) -> tuple[int, Ending | None, str] | None:
    """What the launcher says of a model that failed.

    Returns:
        the model, its ending (None if it was started again), and the launcher's words: none where it only notes that a
        process ended, and says what that means in another line, if anything. One that was stopped by a signal, and
        saved, did not fail.
    """
    stop = _LAUNCH_STOP.match(line)
    if stop is not None and int(stop.group(2)) in STOPPED and "it is started again" not in line:
        return int(stop.group(1)), Ending("stopped", STOPPED[int(stop.group(2))]), ""
    if end := _LAUNCH_END.match(line):
        return int(end.group(1)), Ending("failed", end.group(2).strip()), ""
    match = _LAUNCH_FAILURE.match(line)
    if match is None:
        return None
    what = match.group(2).strip()
    ending = None if "it is started again" in what else Ending("failed", what.split(";")[0])
    return int(match.group(1)), ending, what


def parse_launch_start(line: str) -> int | None:
    """The model that the launcher has started, or started again; None for any other line."""
    match = _LAUNCH_START.match(line)
    return None if match is None or parse_launch_failure(line) is not None else int(match.group(1))


def parse_stop(line: str) -> Ending | None:
    """The ending of a training that says itself that it saved and leaves."""
    match = _STOP.search(line)
    return None if match is None else Ending("stopped", match.group(1) or "a signal to another rank")


def parse_settings(line: str) -> dict[str, str] | None:
    """fairseq's printed configuration, without the groups that its options are in; None for any other line."""
    match = _SETTINGS.search(line)
    if match is None:
        return None
    try:
        tree = ast.parse(match.group(1), mode="eval").body
    except SyntaxError:
        return {}
    flat: dict[str, str] = {}
    groups = tree.values if isinstance(tree, ast.Dict) else []
    for group in groups:
        if isinstance(group, ast.Dict):
            flat.update(
                (str(_value(name)), str(_value(value))) for name, value in zip(group.keys, group.values, strict=True)
            )
        elif isinstance(group, ast.Call):  # Namespace(...): those of the model, the task and the criterion
            flat.update((str(keyword.arg), str(_value(keyword.value))) for keyword in group.keywords)
    return {name: value for name, value in sorted(flat.items()) if not name.startswith("_")}


def _value(node: ast.expr | None) -> object:
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
