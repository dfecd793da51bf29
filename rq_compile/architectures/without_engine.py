"""Model types that open and can be calibrated, but whose graph no engine can have.

Exporting such a model ends with a sentence, but only after it was traced. This table says so before any work.
``tests/architectures/test_model_types.py`` exports each of them.
"""

from rq_compile.architectures.model import Model
from rq_compile.errors import UserError

WITHOUT_ENGINE = {
    "deepseek_v4": "its cache compresses windows of tokens",
    "inkling_text": "the shapes of its traced graph contradict each other",
    "qwen4_exp": "its indexer loops over the tokens",
    "qwen4_exp_text": "its indexer loops over the tokens",
    "unlimited_ocr": "its attention forgets answers but not the prompt, and a graph does not know where the prompt ends",
}


def why_no_engine(model: Model) -> str | None:
    """A sentence if no engine can be made of ``model``."""
    why = WITHOUT_ENGINE.get(model.model_type)
    return f"no engine can be made of a {model.model_type}: {why}" if why else None


def remarks_without_engine(model: Model) -> list[str]:
    """What to know before a calibration: a sentence if no engine can be made of ``model``; otherwise empty."""
    why = why_no_engine(model)
    return [f"{why}; a plan can still place its experts on a cluster (rq-compile package --for vllm)"] if why else []


def check_engine(model: Model) -> None:
    """
    Raises:
        UserError: no engine can be made of ``model``.
    """
    if why := why_no_engine(model):
        raise UserError(f"{model.path}: {why}; use a family of docs/families.md")
