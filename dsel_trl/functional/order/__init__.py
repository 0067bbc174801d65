"""Formulas of curricula and of batches by length."""
