"""Formulas of selection by what a preference pair says."""
