"""`python -m jaxmed.prep`: raw scans become shards. Nothing imports this package.

Reading half: `discover`, `scan` and below. Writing half: `recipes`, `convert`, `pool`, `run`, `__main__`.
"""
