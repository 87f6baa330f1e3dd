"""Answers every request: one micro-batch as a pure step, and the loop that commits it."""
