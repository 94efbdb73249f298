"""`python -m fastconv` is the command `fastconv`."""

from fastconv.cli import main

main()
