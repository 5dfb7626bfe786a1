"""Kept for tools that look for it; every setting is in pyproject.toml."""

from setuptools import setup

setup()
