"""``python -m wina``: the command line, for the interpreter that runs it."""

from wina.cli import main

main()
