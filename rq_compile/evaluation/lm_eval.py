"""lm-evaluation-harness for engines: ``python -m rq_compile.evaluation.lm_eval`` is ``lm-eval`` with ``--model rq_compile``.

It accepts the harness's own commands and options: --model rq_compile --model_args engine=model.onnx --tasks arc_easy,wikitext.
"""

import sys

from rq_compile.errors import UserError

NAME = "rq_compile"


def register() -> None:
    """Register ``rq_compile`` with the harness, for programs that call its ``simple_evaluate`` themselves.

    Raises:
        UserError: the harness is not installed.
    """
    try:
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise UserError('lm-evaluation-harness is not installed; run pip install "rq-compile[lm-eval]"', 2) from error
    if NAME not in model_registry:  # the harness refuses the name once it has loaded the class
        model_registry.register(NAME, target="rq_compile.evaluation.harness:EngineLM")


def main() -> None:
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
