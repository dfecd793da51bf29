"""The bytes that a memory budget allows, and the error of a plan that exceeds them."""

from rq_compile.errors import UserError


def allowed(memory: float, bytes_before: int) -> int:
    """``memory`` times ``bytes_before``, rounded down. A product that is below a whole number only by rounding counts as it."""
    return int(memory * bytes_before * (1 + 1e-12))


def over_budget(
    needed: int, memory: float, bytes_before: int, who: str, *, action: str = "give", alternative: str = ""
) -> UserError:
    """The error of a plan that needs ``needed`` bytes, although only ``memory`` times ``bytes_before`` are allowed."""
    excess = needed - allowed(memory, bytes_before)
    return UserError(
        f"{who} takes {needed} bytes, {excess} more than --memory {memory:g} allows; "
        f"{action} --memory {enough_for(needed, bytes_before):g} or more{alternative}"
    )


def enough_for(needed: int, bytes_before: int) -> float:
    """The least ``--memory`` with four decimals that allows ``needed`` bytes."""
    return -(-needed * 10000 // bytes_before) / 10000
