"""What the compiler makes of every Triton kernel, for cards that are not there."""
