"""The preconditions and postconditions of passes, checked on every run."""


class ContractError(RuntimeError):
    """A pass got a graph that violates its preconditions, or broke its postconditions: an error of rq-compile, not of the
    user."""


def requires(pass_name: str, condition: bool, what: str) -> None:
    """Raise ContractError, for the caller of ``pass_name``, unless ``condition`` holds."""
    if not condition:
        raise ContractError(f"pass {pass_name} requires {what}: run the passes in the order of rewrite.rewrite")


def ensures(pass_name: str, condition: bool, what: str) -> None:
    """Raise ContractError, for the author of ``pass_name``, unless ``condition`` holds."""
    if not condition:
        raise ContractError(f"pass {pass_name} promises {what}, but its output breaks that: correct the pass")
