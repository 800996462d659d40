"""Which backend of an op is right and fastest on this very card, found out at the calls of a run."""
