"""Bad inputs by name, each with the message that it gets: `python -m tests.error_cases` writes docs/errors.md."""
