"""Owns what a figure is worth nothing without: the machine, the versions and the commit it was measured with."""

import os
import platform
import subprocess

import torch
import zmq


def about(**more: object) -> dict[str, object]:
    """For the JSON of a benchmark: versions, processor, cores, load at this moment, commit, and ``more``."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zmq": zmq.zmq_version(),
        "kernel": platform.release(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        **more,
    }


def _commit() -> str:
    """Of the checkout this file lies in, or "unknown"."""
    folder = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
