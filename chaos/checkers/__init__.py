"""Checkers of histories: what clients saw, held against what a single correct object would have shown them.

Role: pure, and independent of ftray: the simulator, the chaos harness and users' own programs hand in a history, and
get a verdict with reasons.
"""
