"""Recipes: YAML files, their sections, and how names and overrides become one typed recipe."""
