"""One file a method: the formula and its source at the top, what to sample and attach, the weight of every token."""
