"""`python -m nh2st_pipe.cli`."""

from nh2st_pipe.cli.app import main

main()
