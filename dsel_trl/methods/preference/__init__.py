"""For preference pairs: which of them to train on, how much each counts, and by which loss."""
