"""The page and the terminal's tables of a comparison."""
