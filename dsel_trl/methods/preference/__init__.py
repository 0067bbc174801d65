"""Methods that select by what a preference pair says."""
