"""Measurements: never part of the tests, always with equal outputs and ratios taken in one run."""
