"""Methods that select by the loss."""
