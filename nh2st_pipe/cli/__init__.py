"""The command line: arguments in, one library call, its result in words (or JSON)."""
