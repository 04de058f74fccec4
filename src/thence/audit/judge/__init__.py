"""From token weights to words: the objective that they amount to, the faults, and one verdict over all cases."""
