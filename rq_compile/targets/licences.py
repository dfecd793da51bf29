"""A checkpoint's licence: the texts in its folder, and the one that its model card declares."""

from pathlib import Path

import yaml

NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")


def licence_texts(checkpoint: Path) -> list[Path]:
    """The files in ``checkpoint`` that must be passed on together with the weights, sorted by name."""
    return sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name.upper().startswith(NAMES))


def declared_licence(checkpoint: Path) -> str | None:
    """``license`` from the front matter of README.md, as written there, or its ``license_name`` if that is "other".

    None if there is no README, no front matter, or no licence in it. Undeclared licences are not guessed.
    """
    card = checkpoint / "README.md"
    if not card.is_file():
        return None
    before, fence, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    front_matter, end, _ = rest.partition("\n---")
    if before.strip("\ufeff \n") or not fence or not end:
        return None
    try:
        declared = yaml.safe_load(front_matter)
    except yaml.YAMLError:
        return None
    licence = declared.get("license") if isinstance(declared, dict) else None
    if licence == "other":
        licence = declared.get("license_name", licence)
    return licence if isinstance(licence, str) else None
