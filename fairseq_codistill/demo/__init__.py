"""Owns the embedded demonstration: its corpus. Training code must never depend on this folder."""
