"""The server of these tests."""

from served import client, engine, model, served  # noqa: F401 - fixtures
