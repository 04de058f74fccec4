"""Tables of settings that a user writes, in a file or as flags: what recipes, suites, comparisons and methods share.

`section` is the base of every table, and `limits` has the types of its fields. `validation` makes a table of plain
values, or refuses them in the user's words. `annotations` puts a type into words. `toml_file` reads a file and knows
the line of each field; `text_values` reads the text of a flag.
"""
