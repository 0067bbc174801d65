"""Serving a plan: order, history, resume."""
