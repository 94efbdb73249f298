"""Runs beside each other: a table, a file for spreadsheets, and pictures."""
