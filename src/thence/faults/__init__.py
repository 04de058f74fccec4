"""Faults that can be switched on: the paper's two and their relatives, as wrappers of thence's own step."""
