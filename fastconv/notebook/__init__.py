"""The notebook that `fastconv notebook` writes: its source, and the conversion into Jupyter's format."""
