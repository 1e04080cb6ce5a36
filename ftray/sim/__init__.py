"""The deterministic simulator: heads and clients of a cluster in virtual time, with faults drawn from a seed.

What runs in it is the production code; see `world.py` for what is simulated, and docs/simulation.md for how to use it.
"""
