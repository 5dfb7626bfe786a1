"""Owns the table of ``--dry-run``: the bits that a device will send per update, before anything has run.

The formulas are those of :mod:`fairseq_codistill.coordinator.meter`. What they need is read from the command or asked
for; whatever was assumed is printed with the result. Nothing here starts a process.
"""

import contextlib
import glob
import importlib
import io
import logging
import math
import os
import tempfile
from collections.abc import Sequence

from fairseq_codistill.choices import CHECKPOINT_CODECS, split_codec
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.launch.dial import bits_per_row, parse_link, propose, report
from fairseq_codistill.launch.plan import has_flag, last_value, relay_of, setting_of
from fairseq_codistill.launch.programs import Assumed, fairseq_arguments, program_plan
from fairseq_codistill.paths import user_dir

NUM_SPECIAL_SYMBOLS = 4  # <s> <pad> </s> <unk>: fairseq adds them, dict.*.txt does not list them
CHECKPOINT_INTERVALS = (1, 625)  # every update, and the shortest interval of the paper's figure 1
POWERSGD_RANK = 4
TOLERATED = 0.1  # share of a step that the last column lets communication cost


def num_classes(command: Sequence[str]) -> Assumed:
    """Size of the target vocabulary, from the dictionary in the data folder, or of ``--num-classes``."""
    plan = program_plan(command)
    if plan is not None:
        return plan.classes
    given = last_value(command, "--num-classes")
    if given is not None and given.isdigit():
        return Assumed(int(given), "--num-classes")
    for argument in command:
        folder = argument.split(os.pathsep)[0]
        if argument.startswith("-") or not os.path.isdir(folder) or not glob.glob(os.path.join(folder, "dict*.txt")):
            continue
        language = last_value(command, "--target-lang") or last_value(command, "-t") or _target_language(folder)
        path = os.path.join(folder, "dict.txt" if language is None else f"dict.{language}.txt")
        if not os.path.isfile(path):
            continue
        with open(path, "rb") as dictionary:
            num_lines = sum(1 for line in dictionary if line.strip())
        return Assumed(num_lines + NUM_SPECIAL_SYMBOLS, f"{path}, {num_lines:,} lines + {NUM_SPECIAL_SYMBOLS} specials")
    return Assumed(None, "no dictionary found in the data folder: give --plan-classes")


def _target_language(folder: str) -> str | None:
    """As fairseq infers it, from the first file called ``<split>.<source>-<target>.…``."""
    for name in sorted(os.listdir(folder)):
        parts = name.split(".")
        if len(parts) >= 3 and len(parts[1].split("-")) == 2:
            return parts[1].split("-")[1]
    return None


def num_rows(command: Sequence[str]) -> Assumed:
    """Rows of one device's share of an update: at most, as a batch is never larger than its limit."""
    plan = program_plan(command)
    if plan is not None:
        return plan.rows
    update_freq_text = last_value(command, "--update-freq") or "1"
    try:
        update_freq = int(update_freq_text.strip("[]").split(",")[0])
        max_tokens = int(last_value(command, "--max-tokens") or 0)
        batch_size = int(last_value(command, "--batch-size") or last_value(command, "--max-sentences") or 0)
        max_positions = int(last_value(command, "--max-target-positions") or 1024)
    except ValueError:
        return Assumed(None, "--max-tokens, --batch-size or --update-freq is not a number: give --plan-rows")
    times = f" x --update-freq {update_freq}" if update_freq != 1 else ""
    if max_tokens:
        return Assumed(
            max_tokens * update_freq,
            f"--max-tokens {max_tokens}{times}, an upper bound: padding and ragged batches send less",
        )
    if batch_size and fairseq_arguments(command) is None:
        return Assumed(batch_size * update_freq, f"--batch-size {batch_size}{times}")
    if batch_size:
        return Assumed(
            batch_size * max_positions * update_freq,
            f"--batch-size {batch_size} x {max_positions} target positions{times}, far above what is sent: better "
            "give --plan-rows",
        )
    return Assumed(None, "neither --max-tokens nor --batch-size is in the command: give --plan-rows")


