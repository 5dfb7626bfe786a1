"""Divergences as plain functions, and the loss of a batch computed with its gradient, a few rows at a time."""
