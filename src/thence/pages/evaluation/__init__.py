"""The page and the terminal's tables of an evaluation."""
