"""What moves messages between ranks of the same number, one file a way; ``choice`` makes the one the options name."""
