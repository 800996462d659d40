"""Data: what happens to which sample (`plan`), where samples come from (`sources`), who does the work (`execute`), and
the stream of batches (`loader`). Torch and DALI are needed for the last two alone."""
