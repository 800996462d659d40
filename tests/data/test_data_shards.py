"""Several files are listed at a time, and nothing of it shows."""

import threading

import pytest

from fastdeit.data.shards import scanned

PATHS = [f"train-{number:04d}.tar" for number in range(8)]


def test_files_are_read_together_and_come_in_their_order():
    last_is_done = threading.Event()

    def scan(path, skipped):
        if path == PATHS[0] and not last_is_done.wait(20):
            raise TimeoutError
        yield path, 1
        skipped.append((path, "the tail is cut"))
        yield path, 2
        if path == PATHS[-1]:
            last_is_done.set()

    found = list(scanned(PATHS, scan))
    assert found == [([(path, 1), (path, 2)], [(path, "the tail is cut")]) for path in PATHS]


def test_an_error_of_the_program_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(scanned(PATHS, lambda path, skipped: [1 // 0]))
