"""A generator of bad inputs: recipes, flags, data files and thence's own files, damaged from a seed.

`python -m tests.bad_inputs --cases 2000 --seed 0 --out FILE` runs a campaign; :mod:`harness` holds what must be true.
"""
