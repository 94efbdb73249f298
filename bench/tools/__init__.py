"""Tools for those who work on fastconv: kernel budgets, the README's tables, and visits to a GPU."""
