"""By a target: what resembles a set of examples, serves it, or goes with what is trusted."""
