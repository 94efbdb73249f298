"""The public operations, their implementations, and which of them runs."""
