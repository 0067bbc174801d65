"""Methods that order examples or form batches by length."""
