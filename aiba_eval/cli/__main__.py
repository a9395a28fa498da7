"""``python -m aiba_eval.cli``: the command line in an environment that has no script of it."""

from aiba_eval.cli import main

main()
