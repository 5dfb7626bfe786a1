"""Owns the embedded demonstration: its corpus and its report. Training code must never depend on this folder."""
