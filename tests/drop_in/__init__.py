"""Everything that PyTorch's users do with a model, tried on plain, fused and swapped ones side by side.

`models.py` has the models, and `features.py` imports the table from the files beside it. A new feature is a function
of a model and images, with its name in `@feature`; the README's table "Works with" is made of the same table.
"""
