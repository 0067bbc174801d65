"""By what an example's gradient does to the loss of a target."""
