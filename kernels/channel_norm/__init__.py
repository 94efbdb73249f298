"""Layer norm over the channels of each pixel, as in ConvNeXt."""
