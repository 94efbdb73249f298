"""`python -m fastconv` is the command `fastconv`."""

from fastconv.commands.main import main

# Worker processes import this module, too.
if __name__ == "__main__":
    main()