def num_parameters(command: Sequence[str], plan_classes: int | None = None) -> Assumed:
    """Trained parameters, counted on the model itself, which fairseq builds as it would for training.

    Where the data folder is not here, ``plan_classes`` is the size of both dictionaries.
    """
    plan = program_plan(command)
    if plan is not None:
        return _counted(plan.parameter_shapes(), plan.model)
    arguments = fairseq_arguments(command)
    if arguments is None:
        return Assumed(None, "the program is not fairseq-train: give --plan-parameters")
    complaints = io.StringIO()
    logging_before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(complaints), contextlib.redirect_stdout(io.StringIO()):
            shapes = _build_and_look(arguments, plan_classes)
        return _counted(shapes, last_value(command, "--arch") or "the model")
    except (Exception, SystemExit) as error:  # whatever stops fairseq from building it, the rest of the table stands
        reason = f"{type(error).__name__}: {error}"
        if not str(error) and last_value(command, "--arch") is None:  # of which fairseq says nothing
            reason = "the command has no --arch"
        if isinstance(error, SystemExit):  # of argparse, which has written why
            reason = (complaints.getvalue().strip().splitlines() or [reason])[-1]
        return Assumed(None, f"fairseq could not build the model ({reason}): give --plan-parameters")
    finally:
        logging.disable(logging_before)


def _counted(shapes: list[tuple[int, ...]], name: str) -> Assumed:
    counted = sum(math.prod(shape) for shape in shapes)
    return Assumed(counted, f"counted on {name}", sum(powersgd_numbers(shape) for shape in shapes))


def _build_and_look(arguments: list[str], plan_classes: int | None) -> list[tuple[int, ...]]:
    if plan_classes is not None and not arguments[0].startswith("-") and not os.path.isdir(arguments[0]):
        with tempfile.TemporaryDirectory() as folder:
            for language in ("source", "target"):
                with open(os.path.join(folder, f"dict.{language}.txt"), "w", encoding="utf-8") as dictionary:
                    dictionary.writelines(f"{symbol} 1\n" for symbol in range(plan_classes - NUM_SPECIAL_SYMBOLS))
            languages = ["--source-lang", "source", "--target-lang", "target"]
            return _build_and_look([folder, *arguments[1:], *languages], None)
    given_dir = last_value(arguments, "--user-dir")
    if given_dir is not None and is_this_package(given_dir):
        # fairseq imports the tasks of a --user-dir only if no package of that name is imported yet, and refuses one of
        # the same name from elsewhere: where a clone is the working folder of an installed launcher, say.
        importlib.import_module("fairseq_codistill.tasks.codistillation")
        arguments = without_option(arguments, "--user-dir")
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    parsed = options.parse_args_and_arch(options.get_training_parser(), input_args=arguments)
    config = convert_namespace_to_omegaconf(parsed)
    model = tasks.setup_task(config.task).build_model(config.model)
    return [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]


def is_this_package(folder: str) -> bool:
    """Whether a ``--user-dir`` is this package, be it another copy of it."""
    return os.path.realpath(folder) == os.path.realpath(user_dir()) or (
        os.path.basename(os.path.realpath(folder)) == os.path.basename(user_dir())
        and os.path.isfile(os.path.join(folder, "tasks", "codistillation.py"))
    )


def without_option(command: Sequence[str], flag: str) -> list[str]:
    """The command without an option and its value."""
    kept: list[str] = []
    skip = False
    for argument in command:
        if not skip and argument != flag and not argument.startswith(flag + "="):
            kept.append(argument)
        skip = argument == flag and not skip
    return kept


def powersgd_numbers(shape: Sequence[int], rank: int = POWERSGD_RANK) -> int:
    """Numbers that torch's PowerSGD hook averages for a parameter of that shape: two factors, where that halves them.

    Source: Vogels et al. 2019; ``torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook``.
    """
    size = math.prod(shape)
    if len(shape) < 2:
        return size
    rows, columns = shape[0], size // max(shape[0], 1)
    factors = (rows + columns) * min(rank, rows, columns)
    return factors if 2 * factors < size else size


def same_but_for_identity(command: Sequence[str]) -> tuple[str, ...]:
    """The command without what never changes the size of a model, to build each size once."""
    return tuple(without_option(without_option(command, "--seed"), "--save-dir"))


