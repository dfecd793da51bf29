"""The documents of a report and its pages."""

from reported import documents, measured, pages  # noqa: F401 - fixtures
