"""The coordinator: which batch is this, is an exchange due, and what did the peers predict for it.

Framework-neutral: it imports torch and zmq, never fairseq or timm. Tensors and keys in, tensors out. Start at
:class:`~fairseq_codistill.coordinator.coordinator.Coordinator`; importing this package alone imports nothing.
"""
