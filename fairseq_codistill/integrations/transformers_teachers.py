"""Owns reading a saved Hugging Face model as a teacher: the folder says which architecture it is."""

from torch import nn

from fairseq_codistill.config import ConfigError


def load_teacher(folder: str) -> nn.Module:
    """The model that ``save_pretrained`` or a trainer left in a folder, on the CPU.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    import transformers

    try:
        names = transformers.AutoConfig.from_pretrained(folder).architectures or ["AutoModel"]
        found: nn.Module = getattr(transformers, names[0]).from_pretrained(folder)
        # Not what it was saved in: where this model trains in float32 its inputs are. Quantised ones cannot be changed.
        return found if getattr(found, "is_quantized", False) else found.float()
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise ConfigError(f"--codistill-teacher is {folder!r}, which is no saved model: {reason}") from error
