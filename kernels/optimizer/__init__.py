"""What ends a step: the sum of all partial gradients, AdamW over flat vectors, and the counts of a batch."""
