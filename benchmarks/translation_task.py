"""A small translation task in plain PyTorch: Multi30k, pieces, batches, a transformer. What leaderboard rows train.

It owns no method of training. The data set stays where it is; pieces and ids are kept in a cache folder.
"""

import gzip
import math
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor, nn

PAD, START, END = 0, 1, 2
MAX_PIECES = 48


class Pairs(torch.utils.data.Dataset):
    """Sentence pairs as ids, the longest MAX_PIECES."""

    def __init__(self, source: list[list[int]], target: list[list[int]]):
        self.source, self.target = source, target

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self.source[index], self.target[index]


def load(data: Path, cache: Path, num_pieces: int, share: int = 1) -> tuple[Pairs, Pairs, Pairs]:
    """Training pairs (every ``share``-th), validation pairs and the next after every training pair, in one vocabulary.

    It is that of the training pairs. With ``share`` 1 there are no next ones.

    Args:
        data: folder with ``{train,val}.{en,de}.gz``.
        cache: folder for the pieces.
        num_pieces: of the vocabulary.
        share: 3 keeps a third.
    """
    names = ("train.en", "train.de", "val.en", "val.de")
    texts = {name: gzip.decompress((data / f"{name}.gz").read_bytes()).decode().splitlines() for name in names}
    for name in ("train.en", "train.de"):
        texts[f"rest.{name}"] = texts[name][1::share] if share > 1 else []
        texts[name] = texts[name][::share]
    cache.mkdir(parents=True, exist_ok=True)
    prefix = cache / f"pieces_{num_pieces}_{share}"
    if not prefix.with_suffix(".model").exists():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts["train.en"] + texts["train.de"]), model_prefix=str(prefix), model_type="bpe",
            vocab_size=num_pieces, pad_id=PAD, bos_id=START, eos_id=END, unk_id=3, minloglevel=2,
        )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(prefix.with_suffix(".model")))
    ids = {name: [line[: MAX_PIECES - 1] + [END] for line in pieces.encode(lines)] for name, lines in texts.items()}
    train, valid, rest = (Pairs(ids[f"{part}.en"], ids[f"{part}.de"]) for part in ("train", "val", "rest.train"))
    return train, valid, rest


def batch_of(samples: list[tuple[list[int], list[int]]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((batch, source length), (batch, length)) padded inputs, and (rows,) targets, one a piece."""

    def padded(rows: list[list[int]], value: int) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    source = padded([source for source, _ in samples], PAD)
    previous = padded([[START, *target[:-1]] for _, target in samples], PAD)
    return (source, previous), torch.tensor([piece for _, target in samples for piece in target])


class Translator(nn.Module):
    """A transformer whose embeddings and output layer are one matrix."""

    def __init__(self, num_pieces: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(num_pieces, width, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        position = torch.arange(MAX_PIECES).unsqueeze(1) * torch.exp(
            torch.arange(0, width, 2) * (-math.log(1e4) / width)
        )
        self.register_buffer("waves", torch.cat([position.sin(), position.cos()], dim=1), persistent=False)
        self.body = nn.Transformer(
            width, max(1, width // 32), layers, layers, 2 * width, dropout, batch_first=True, norm_first=True
        )
        self.dropout = nn.Dropout(dropout)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.dropout(self.embedding(ids) * self.embedding.embedding_dim**0.5 + self.waves[: ids.size(1)])

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """(rows, num_pieces) logits, of what is not padding alone: more than half of a batch is."""
        source, previous = inputs
        padding = source == PAD
        causal = torch.ones(previous.size(1), previous.size(1), dtype=torch.bool).triu(1)
        hidden = self.body(
            self._embed(source), self._embed(previous), tgt_mask=causal,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return hidden[previous != PAD] @ self.embedding.weight.t()


@torch.no_grad()
def validation_bits(model: nn.Module, pairs: Pairs, batch_size: int = 128) -> float:
    """Cross entropy of the validation pairs, in bits a target piece."""
    was_training = model.training
    model.eval()
    total = rows = 0.0
    for start in range(0, len(pairs), batch_size):
        inputs, targets = batch_of([pairs[index] for index in range(start, min(start + batch_size, len(pairs)))])
        total += float(nn.functional.cross_entropy(model(inputs), targets, reduction="sum"))
        rows += targets.numel()
    model.train(was_training)
    return total / rows / math.log(2)