def traffic_report(
    commands: Sequence[Sequence[str]],
    plan_classes: int | None = None,
    plan_rows: int | None = None,
    plan_parameters: int | None = None,
    plan_step_s: float | None = None,
    link: str | None = None,
) -> str:
    """The table and its assumptions, as text.

    Args:
        commands: of every model, of :func:`fairseq_codistill.launch.plan.model_commands`.
        plan_classes: takes the place of what :func:`num_classes` finds; likewise the others.
        plan_step_s: seconds of an update without any communication; adds what that makes of the bits.
        link: speed of the link of one device, for which settings are proposed.

    Raises:
        ConfigError: an unknown codec, or an interval or a time that cannot be.
    """
    if plan_step_s is not None and not 0 < plan_step_s < math.inf:
        raise ConfigError(f"--plan-step-s is {plan_step_s}; it must be more than 0 seconds")
    classes = num_classes(commands[0]) if plan_classes is None else Assumed(plan_classes, "--plan-classes")
    rows = num_rows(commands[0]) if plan_rows is None else Assumed(plan_rows, "--plan-rows")
    sizes: dict[tuple[str, ...], Assumed] = {}
    for command in commands:
        key = same_but_for_identity(command)
        if key not in sizes:
            given = plan_parameters is not None
            sizes[key] = (
                Assumed(plan_parameters, "--plan-parameters") if given else num_parameters(command, plan_classes)
            )
    by_model = [sizes[same_but_for_identity(command)] for command in commands]
    codec, interval, exchange = _exchange(commands[0])
    lines = [
        f"Bits that one device sends per update, {len(commands)} models, by the formulas of the paper (section 3.1).",
        "Assumed:",
        _assumption("classes", classes),
        _assumption("rows per device and update", rows),
    ]
    if len(set(by_model)) == 1:
        groups = [("", by_model[0])]
    else:
        groups = [(f" of model {model}", size) for model, size in enumerate(by_model)]
    lines += [_assumption(f"parameters{name}", size) for name, size in groups]
    if plan_step_s is not None:
        lines.append(f"  seconds per update, without communication: {plan_step_s:g} (--plan-step-s)")
    # What goes through a relay leaves once, for however many.
    is_relayed = bool(relay_of(commands[0])) and len(commands) > 1
    num_sharing, way = (2, "this run, relay") if is_relayed else (len(commands), "this run")
    if exchange == "checkpoints":
        this_run = _checkpoint_bits(codec, num_sharing, by_model[0].value, interval)
        label = f"checkpoints {codec} T={interval} ({way})"
    else:
        receivers = 1 if is_relayed else _num_receivers(commands[0], len(commands))
        this_run = _prediction_bits(codec, receivers + 1, rows.value, classes.value, interval)
        budget = _budget_bits(commands[0])
        if budget and (this_run is None or budget < this_run):
            this_run, way = budget, f"{way}, by its budget"
        label = f"predictions {codec} T={interval} ({way})"
        if split_codec(codec)[0] in ("counts", "label", "vote"):
            lines.append("  bits of a row: about what sharp predictions take late in training (results/codecs)")
    head = ("", "per update", "x this run", "per hour", f"{TOLERATED:.0%} of a step at")
    table: list[tuple[str, ...]] = [head]
    is_alone = len(commands) == 1  # what its devices average among themselves is all there is
    if not is_alone:
        table.append(_row(label, this_run, None, plan_step_s))
    for name, size in groups:
        for label, bits in _comparisons(len(commands), size):
            if is_alone and label.startswith("checkpoints"):
                continue
            table.append(_row(label + name, bits, this_run, plan_step_s))
    num_columns = 3 if plan_step_s is None else 5
    lines.append("")
    lines += [f"  {row[0]:<44}" + "".join(f"{cell:>20}" for cell in row[1:num_columns]).rstrip() for row in table]
    if any(has_flag(command, "--codistill-burn-in") for command in commands):
        lines.append("During --codistill-burn-in nothing is exchanged.")
    if link is not None:
        if exchange == "checkpoints":
            raise ConfigError(
                f"--link is {link!r} with --codistill-exchange checkpoints: it proposes how predictions travel; leave "
                "one of them out"
            )
        lines += ["", _proposal(link, plan_step_s, rows.value, classes.value, commands)]
    return "\n".join(lines)


def _proposal(
    link: str, step_s: float | None, rows: int | None, classes: int | None, commands: Sequence[Sequence[str]]
) -> str:
    num_models = len(commands)
    speed = parse_link(link)
    missing = [
        name
        for name, value in (("--plan-step-s", step_s), ("--plan-rows", rows), ("--plan-classes", classes))
        if not value
    ]
    if missing:
        raise ConfigError(f"--link is {link!r}; to propose anything for it, give {' and '.join(missing)} as well")
    if num_models < 2:
        raise ConfigError(f"--link is {link!r} and --num-models is {num_models}: one model exchanges nothing; use 2")
    if relay_of(commands[0]):
        num_models = 2  # as above: to all of them at once
    return report(speed, propose(speed, step_s or 0.0, rows or 0, classes or 0, num_models, _why_whole(commands)))


