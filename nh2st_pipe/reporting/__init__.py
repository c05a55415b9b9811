"""One self-contained page on a finished run."""
