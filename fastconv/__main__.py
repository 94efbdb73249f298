"""`python -m fastconv` is the command `fastconv`."""

from fastconv.commands.main import main

main()
