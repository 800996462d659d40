"""Linear layers whose products multiply numbers of 8 bits."""
