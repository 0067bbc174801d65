"""By what an example's gradient, or the error that it comes from, says of it."""
