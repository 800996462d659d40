"""What feeds the training of others, for `fastdeit bench data`: each peer is in a file of its own, as a function of a
`Setting` to a `Side`."""
