"""Structured pruning of the graph: what hangs together, what matters, how much goes, and the repair."""
