"""What a step lets us see and touch."""
