"""By length or difficulty: in which order examples come, and in which batches."""
