"""Many training runs: every combination of some options, done by worker processes."""
