"""Statistics, and nothing else of thence: proportions, means, pairs, resampling, many tests at once."""
