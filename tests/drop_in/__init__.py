"""What users of PyTorch do with a model, tried on plain, fused and swapped ones side by side.

`models.py` has the models. A new feature is a function of a model and images, with its name in `@feature`, in the
file of its area; the README's table "Works with" shows it after `python -m bench.tools.readme`.
"""
