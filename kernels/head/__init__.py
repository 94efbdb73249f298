"""The classifier's head: average pool, linear map, softmax, cross entropy, and all their gradients."""
