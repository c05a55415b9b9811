"""The cache between the stages. Its format is in stages/embed/STORE.md."""
