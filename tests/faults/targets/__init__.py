"""What fastdeit promises of its reliability, and the tests that hold it: the table of docs/reliability.md.

`python -m tests.faults.targets --write` writes the table anew; without `--write` it is printed.
"""
