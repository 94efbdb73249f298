"""The lecture's whole block as one operator."""
