"""Owns the names that a user can choose a codec and a divergence from, and which of them go together.

The options themselves are in ``config``. Nothing in this file imports fairseq or torch.
"""

from fairseq_codistill.option import ConfigError

DIVERGENCES = ("mse", "kl", "reverse_kl", "js")
CHECKPOINT_CODECS = ("fp32", "fp16", "bf16")
DENSE_CODECS = (*CHECKPOINT_CODECS, "int8")
CODECS = (*DENSE_CODECS, "columns", "tokens", "topk", "counts", "label", "vote")
SIZED_CODECS = ("columns", "tokens", "topk", "counts")
DRAWN_CODECS = ("tokens", "counts", "label", "vote")  # classes without their probabilities
CODEC_HELP = (
    "how predictions travel: fp32, fp16, bf16, int8 (one scale a row); columns:S, logits of S classes drawn at every "
    "position (mse only); tokens:K, K classes a row drawn from the softmax (kl only); counts:K, the same draws entropy "
    "coded, in a fraction of the bits; topk:K, the K largest logits; label, the most likely class (kl only, biased); "
    "vote, the class that most of n >= 3 models find most likely (kl only, biased)"
)
MAX_DRAWS = 256  # of counts, whose tables have the square of it


def split_codec(codec: str) -> tuple[str, int]:
    """``"tokens:16"`` -> ``("tokens", 16)``, ``"fp16"`` -> ``("fp16", 0)``.

    Raises:
        ConfigError: there is no such codec, or its size is missing, impossible or not wanted.

    >>> split_codec("tokens")
    Traceback (most recent call last):
        ...
    fairseq_codistill.option.ConfigError: --codistill-codec is 'tokens'; it must be tokens:SIZE with a size of 1 or more: tokens:16
    """  # noqa: E501
    name, colon, size = codec.partition(":")
    if name not in CODECS:
        raise ConfigError(f"--codistill-codec is {codec!r}; it must be one of {', '.join(CODECS)}")
    if name not in SIZED_CODECS:
        if colon:
            raise ConfigError(f"--codistill-codec is {codec!r}; {name} has no size, write {name!r}")
        return name, 0
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError(f"--codistill-codec is {codec!r}; it must be {name}:SIZE with a size of 1 or more: {name}:16")
    if name == "counts" and int(size) > MAX_DRAWS:
        raise ConfigError(f"--codistill-codec is {codec!r}; counts takes at most {MAX_DRAWS} draws a row")
    return name, int(size)


def check_codec(codec: str, divergence: str, exchange: str, num_models: int) -> None:
    """Whether what travels determines what is to be computed from it.

    Raises:
        ConfigError: it does not, or there are too few models for it.
    """
    name, _ = split_codec(codec)
    if exchange == "checkpoints":
        if name not in CHECKPOINT_CODECS:
            raise ConfigError(
                f"--codistill-codec is {codec!r} with --codistill-exchange checkpoints: parameters travel as one of "
                f"{', '.join(CHECKPOINT_CODECS)}"
            )
        return
    clash = f"--codistill-codec is {codec!r} with --codistill-divergence {divergence}"
    if name == "columns" and divergence != "mse":
        raise ConfigError(
            f"{clash}: the logits of some classes do not tell the softmax; use --codistill-divergence mse, or the "
            "codec tokens:K, counts:K or topk:K"
        )
    if name in DRAWN_CODECS and divergence == "mse":
        raise ConfigError(
            f"{clash}: drawn tokens do not tell the logits; use --codistill-divergence kl, or the codec columns:S"
        )
    if name in DRAWN_CODECS and divergence != "kl":
        raise ConfigError(
            f"{clash}: it asks how likely the peer finds other classes than those that travel; use "
            "--codistill-divergence kl, or the codec topk:K or fp16"
        )
    if name == "vote" and 1 < num_models < 3:
        raise ConfigError(
            f"--codistill-codec is {codec!r} and --codistill-num-models is {num_models}: two models have no majority; "
            "use 3 models or more, or the codec label"
        )
