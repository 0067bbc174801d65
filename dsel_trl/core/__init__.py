"""What a method and a run are."""
