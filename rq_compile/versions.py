"""Documents outlive the program that wrote them, so every file states the version of its schema.

The rule: ``schema_version`` is increased with the first change of a document's JSON schema after a release (a key, a type, a
meaning), once for all changes of the next release. Tighter bounds that all files written so far satisfy are not a change. A
reader reads its own version and all earlier ones: ``upgrades`` holds a function for each step, and none if a version can no
longer be read. A newer version is refused, because its keys are unknown. ``tests/frozen`` has a file of every version, and the
hash of every schema.

To change a schema: increase ``schema_version``, add the step to ``upgrades``, freeze an example of the new version, and rewrite
the schemas and their hashes (``make schema``, ``make frozen``).
"""

from collections.abc import Callable
from typing import Any, ClassVar, get_args

from pydantic import model_validator

from rq_compile.files import Document

Upgrade = Callable[[dict[str, Any]], dict[str, Any]]


class Versioned(Document):
    """A document with a ``schema_version: Literal[n] = n``.

    ``upgrades[n]`` turns the content of a file of version n into that of version n + 1; it may change the dictionary in place.
    Documents inside others (a plan in a manifest) have their own versions and are upgraded separately.
    """

    upgrades: ClassVar[dict[int, Upgrade]] = {}

    @classmethod
    def current_version(cls) -> int:
        return int(get_args(cls.model_fields["schema_version"].annotation)[0])

    @model_validator(mode="before")
    @classmethod
    def upgraded(cls, content: Any) -> Any:
        current = cls.current_version()
        # A document without a version is being made, or is older than versions.
        version = content.get("schema_version", current) if isinstance(content, dict) else current
        another = (
            isinstance(content, dict)
            and content.get("kind", cls.model_fields["kind"].default) != cls.model_fields["kind"].default
        )
        if another or not isinstance(version, int) or version == current:
            return content
        if version > current:
            raise ValueError(
                f"schema version {version} is that of a newer rq-compile, and this one reads versions up to {current}; "
                f"update rq-compile, or write it again with this one"
            )
        content = dict(content)
        for step in range(version, current):
            if step not in cls.upgrades:
                raise ValueError(f"schema version {version} can no longer be read")
            content = cls.upgrades[step](content) | {"schema_version": step + 1}
        return content


def same_keys(content: dict[str, Any]) -> dict[str, Any]:
    """The step to a version whose new keys all have defaults."""
    return content
