"""What `fastdeit.run.build` gives: one kind of part of a run in each file."""
