"""Whorl: the reference laboratory for reinforcement learning on reasoning models."""

__version__ = "0.1.0"
