"""The claims of the DeiT paper: which of them are tested, and experiments on small data for those that are
statistical.

`claims.py` lists the claims, `table.py` the experiments, `runner.py` trains one. `page.py` and `picture.py` say what
came of it. Tables are free of torch, so that they are listed at once.
"""
