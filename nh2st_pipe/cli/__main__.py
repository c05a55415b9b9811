"""`python -m nh2st_pipe.cli`."""

from nh2st_pipe.cli.entry import main

main()
