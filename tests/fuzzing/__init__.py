"""Compares operations on random arguments with float64: in tests/, `python -m fuzzing --count 10000`."""
