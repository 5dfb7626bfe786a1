"""The coordinator: which batch is this, is an exchange due, and what did the peers predict for it.

Framework-neutral: it imports torch and zmq, never fairseq or timm. Tensors and keys in, tensors out.
"""

from fairseq_codistill.coordinator.coordinator import AlignmentError, Coordinator
from fairseq_codistill.coordinator.exchange import Exchange
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder, fingerprint, parameters_digest

__all__ = [
    "AlignmentError",
    "BatchKey",
    "Coordinator",
    "DataOrder",
    "Exchange",
    "Identity",
    "fingerprint",
    "parameters_digest",
]
