"""``python -m rq_compile``: the command line."""

from rq_compile.cli.main import run

run()
