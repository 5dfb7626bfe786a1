"""Owns which divergence fits what a peer sent, as a plain function of whole tensors; ``chunked`` is held against it."""

from torch import Tensor

from fairseq_codistill.coordinator.predictions import Columns, PeerPredictions, Steps, Tokens, TopK
from fairseq_codistill.losses import divergences
from fairseq_codistill.losses.generalised import Divergence, dense_divergence, drawn_divergence, top_k_divergence


def peer_divergence(predictions: Tensor, peer: PeerPredictions, divergence: str | Divergence) -> Tensor:
    """The divergence from one peer as a plain function of whole tensors, in the form that fits what travelled.

    Args:
        predictions: (num_rows, num_classes) logits of this model.
        peer: what the peer sent for the same rows, on the same device.
        divergence: which one; a name alone is at temperature 1.

    Returns:
        () float32, summed over rows.

    Raises:
        ValueError: what travelled does not determine that divergence.
    """
    form = Divergence(divergence) if isinstance(divergence, str) else divergence
    divergence = form.name
    if isinstance(peer, Steps):
        peer = peer.logits()
    if not form.is_plain:
        if isinstance(peer, Tensor):
            return dense_divergence(predictions, peer, form)
        if isinstance(peer, TopK):
            return top_k_divergence(predictions, peer.values, peer.classes, peer.log_norm, form)
        if isinstance(peer, Tokens) and divergence == "kl":
            return drawn_divergence(predictions, peer.classes, form)
        raise ValueError(f"{type(peer).__name__} does not determine the divergence {divergence!r}")
    if isinstance(peer, Tensor):
        return divergences.DIVERGENCE_FUNCTIONS[divergence](predictions, peer)
    if isinstance(peer, Columns) and divergence == "mse":
        return divergences.sampled_columns_divergence(predictions, peer.values, peer.classes)
    if isinstance(peer, Tokens) and divergence == "kl":
        return divergences.sampled_tokens_divergence(predictions, peer.classes)
    if isinstance(peer, TopK) and divergence == "mse":
        return divergences.top_k_squared_divergence(predictions, peer.values, peer.classes)
    if isinstance(peer, TopK) and divergence == "kl":
        return divergences.top_k_kl_divergence(predictions, peer.values, peer.classes, peer.log_norm)
    raise ValueError(f"{type(peer).__name__} does not determine the divergence {divergence!r}")
