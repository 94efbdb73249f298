"""Convolutions of patches that do not overlap: the stem, on bytes, and the downsampling, of normalised maps."""
