"""What verbs of the command line do that have no room of their own: `data`, `doctor`."""
