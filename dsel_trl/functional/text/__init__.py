"""Formulas of selection by the text."""
