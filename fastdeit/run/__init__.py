"""A run: its parts built from a recipe, its record on the disk and on the terminal, its evaluation."""
