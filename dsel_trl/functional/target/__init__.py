"""Formulas of selection by a target."""
