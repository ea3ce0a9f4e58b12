# SPDX-License-Identifier: Apache-2.0
"""What people see of progress, on a terminal and in a log."""

import io

import pytest
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from xinference.cli.output import _Bars, size_of


def files(**done: int) -> list[dict[str, object]]:
    return [
        {"file_name": f"{name}.bin", "size_bytes": 2_000_000, "downloaded_bytes": number}
        for name, number in done.items()
    ]


def test_each_file_on_its_way_has_a_bar_below_that_of_all() -> None:
    console = Console(file=io.StringIO(), width=120)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
    )
    bars = RichProgress(*columns, console=console)
    show = _Bars("Launching m", bars)

    def shown() -> list[str]:
        with console.capture() as capture:
            console.print(bars.get_renderable())
        return capture.get().splitlines()

    show("downloading", 0.2, files(first=500_000, second=1_000_000, third=0))
    whole, first, second = shown()
    assert "Launching m: downloading" in whole
    assert "1.5 MB of 6.0 MB" in whole
    assert "first.bin" in first
    assert "500.0 kB of 2.0 MB" in first
    assert "second.bin" in second

    show("downloading", 0.5, files(first=2_000_000, second=1_500_000, third=0))
    whole, second = shown()
    assert "1.5 MB of 2.0 MB" in second

    show("loading", 0.9, files(first=2_000_000, second=2_000_000, third=2_000_000))
    (whole,) = shown()
    assert "loading" in whole


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (7 * 10**11, "700.0 GB")],
)
def test_a_size_is_read_at_a_glance(num_bytes: int, text: str) -> None:
    assert size_of(num_bytes) == text
