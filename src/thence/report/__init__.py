"""What a run did, from the files in its folder: a page, a table for the terminal, and the numbers as JSON and CSV."""
