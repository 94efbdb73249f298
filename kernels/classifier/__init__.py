"""The lecture's classifier: a whole step of its training, and its evaluation of a batch, as a list of launches."""
