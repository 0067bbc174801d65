"""By what an example says: quality, diversity, duplicates, likeness to a target."""
