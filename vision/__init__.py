"""Image classification with timm models on the coordinator, losses and schedules of ``fairseq_codistill``.

Never imports fairseq. Start at :mod:`vision.train`.
"""
