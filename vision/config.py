"""Owns every option of vision training beside those of codistillation: name, default, help text and validation, once.

The command line and the YAML presets are built from these classes (:mod:`vision.options`). Nothing here imports torch.
"""

import dataclasses
import math
from typing import Any

from fairseq_codistill.config import CodistillationConfig, ConfigError, LabelSmoothingConfig, flag_name

DATASETS = ("digits", "fake", "cifar10", "imagefolder")
FOLDER_DATASETS = ("cifar10", "imagefolder")
AUGMENTATIONS = ("auto", "goyal", "cifar", "crop", "none")
LR_SCHEDULES = ("step", "cosine", "constant")
PRECISIONS = ("none", "bf16", "fp16")
MOST_EPOCHS = 1e9  # of anything: far beyond it, updates cannot be counted
COMM_HOOKS = ("none", "fp16", "powersgd", "post_localsgd")


def _option(default: Any, help_text: str, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"help": help_text, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class DataConfig:
    """What is seen, and how it is changed on the way."""

    dataset: str = _option("digits", "digits (embedded), fake, cifar10:DIR, imagefolder:DIR (DIR/train, DIR/val)")
    transfer_dataset: str = _option(
        "",
        "images that all models have, named as --dataset is; labels are not looked at, and imagefolder:DIR needs no "
        "DIR/train, only a folder of images inside. At every T-th update a batch of them is predicted, exchanged and "
        "distilled on, in an order that all share; what the models train on (--dataset) is their own, and not compared",
    )
    image_size: int = _option(0, "side of the images after augmentation, in pixels; 0: what is usual for the data set")
    augmentation: str = _option(
        "auto",
        "goyal: random resized crop and flip; cifar: shifted crop and flip; crop: shifted crop alone; auto: what is "
        "usual for the data set",
        AUGMENTATIONS,
    )
    color_jitter: float = _option(0.0, "with goyal: brightness, contrast and saturation change by up to this share")
    auto_augment: str = _option(
        "", "policy of timm after it, such as rand-m9-mstd0.5 (RandAugment); drawn for each image by the data seed"
    )
    mixup: float = _option(0.0, "alpha of timm's mixup, the same draw on all models; 0: none. Batches must be even")
    cutmix: float = _option(0.0, "alpha of timm's cutmix, likewise; with both, each takes half of the batches")
    data_fraction: str = _option(
        "1", "1/k trains on a fixed k-th part of the images, k times as often: the updates stay the same"
    )
    fake_images: int = _option(1024, "number of images of --dataset fake")
    fake_classes: int = _option(10, "number of classes of --dataset fake")
    num_workers: int = _option(4, "processes that load images, for each rank; 0 loads in the training process")
    skip_broken: bool = _option(
        False,
        "imagefolder, and cifar10 as folders: decode every image once before training, and leave out those that cannot "
        "be decoded; the result is kept in --save-dir. All models must leave out the same",
    )

    @property
    def data_divisor(self) -> int:
        """k of ``--data-fraction 1/k``.

        Raises:
            ConfigError: it is not of that form.
        """
        numerator, slash, divisor = self.data_fraction.partition("/")
        whole = divisor if slash else "1"
        if numerator.strip() != "1" or not whole.strip().isdecimal() or int(whole) < 1:
            raise ConfigError(f"--data-fraction is {self.data_fraction!r}; it must be 1 or 1/k with a whole k: 1/4")
        return int(whole)

    def check_data(self) -> None:
        """Raises:
        ConfigError: naming the first setting that cannot work.
        """
        _check_name("--dataset", self.dataset)
        if self.transfer_dataset:
            _check_name("--transfer-dataset", self.transfer_dataset)
        _at_least(self, 0, "image_size", "color_jitter", "num_workers", "mixup", "cutmix")
        _at_least(self, 1, "fake_images", "fake_classes")
        kinds = {dataset.partition(":")[0] for dataset in (self.dataset, self.transfer_dataset)}
        if self.skip_broken and not kinds & set(FOLDER_DATASETS):
            raise ConfigError(
                f"--skip-broken is set, but --dataset is {self.dataset!r}, which has no files; leave it out"
            )
        _ = self.data_divisor

    @property
    def is_mixed(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0


@dataclasses.dataclass
class ModelConfig:
    """What is trained."""

    model: str = _option(
        "resnet18", "name of a timm model, or wrnDEPTH_WIDTH (wrn28_10), a wide residual network for small images"
    )
    model_kwargs: list[str] = _option([], "NAME=VALUE ... for the timm model, such as img_size=64")
    pretrained: bool = _option(False, "start from the pretrained weights of timm, which it downloads")
    initial_checkpoint: str = _option(
        "",
        "start from the weights in this file: of timm (.pth, .safetensors) or a checkpoint of this program. A "
        "classifier of another size begins anew",
    )
    drop_rate: float = _option(0.0, "dropout before the classifier")
    teacher_model: str = _option(
        "",
        "architecture of the --codistill-teacher whose file does not say it (one of timm's weights); default: --model",
    )
    view: str = _option(
        "",
        "wide residual networks: which split of the channels after the first group this model sees: a number from 0, "
        "or 'model' for the model's own index; default: all channels",
    )
    num_views: int = _option(8, "in how many splits the channels after the first group are cut, with --view")
    first_group: str = _option(
        "", "wide residual networks: checkpoint of this program to take the stem and the first group from"
    )
    freeze_first_group: bool = _option(False, "wide residual networks: never change the stem and the first group")

    def check_model(self) -> None:
        """Raises:
        ConfigError: naming the first setting that cannot work.
        """
        if not 0.0 <= self.drop_rate < 1.0:
            raise ConfigError(f"--drop-rate is {self.drop_rate}; it must be at least 0 and below 1")
        _at_least(self, 1, "num_views")
        if self.first_group and self.initial_checkpoint:
            raise ConfigError(
                f"--first-group is {self.first_group!r} and --initial-checkpoint {self.initial_checkpoint!r}, which "
                "has a first group as well; give one of them"
            )
        if self.pretrained and self.initial_checkpoint:
            raise ConfigError(
                f"--pretrained is set and --initial-checkpoint is {self.initial_checkpoint!r}; give one of them"
            )
        is_split = self.view.isdecimal() and int(self.view) < self.num_views
        if self.view not in ("", "model") and not is_split:
            raise ConfigError(
                f"--view is {self.view!r}; it must be 'model' or a number from 0 to {self.num_views - 1}: "
                f"--num-views is {self.num_views}"
            )
        for pair in self.model_kwargs:
            if not pair.partition("=")[0].isidentifier() or "=" not in pair:
                raise ConfigError(f"--model-kwargs has {pair!r}; it must be NAME=VALUE")


@dataclasses.dataclass
class OptimizationConfig:
    """How it is trained. Epochs are those of the whole data set, times ``stretch``, whatever ``data_fraction`` is."""

    batch_size: int = _option(32, "images that one device takes at once; an update is --update-freq times that")
    update_freq: int = _option(
        1,
        "batches of one device in one update, one after another: gradients are averaged over them. Each is exchanged "
        "by itself",
    )
    epochs: float = _option(90.0, "length of the training")
    stretch: float = _option(
        1.0,
        "an epoch of all options is that many runs through the data: 2 makes as many updates of a model with twice the "
        "batch; with --data-fraction, of the whole data",
    )
    max_updates: int = _option(0, "stop after that many updates of the schedule; 0: at the end of --epochs")
    optimizer: str = _option(
        "momentum", "name of a timm optimizer; momentum is SGD with --momentum, sgd with Nesterov's"
    )
    momentum: float = _option(0.9, "momentum of the optimizer")
    lr: float = _option(0.1, "learning rate for a batch of --lr-batch-size")
    lr_batch_size: int = _option(
        256, "linear scaling: --lr is for a batch of that many images of one model, all its devices; 0: no scaling"
    )
    lr_schedule: str = _option("step", "how the learning rate falls after the warm-up", LR_SCHEDULES)
    lr_milestones: list[float] = _option([30.0, 60.0, 80.0], "with step: epochs at which it drops")
    lr_decay: float = _option(0.1, "with step: factor of each drop")
    warmup_epochs: float = _option(0.0, "the learning rate grows linearly over these epochs")
    warmup_lr: float = _option(-1.0, "where the warm-up starts; -1: at --lr, unscaled")
    weight_decay: list[float] = _option(
        [1e-4], "weight decay, and its later values where it falls at --weight-decay-milestones: 5e-4 1e-5 0"
    )
    weight_decay_milestones: list[float] = _option([], "epochs at which the weight decay takes its next value")
    norm_weight_decay: bool = _option(False, "decay biases and the parameters of normalisation layers as well")
    ema_decay: float = _option(
        0.0,
        "keep an exponential moving average of parameters and buffers with this decay (0.9999): it is what is "
        "evaluated, and saved beside the model; 0: none",
    )
    ema_warmup: bool = _option(False, "with --ema-decay: a decay that grows to it, for short trainings")
    max_nonfinite: int = _option(
        10, "that many updates in a row whose loss is not finite end training with an error; 0: never"
    )
    amp: str = _option("none", "mixed precision", PRECISIONS)
    channels_last: bool = _option(False, "keep images and convolutions in the layout that tensor cores like")
    compile: bool = _option(False, "compile the model with torch.compile")
    comm_hook: str = _option("none", "how the ranks of one model average gradients: torch's own hooks", COMM_HOOKS)
    powersgd_rank: int = _option(2, "with --comm-hook powersgd: rank of the approximation")
    hook_start: int = _option(100, "with powersgd and post_localsgd: updates of plain all_reduce before it")
    hook_start_epochs: float = _option(
        0.0, "the same in epochs, as those of the learning rate; 0: --hook-start says it"
    )
    localsgd_period: int = _option(
        4,
        "with --comm-hook post_localsgd: updates between averages of the parameters; a checkpoint is preceded by one",
    )

    def check_optimization(self) -> None:
        """Raises:
        ConfigError: naming the first setting that cannot work.
        """
        _at_least(self, 1, "batch_size", "update_freq", "powersgd_rank", "localsgd_period")
        _at_least(self, 0, "max_updates", "momentum", "lr", "lr_batch_size", "lr_decay", "warmup_epochs", "hook_start")
        _at_least(self, 0, "max_nonfinite", "hook_start_epochs")
        if self.hook_start_epochs and self.hook_start_epochs >= self.epochs:
            raise ConfigError(
                f"--hook-start-epochs is {self.hook_start_epochs} of {self.epochs}: --comm-hook {self.comm_hook} would "
                "never begin; give less"
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"--ema-decay is {self.ema_decay}; it must be at least 0 (none) and below 1")
        if self.comm_hook == "powersgd" and self.hook_start < 2:
            raise ConfigError(f"--hook-start is {self.hook_start}; powersgd needs at least 2")
        if self.amp == "fp16" and self.comm_hook in ("powersgd", "post_localsgd"):
            # An update whose gradients overflow is one to skip, on all ranks: PowerSGD would keep the infinity as its
            # error for ever, and with post-local SGD the ranks that skip no longer average when the others do.
            raise ConfigError(
                f"--comm-hook is {self.comm_hook!r} and --amp is 'fp16', whose overflows it does not survive; give "
                "--amp bf16, or --comm-hook fp16"
            )
        for name in ("epochs", "stretch"):
            if not 0 < (value := getattr(self, name)) <= MOST_EPOCHS:
                raise ConfigError(f"--{name} is {value}; it must be more than 0, and at most {MOST_EPOCHS:g}")
        if self.warmup_lr < 0 and self.warmup_lr != -1:
            raise ConfigError(f"--warmup-lr is {self.warmup_lr}; it must be 0 or more, or -1 for --lr")
        for name in ("lr_milestones", "weight_decay_milestones"):
            milestones = getattr(self, name)
            if milestones != sorted(milestones) or any(map(math.isnan, milestones)):
                raise ConfigError(f"{flag_name(name)} is {milestones}; epochs must ascend")
        if len(self.weight_decay) != len(self.weight_decay_milestones) + 1:
            raise ConfigError(
                f"--weight-decay has {len(self.weight_decay)} values and --weight-decay-milestones "
                f"{len(self.weight_decay_milestones)}; give one value more than milestones"
            )
        if not all(math.isfinite(value) and value >= 0 for value in self.weight_decay):
            raise ConfigError(f"--weight-decay is {self.weight_decay}; every value must be 0 or more")


@dataclasses.dataclass
class RunConfig:
    """Where it runs, what it writes."""

    seed: int = _option(1, "of this model's initialisation and dropout; the data use --codistill-data-seed")
    save_dir: str = _option("", "folder of the checkpoints and the log; training goes on from checkpoint_last.pt in it")
    safetensors: bool = _option(
        False, "write the weights of the best checkpoint as checkpoint_best.safetensors too, for timm and others"
    )
    no_save: bool = _option(False, "write nothing, not even a log")
    save_updates: int = _option(0, "save every so many updates, beside the end of every evaluation")
    eval_epochs: float = _option(1.0, "evaluate every so many epochs, and at the end")
    log_updates: int = _option(50, "a line in the log every so many updates")
    cpu: bool = _option(False, "train on the CPU although there is a GPU")
    verify_baseline: bool = _option(
        False,
        "train one model alone for one epoch, write nothing, and say whether its top-1 is in the band that is known "
        "for these options; exit code 0: it is, 3: no band is known, 4: it is not",
    )
    no_progress_bar: bool = _option(False, "plain lines in place of the progress bar")

    def check_run(self) -> None:
        """Raises:
        ConfigError: naming the first setting that cannot work.
        """
        _at_least(self, 0, "seed", "save_updates")
        if self.seed >= 2**64:
            raise ConfigError(f"--seed is {self.seed}; it must be below 2 to the power of 64")
        _at_least(self, 1, "log_updates")
        if not 0 < self.eval_epochs <= MOST_EPOCHS:
            raise ConfigError(
                f"--eval-epochs is {self.eval_epochs}; it must be more than 0, and at most {MOST_EPOCHS:g}"
            )
        if not self.save_dir and not self.no_save and not self.verify_baseline:
            raise ConfigError("--save-dir is not set; give every model its own folder, or --no-save")


@dataclasses.dataclass
class VisionConfig(RunConfig, OptimizationConfig, ModelConfig, DataConfig, LabelSmoothingConfig, CodistillationConfig):
    """All options. Field names are command-line flags with ``-`` for ``_``, and keys of the YAML presets."""

    @property
    def split(self) -> str:
        """Which channels reach the second group: ``2 of 8``, counted from 0; empty for all of them."""
        number = self.codistill_model_index if self.view == "model" else self.view
        return f"{number} of {self.num_views}" if self.view else ""

    def validate(self) -> None:
        """Raises:
        ConfigError: naming the first setting that cannot work.
        """
        CodistillationConfig.validate(self)
        LabelSmoothingConfig.validate(self)
        self.check_data()
        self.check_model()
        self.check_optimization()
        self.check_run()
        if self.codistill_transfer:
            raise ConfigError(
                f"--codistill-transfer is {self.codistill_transfer!r}, which names a split of fairseq's data; here "
                "it is --transfer-dataset, which is named as --dataset is"
            )
        if self.transfer_dataset and self.codistill_exchange != "predictions":
            raise ConfigError(
                f"--transfer-dataset is {self.transfer_dataset!r} with --codistill-exchange {self.codistill_exchange}: "
                "copies of the peers predict each model's own batches; leave it out, and give --codistill-own-data"
            )
        if self.transfer_dataset and self.codistill_lookahead:
            raise ConfigError(
                f"--codistill-lookahead with --transfer-dataset {self.transfer_dataset!r}: only batches that are "
                "trained on are predicted ahead; leave one of the two out"
            )
        if self.is_mixed and self.codistill_teacher_cache:
            raise ConfigError(
                f"--codistill-teacher-cache is {self.codistill_teacher_cache!r} with --mixup {self.mixup} and --cutmix "
                f"{self.cutmix}: what is kept is of single images; leave the cache or the mixing out"
            )
        if self.is_mixed and self.batch_size % 2:
            raise ConfigError(
                f"--batch-size is {self.batch_size} with --mixup {self.mixup} and --cutmix {self.cutmix}, which pair "
                "the images of a batch; make it even"
            )


def _check_name(flag: str, dataset: str) -> None:
    kind, colon, folder = dataset.partition(":")
    if kind not in DATASETS:
        raise ConfigError(f"{flag} is {dataset!r}; it must be one of digits, fake, cifar10:DIR, imagefolder:DIR")
    if kind in FOLDER_DATASETS and not folder:
        raise ConfigError(f"{flag} is {dataset!r}; say where the images are: {kind}:DIR")
    if kind not in FOLDER_DATASETS and colon:
        raise ConfigError(f"{flag} is {dataset!r}; {kind} has no folder, write {kind!r}")


def _at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= least):
            raise ConfigError(f"{flag_name(name)} is {value!r}; it must be at least {least}")
