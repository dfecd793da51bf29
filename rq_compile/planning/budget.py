"""Bytes: what a memory budget allows, and the error that says by how much it is missed."""

from rq_compile.errors import UserError


def allowed(memory: float, bytes_before: int) -> int:
    """Whole bytes of ``memory`` times ``bytes_before``; a product that only rounding keeps below a whole number counts as it."""
    return int(memory * bytes_before * (1 + 1e-12))


def over_budget(needed: int, memory: float, bytes_before: int, who: str, way_out: str = "") -> UserError:
    """The error of a plan that needs ``needed`` bytes where ``memory`` times ``bytes_before`` are allowed."""
    excess = needed - allowed(memory, bytes_before)
    enough = -(-needed * 10000 // bytes_before) / 10000
    return UserError(
        f"{who} takes {needed} bytes, {excess} more than --memory {memory:g} allows; give --memory {enough:g} or more{way_out}"
    )
