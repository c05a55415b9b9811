"""Frozen encoders: a recipe and its weights → uint8 tiles in, embeddings out."""
