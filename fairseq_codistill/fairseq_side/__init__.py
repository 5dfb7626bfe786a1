"""What fairseq needs and nothing else does: its batches, its versions, its checkpoints."""
