"""`python -m nh2st_pipe`: the command line."""

from __future__ import annotations

from nh2st_pipe.cli.entry import main

if __name__ == "__main__":
    main()
