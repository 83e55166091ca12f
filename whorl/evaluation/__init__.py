"""pass@k and avg@k with intervals, and evaluation of a policy on held-out problems."""
