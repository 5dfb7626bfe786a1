"""Owns the vote: of what all models find most likely, the class that most of them say."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fairseq_codistill.coordinator.predictions import PeerPredictions, Tokens


def elect(own: Tensor, model_index: int, answers: Mapping[int, PeerPredictions]) -> Tokens:
    """:func:`majority` of what peers sent with the codec ``vote``.

    Raises:
        ValueError: one sent something else than labels.
    """
    labels = {model: said for model, said in answers.items() if isinstance(said, Tokens)}
    if len(labels) != len(answers):
        raise ValueError("a vote needs labels of all peers")
    return majority(own, model_index, labels)


def majority(own: Tensor, model_index: int, labels: Mapping[int, Tokens]) -> Tokens:
    """One class a row. Of classes with equally many votes it is the one that the model of the lowest index says.

    Where all models heard all others, all of them find the same.

    Args:
        own: (num_rows, num_classes) logits of this model, or (num_rows,) int64, its classes.
        model_index: of this model.
        labels: model -> (num_rows, 1) what it says; a marked row has no vote there.

    Returns:
        (num_rows, 1) classes; a row in which none of the peers has a vote is marked.

    >>> labels = {0: Tokens(torch.tensor([[5], [2], [-1]])), 2: Tokens(torch.tensor([[5], [3], [-1]]))}
    >>> majority(torch.tensor([1, 3, 4]), 1, labels).classes.tolist()
    [[5], [3], [-1]]
    """
    mine = own.argmax(dim=1) if own.dim() == 2 else own
    votes = {model: said.classes[:, 0].to(mine.device) for model, said in labels.items()}
    ballot = torch.stack([vote for _, vote in sorted({**votes, model_index: mine}.items())], dim=1)  # (R, n)
    num_alike = (ballot.unsqueeze(1) == ballot.unsqueeze(2)).sum(dim=1)  # (R, n) how many say what each says
    num_alike = num_alike.masked_fill(ballot < 0, 0)
    winner = ballot.gather(1, num_alike.argmax(dim=1, keepdim=True))  # argmax: the first of equals
    heard = torch.stack(list(votes.values()), dim=1).ge(0).any(dim=1, keepdim=True)
    return Tokens(torch.where(heard, winner, -1))
