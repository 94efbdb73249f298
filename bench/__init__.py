"""Benchmarks, run from the root of the repository; see NOTES.md for what they taught."""
