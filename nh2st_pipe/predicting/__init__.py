"""A trained head on slides."""
