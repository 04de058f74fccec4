"""From token weights to words: the objective that they give, the faults, and one verdict over all cases."""
