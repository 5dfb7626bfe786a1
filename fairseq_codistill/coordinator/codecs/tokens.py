"""Owns the codecs that send classes by their plain ids: those drawn from the softmax."""

from torch import Tensor

from fairseq_codistill.coordinator.codecs.codec import Codec
from fairseq_codistill.coordinator.codecs.draws import draw_systematically
from fairseq_codistill.coordinator.codecs.ids import id_dtype, read_ids
from fairseq_codistill.coordinator.late import LatePayload
from fairseq_codistill.coordinator.predictions import Tokens

SENDER_STRIDE = 1_000_003


class SampledTokensCodec(Codec):
    """K classes a row, drawn systematically from the sender's softmax: 16 bits each up to 65,535 classes, else 32.

    The mean of −log p over them is an unbiased estimate of the cross entropy towards the sender, whose gradient is that
    of the KL divergence. Its variance falls at least with 1/K, and is never above that of independent draws. Draws
    depend on the seed and the sender only.

    Args:
        num_tokens: K.
        salt: added to the seed, so that no two models draw alike.
    """

    name = "tokens"
    code = 8  # 6 were independent draws

    def __init__(self, num_tokens: int, salt: int = 0):
        self.num_tokens = num_tokens
        self.salt = salt

    def num_bytes(self, num_rows: int, num_classes: int) -> int:
        return num_rows * self.num_tokens * id_dtype(num_classes).itemsize

    def encode(self, predictions: Tensor, seed: int, targets: Tensor | None = None) -> memoryview | LatePayload:
        classes = draw_systematically(predictions, self.num_tokens, seed + SENDER_STRIDE * self.salt)
        return self.payload(classes.to(id_dtype(predictions.size(1))))

    def decode(
        self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int = 0, targets: Tensor | None = None
    ) -> Tokens:
        self.check_length(payload, num_rows, num_classes)
        return Tokens(read_ids(payload, num_rows, self.num_tokens, num_classes))
