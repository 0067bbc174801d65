"""Formulas of methods that follow what an example's gradient says."""
