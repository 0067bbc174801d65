"""Formulas of selection by the loss."""
