"""Sizes as given on the command line."""

from contextlib import suppress

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rq_compile.cli.options import SIZE


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("16G", 16 * 2**30),
        ("16g", 16 * 2**30),
        ("16GiB", 16 * 2**30),
        ("16 GiB", 16 * 2**30),
        ("512M", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("0.1K", 102),
        ("2T", 2**41),
    ],
)
def test_reads_sizes(text: str, size: int) -> None:
    assert SIZE.convert(text, None, None) == size
    assert SIZE.convert(size, None, None) == size


@pytest.mark.parametrize(
    "text", ["", "G", "16GB", "16Gb", "-1", "-16G", "1,5G", "1.G", ".5G", "1e9", "16X", "inf", "nan", "\u0661G", "0x10"]
)
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is not a size; .*16G, 512M or 1\.5GiB"):
        SIZE.convert(text, None, None)


@pytest.mark.parametrize("text", ["0", "0G", "0.0T", "0.5"])
def test_refuses_nothing_at_all(text: str) -> None:
    with pytest.raises(click.BadParameter, match="less than one byte"):
        SIZE.convert(text, None, None)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with suppress(click.BadParameter):
        assert SIZE.convert(text, None, None) >= 1


def test_help_and_error_on_the_command_line() -> None:
    @click.command()
    @click.option("--limit", type=SIZE, default=2**30)
    def command(limit: int) -> None:
        click.echo(limit)

    assert CliRunner().invoke(command, []).stdout == f"{2**30}\n"
    assert CliRunner().invoke(command, ["--limit", "512M"]).stdout == f"{2**29}\n"
    assert "--limit SIZE" in CliRunner().invoke(command, ["--help"]).stdout
    result = CliRunner().invoke(command, ["--limit", "16GB"])
    assert result.exit_code == 2
    assert "'--limit': '16GB' is not a size" in result.stderr
