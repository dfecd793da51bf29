"""What a pass may rely on and what it promises, checked on every run."""


class ContractError(RuntimeError):
    """A pass was given a graph it does not accept, or left one it promised not to: a fault of rq-compile, not of the user."""


def requires(pass_name: str, condition: bool, what: str) -> None:
    """Raise ContractError, addressed to whoever runs ``pass_name``, unless ``condition`` holds."""
    if not condition:
        raise ContractError(f"pass {pass_name} requires {what}: run the passes in the order of rewrite.rewrite")


def ensures(pass_name: str, condition: bool, what: str) -> None:
    """Raise ContractError, addressed to the author of ``pass_name``, unless ``condition`` holds."""
    if not condition:
        raise ContractError(f"pass {pass_name} promises {what}, but its output breaks that: correct the pass")
