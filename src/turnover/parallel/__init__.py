"""Computations by this process or by Ray."""
