"""Where samples come from: one reader a kind of data set."""
