# SPDX-License-Identifier: Apache-2.0
"""The table of OpenAI's parameters is the one that the types and the tests make."""

from .parameter_table import COMMAND, PAGE, page


def test_the_table_of_parameters_is_current() -> None:
    assert PAGE.read_text() == page(), f"write it anew: {COMMAND}"
