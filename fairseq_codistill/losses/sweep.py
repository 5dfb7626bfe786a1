"""Owns the pass over the rows behind ``chunked``: a chunk goes through all of the loss while it lies in the cache.

Computes values and gradients side by side, without autograd; knows of no peers that are late, weights or schedules.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_codistill.coordinator.predictions import Columns, PeerPredictions, Steps, Tokens, TopK, moved
from fairseq_codistill.losses.distillation import peer_divergence
from fairseq_codistill.losses.divergences import finite_rows
from fairseq_codistill.losses.generalised import Divergence

# Logits of a chunk. On a CPU it should stay in the cache; an accelerator wants few, large kernels.
CHUNK_ELEMENTS_CPU = 2**20
CHUNK_ELEMENTS = 2**24


def may_ask(values: Tensor) -> bool:
    """Whether a value may be looked at: on an accelerator the step would stand still until it is known."""
    return values.device.type == "cpu"


class Sweep:
    """One pass over the rows. (R, C) below is the shape of a chunk."""

    def __init__(
        self,
        logits: Tensor,
        peers: Sequence[PeerPredictions],
        divergence: Divergence,
        weight: float,
        target: Tensor | None,
        epsilon: float,
        num_rows: int,
        peer_weights: Sequence[float] | None = None,
    ):
        self.logits, self.peers, self.target = logits, peers, target
        self.form, self.divergence = divergence, divergence.name
        self.num_rows, self.num_classes = num_rows, logits.size(1)
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        elements = CHUNK_ELEMENTS_CPU if logits.device.type == "cpu" else CHUNK_ELEMENTS
        self.chunk_rows = min(max(1, elements // max(self.num_classes, 1)), max(num_rows, 1))
        self.smoothing = epsilon / (self.num_classes - 1) if epsilon else 0.0  # for every class
        self.confidence = 1.0 - epsilon - self.smoothing  # for the target beside that
        self.shares = [weight / max(len(peers), 1) * share for share in peer_weights or [1.0] * len(peers)]
        # Coefficient of the softmax in the gradient: it sums to 1 over the classes, as what it is compared with does.
        self.of_softmax = 0.0 if target is None else self.confidence + self.smoothing * self.num_classes
        self.of_softmax += sum(
            share for share, peer in zip(self.shares, peers, strict=True) if self._shares_softmax(peer)
        )
        dense = divergence.is_plain and any(isinstance(peer, (Tensor, Steps)) for peer in peers)
        shape = (self.chunk_rows if dense else 0, self.num_classes)
        self.workspace = [logits.new_empty(shape, dtype=self.dtype) for _ in range(2)]
        self.divergences = logits.new_zeros(len(peers), dtype=self.dtype)
        self.nll, self.smooth = logits.new_zeros(2, dtype=self.dtype).unbind()
        self.num_agreeing = logits.new_zeros((), dtype=torch.float32)
        self.num_compared: int | Tensor = 0
        self.num_nonfinite: int | Tensor = 0
        self.may_ask = may_ask(logits)

    def run(self, rows: Tensor | None) -> Tensor:
        """(num_positions, C) the gradient with respect to all logits, 0 at positions that are not among the rows."""
        total = torch.empty_like(self.logits, dtype=self.dtype, memory_format=torch.contiguous_format)
        if rows is not None:
            others = torch.ones(total.size(0), dtype=torch.uint8, device=total.device).index_fill_(0, rows, 0)
            total.index_fill_(0, others.argsort(descending=True)[: total.size(0) - rows.size(0)], 0.0)
            # Made once: the kernel clears the pages of every new buffer, which costs as much as the arithmetic.
            gathered = [total.new_empty(self.chunk_rows, self.num_classes) for _ in range(2)]
        for start in range(0, self.num_rows, self.chunk_rows):
            chunk = slice(start, min(start + self.chunk_rows, self.num_rows))
            if rows is None:
                self._chunk(chunk, self.logits[chunk].to(self.dtype), total[chunk])
            else:
                mine, gradient = (work[: chunk.stop - start] for work in gathered)
                if self.logits.dtype == self.dtype:
                    torch.index_select(self.logits, 0, rows[chunk], out=mine)
                else:
                    mine.copy_(self.logits.index_select(0, rows[chunk]))
                self._chunk(chunk, mine, gradient)
                total.index_copy_(0, rows[chunk], gradient)
        return total

    def _chunk(self, chunk: slice, mine: Tensor, gradient: Tensor) -> None:
        """Adds the rows' figures, and fills in their (R, C) gradient."""
        largest, log_norm = _largest_class(mine), mine.new_empty(0)
        if self.target is None and self.divergence == "mse":
            gradient.zero_()
        else:
            torch.softmax(mine, dim=1, out=gradient)
            log_norm = _log_norm(mine, gradient, largest)
            gradient.mul_(self.of_softmax)
        if self.target is not None:
            self._supervise(mine, log_norm, self.target[chunk].unsqueeze(1), gradient)
        for index, peer in enumerate(self.peers):
            theirs = _part(peer, chunk, mine)
            peer_largest: Tensor | None = None
            finite: Tensor | None
            share = self.shares[index]
            if isinstance(theirs, TopK) or not self.form.is_plain:
                peer_largest, finite = self._known_largest(theirs)
                self.divergences[index] += self._by_autograd(mine, theirs, finite, gradient, share)
            elif isinstance(theirs, Tensor):
                peer_largest = _largest_class(theirs)
                divergences, finite = self._dense(mine, log_norm, theirs, peer_largest, gradient, share)
                self.divergences[index] += divergences.sum()
            else:
                divergences, finite = self._sampled(mine, log_norm, theirs, gradient, share)
                self.divergences[index] += divergences.sum()
            left_out = None if finite is None or (self.may_ask and bool(finite.all())) else ~finite
            if left_out is not None and self._shares_softmax(theirs):  # take their share of the softmax out
                if self.may_ask:
                    gradient[left_out] -= share * torch.softmax(mine[left_out], dim=1)
                else:
                    gradient.sub_(torch.softmax(mine, dim=1).mul_(share).masked_fill_(~left_out.unsqueeze(1), 0.0))
            self._count(largest, peer_largest, left_out)

    def _supervise(self, mine: Tensor, log_norm: Tensor, target: Tensor, gradient: Tensor) -> None:
        """Cross entropy towards (R, 1) targets, smoothed; its softmax is in the gradient already."""
        self.nll += (log_norm - mine.gather(1, target).squeeze(1)).sum()
        if self.smoothing:
            self.smooth += (self.num_classes * log_norm - mine.sum(dim=1)).sum()
            gradient.sub_(self.smoothing)
        gradient.scatter_add_(1, target, torch.full_like(target, -self.confidence, dtype=self.dtype))

    def _dense(
        self, mine: Tensor, log_norm: Tensor, theirs: Tensor, peer_largest: Tensor, gradient: Tensor, share: float
    ) -> tuple[Tensor, Tensor | None]:
        """Adds a peer's part of the gradient that is not softmax.

        Returns:
            (R,) its divergences, 0 for rows left out; (R,) bool, the rows that are not, or None for all.
        """
        difference, peer_softmax = (work[: mine.size(0)] for work in self.workspace)
        if self.divergence == "mse":
            torch.sub(mine, theirs, out=difference)
            divergences = torch.linalg.vector_norm(difference, dim=1).square_().div_(self.num_classes)
            term, factor = difference, 2 * share / self.num_classes
        else:
            torch.softmax(theirs, dim=1, out=peer_softmax)
            peer_log_norm = _log_norm(theirs, peer_softmax, peer_largest)
            torch.sub(theirs, mine, out=difference).mul_(peer_softmax)
            divergences = difference.sum(dim=1).sub_(peer_log_norm).add_(log_norm)
            term, factor = peer_softmax, -share
        finite = None
        if not self.may_ask or not bool(
            torch.isfinite(divergences).all()
        ):  # so it is whenever one of the peer's logits is not finite
            finite = finite_rows(theirs)
            divergences.masked_fill_(~finite, 0.0)
            term.masked_fill_(~finite.unsqueeze(1), 0.0)
        gradient.add_(term, alpha=factor)
        return divergences, finite

    def _sampled(
        self, mine: Tensor, log_norm: Tensor, theirs: Columns | Tokens, gradient: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`_dense`, for what speaks of some classes only."""
        finite = theirs.finite_rows()
        if isinstance(theirs, Tokens):
            classes = theirs.classes.clamp(min=0)  # -1 marks a row that is left out
            divergences = log_norm - mine.gather(1, classes).mean(dim=1)
            slope = finite.to(self.dtype).mul_(-share / classes.size(1)).unsqueeze(1).expand_as(classes)
        else:
            classes = theirs.classes.expand(mine.size(0), -1)
            difference = mine.gather(1, classes).sub_(theirs.values).masked_fill_(~finite.unsqueeze(1), 0.0)
            divergences = difference.square().mean(dim=1)
            slope = difference.mul_(2 * share / classes.size(1))
        gradient.scatter_add_(1, classes, slope)
        return divergences.masked_fill_(~finite, 0.0), finite

    def _by_autograd(
        self, mine: Tensor, theirs: PeerPredictions, finite: Tensor, gradient: Tensor, share: float
    ) -> Tensor:
        """() divergence of the chunk by plain autograd over it, for what does not share the softmax of the others."""
        kept: PeerPredictions = theirs
        is_whole = True  # a row that is as ours is has no divergence, where ours is finite
        if not self.may_ask and isinstance(theirs, Tensor):
            chosen = torch.where(finite.unsqueeze(1), mine, 0.0)
            kept = torch.where(finite.unsqueeze(1), theirs, chosen)
        elif not self.may_ask and isinstance(theirs, TopK) and self.form.is_plain:
            chosen = torch.where(finite.unsqueeze(1), mine, 0.0)
            values = torch.where(finite.unsqueeze(1), theirs.values, chosen.gather(1, theirs.classes))
            kept = TopK(values, theirs.classes, torch.where(finite, theirs.log_norm, torch.logsumexp(chosen, dim=1)))
        else:
            is_whole, chosen = False, mine[finite]
            kept = theirs[finite] if isinstance(theirs, Tensor) else theirs.select(finite)
        with torch.enable_grad():
            leaf = chosen.detach().requires_grad_()
            value = peer_divergence(leaf, kept, self.form)
            (slope,) = torch.autograd.grad(value, leaf)
        if is_whole:
            gradient.add_(slope.masked_fill_(~finite.unsqueeze(1), 0.0), alpha=share)
        else:
            gradient[finite] += share * slope
        return value.detach()

    def _shares_softmax(self, peer: PeerPredictions) -> bool:
        """Whether its part of the gradient has the softmax at temperature 1 in it."""
        return self.form.is_plain and self.divergence == "kl" and not isinstance(peer, TopK)

    def _known_largest(self, theirs: PeerPredictions) -> tuple[Tensor | None, Tensor]:
        """(R,) the peer's most likely class, where it is known; (R,) bool, the rows that can be distilled from."""
        if isinstance(theirs, Tensor):
            return _largest_class(theirs), finite_rows(theirs)
        return (theirs.classes[:, 0] if isinstance(theirs, TopK) else None), theirs.finite_rows()

    def _count(self, largest: Tensor, peer_largest: Tensor | None, left_out: Tensor | None) -> None:
        num_left_out: int | Tensor = 0
        if left_out is not None:
            num_left_out = int(left_out.sum()) if self.may_ask else left_out.sum()
        self.num_nonfinite = self.num_nonfinite + num_left_out
        if peer_largest is not None:
            agreeing = largest == peer_largest
            self.num_agreeing += (agreeing if left_out is None else agreeing & ~left_out).sum()
            self.num_compared = self.num_compared + largest.size(0) - num_left_out


def _largest_class(logits: Tensor) -> Tensor:
    """(R,) int64, the first class with the largest of (R, C) logits; a NaN counts as the largest."""
    if logits.device.type == "cpu":  # numpy's is vectorised, and several times as fast as torch's
        return torch.from_numpy(logits.numpy().argmax(axis=1))
    return logits.argmax(dim=1)


def _log_norm(logits: Tensor, softmax: Tensor, largest: Tensor) -> Tensor:
    """(R,) logsumexp of (R, C) logits, from their softmax and largest class; torch's own takes one more pass."""
    largest = largest.unsqueeze(1)
    return (logits.gather(1, largest) - softmax.gather(1, largest).log()).squeeze(1)


def _part(peer: PeerPredictions, chunk: slice, like: Tensor) -> Tensor | Columns | Tokens | TopK:
    if isinstance(peer, Tensor):
        return moved(peer[chunk].detach(), like.device).to(like.dtype)  # travels in the dtype in which it came
    part = peer.select(chunk).to(like.device)
    return part.logits().to(like.dtype) if isinstance(part, Steps) else part
