# SPDX-License-Identifier: Apache-2.0
"""Who is to blame when a step raises: run its rows apart until only the culprits fail. Pure.

What ran once may run again: a forward stores the same keys and values in the same places.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

logger = logging.getLogger(__name__)

Row = TypeVar("Row")
Result = TypeVar("Result")


def run_apart(
    rows: Sequence[Row],
    run: Callable[[Sequence[Row]], Result],
    *,
    fatal: tuple[type[Exception], ...],
) -> tuple[list[tuple[Sequence[Row], Result]], list[tuple[Row, Exception]]]:
    """Run all rows at once; where that raises, each half, down to single rows.

    Args:
        rows: at least one; a half keeps their order.
        run: may be called with the same row again and again.
        fatal: raised by what cannot go on at all, whoever is to blame.

    Returns:
        The groups that ran with what came of them, in order, and the rows that raise alone.

    Raises:
        Exception: one of `fatal`.
    """
    try:
        return [(rows, run(rows))], []
    except fatal:
        raise
    except Exception as error:  # boundary: foreign model code
        logger.error("a step of %d requests failed", len(rows), exc_info=error)
        if len(rows) == 1:
            return [], [(rows[0], error)]
    middle = len(rows) // 2
    first, first_culprits = run_apart(rows[:middle], run, fatal=fatal)
    second, second_culprits = run_apart(rows[middle:], run, fatal=fatal)
    return first + second, first_culprits + second_culprits