def _why_whole(commands: Sequence[Sequence[str]]) -> str:
    """Why these models cut no batch; empty where they may."""
    for flag in ("--codistill-lookahead", "--codistill-own-data", "--codistill-transfer", "--transfer-dataset"):
        if any(has_flag(command, flag) or setting_of(command, flag) for command in commands):
            return f"with {flag} no batch is cut"
    plans = [plan for plan in map(program_plan, commands) if plan is not None]
    if any(plan.has_batch_norm() for plan in plans):
        return "with batch normalisation every part would have statistics of its own"
    return ""


def _exchange(command: Sequence[str]) -> tuple[str, int, str]:
    """Codec, interval, and whether predictions or checkpoints are exchanged; what is set in code is not known."""
    plan = program_plan(command)
    if plan is not None:
        return plan.codec, plan.interval, plan.exchange
    defaults = CodistillationConfig()
    interval = setting_of(command, "--codistill-interval") or str(defaults.codistill_interval)
    if not interval.isdecimal() or int(interval) < 1:
        raise ConfigError(f"--codistill-interval is {interval!r}; it must be a whole number, 1 or more")
    exchange = setting_of(command, "--codistill-exchange") or defaults.codistill_exchange
    return setting_of(command, "--codistill-codec") or defaults.codistill_codec, int(interval), exchange


def _prediction_bits(codec: str, num_models: int, rows: int | None, classes: int | None, interval: int) -> float | None:
    from fairseq_codistill.coordinator.meter import prediction_bits

    split_codec(codec)
    if not rows or not classes:
        return None
    return prediction_bits(num_models, rows, classes, interval, bits_per_row(codec, classes) / classes)


def _num_receivers(command: Sequence[str], num_models: int) -> int:
    text = setting_of(command, "--codistill-peers-per-position") or "0"
    if not text.isdecimal():
        raise ConfigError(f"--codistill-peers-per-position is {text!r}; it must be a whole number, 0 (all) or more")
    return int(text) or num_models - 1


def _budget_bits(command: Sequence[str]) -> float:
    """Of an update and device; 0: none."""
    text = setting_of(command, "--codistill-budget-mbit") or "0"
    try:
        return 1e6 * float(text)
    except ValueError as error:
        raise ConfigError(f"--codistill-budget-mbit is {text!r}; it must be a number of Mbit") from error


def _checkpoint_bits(codec: str, num_models: int, num_parameters: int | None, interval: int) -> float | None:
    """Buffers are not counted; they are a few numbers beside the parameters."""
    from fairseq_codistill.coordinator.meter import checkpoint_bits

    if codec not in CHECKPOINT_CODECS:
        raise ConfigError(
            f"--codistill-codec is {codec!r}; checkpoints travel as one of {', '.join(CHECKPOINT_CODECS)}"
        )
    if num_parameters is None:
        return None
    return checkpoint_bits(num_models, num_parameters, interval, 32 if codec == "fp32" else 16)


def _comparisons(num_models: int, size: Assumed) -> list[tuple[str, float | None]]:
    from fairseq_codistill.coordinator.meter import all_reduce_bits, checkpoint_bits

    found: list[tuple[str, float | None]] = [
        (f"all_reduce fp{bits}", None if size.value is None else all_reduce_bits(size.value, bits)) for bits in (32, 16)
    ]
    numbers = size.powersgd_value
    found.append((f"PowerSGD rank {POWERSGD_RANK}", None if numbers is None else all_reduce_bits(numbers)))
    for interval in CHECKPOINT_INTERVALS:
        bits_sent = None if size.value is None else checkpoint_bits(num_models, size.value, interval)
        found.append((f"checkpoints fp32 T={interval}", bits_sent))
    return found


def _assumption(name: str, assumed: Assumed) -> str:
    value = "unknown" if assumed.value is None else f"{assumed.value:,}"
    return f"  {name}: {value} ({assumed.source})"


def _row(label: str, bits: float | None, this_run: float | None, step_s: float | None) -> tuple[str, ...]:
    """A line of the table: bits per update, their ratio to this run, per hour, and the link they need."""
    if bits is None:
        return (label, "unknown", "", "", "")
    ratio = f"{bits / this_run:,.2f}" if this_run else ""
    per_hour = f"{bits * 3600 / step_s / 1e9:,.2f} Gbit" if step_s else ""
    link = f"{bits / (TOLERATED * step_s) / 1e6:,.3f} Mbit/s" if step_s else ""
    return (label, f"{bits / 1e6:,.3f} Mbit", ratio, per_hour, link)
