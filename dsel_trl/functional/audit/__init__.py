"""Formulas of the audit of preference labels: statistics of a response, cross-fitted opinions, one probability."""
