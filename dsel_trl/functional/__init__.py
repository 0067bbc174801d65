"""Pure functions: the formulas of every method, on tensors or arrays, without trainer or state."""
