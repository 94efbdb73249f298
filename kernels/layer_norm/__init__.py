"""Layer norm over a whole tensor, or over each of its images."""
