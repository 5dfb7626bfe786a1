"""Predictions as bytes, one file a family of codecs; ``choice`` makes the one that the options name."""
