"""Owns the choice of a codec: the one that ``--codistill-codec`` names."""

import torch

from fairseq_codistill.choices import split_codec
from fairseq_codistill.coordinator.codecs import counts, sampled, tokens
from fairseq_codistill.coordinator.codecs.codec import Codec
from fairseq_codistill.coordinator.codecs.dense import DenseCodec, Int8Codec


def make_codec(codec: str, salt: int = 0) -> Codec:
    """The codec that ``--codistill-codec`` names, such as ``fp16`` or ``tokens:16``.

    Args:
        codec: name, with ``:size`` where the codec has one.
        salt: what the sender adds to the seed of its own draws, so that no two models draw alike.

    Raises:
        ConfigError: there is no such codec, or its size is missing, impossible or not wanted.
    """
    name, size = split_codec(codec)
    if name == "columns":
        return sampled.SampledColumnsCodec(size)
    if name == "tokens":
        return tokens.SampledTokensCodec(size, salt)
    if name == "counts":
        return counts.CountsCodec(size, salt)
    if name in ("label", "vote"):
        return counts.LabelCodec() if name == "label" else counts.VoteCodec()
    if name == "topk":
        return sampled.TopKCodec(size)
    if name == "int8":
        return Int8Codec()
    code, dtype = {"fp32": (1, torch.float32), "fp16": (2, torch.float16), "bf16": (3, torch.bfloat16)}[name]
    return DenseCodec(name, code, dtype)
