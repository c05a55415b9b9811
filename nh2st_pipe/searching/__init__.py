"""Tiles and slides found by how they look, and by what is predicted there."""
