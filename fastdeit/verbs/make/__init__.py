"""`fastdeit data make`: data sets made from packages of pip's, npm's or Debian's registries, a file for each set."""
