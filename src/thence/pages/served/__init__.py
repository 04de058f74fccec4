"""Pages in a browser of this machine, as they grow."""
