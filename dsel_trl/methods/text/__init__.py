"""Methods that select by the text."""
