"""The audit of reinforcement learning: the token weights of a policy-gradient step, as asked and as they are."""
