"""Tools of those who work on fastconv: they make budgets, tables of the README, and visits to a GPU."""
