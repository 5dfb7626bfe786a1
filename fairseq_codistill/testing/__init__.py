"""What tests and notebooks need in place of other processes: scripted peers with faults, and whole simulated runs."""

from fairseq_codistill.testing.scripted import Fault, Script, ScriptedPeer, ScriptedTransport
from fairseq_codistill.testing.simulation import Simulation, simulate

__all__ = ["Fault", "Script", "ScriptedPeer", "ScriptedTransport", "Simulation", "simulate"]
