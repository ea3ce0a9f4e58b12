# SPDX-License-Identifier: Apache-2.0
"""A stamp counts once, however often and in whatever order it comes."""

import random

from xinference.cluster.freshness import WINDOW, Stamp, StampCheck, Stamper


def test_a_stamp_counts_once() -> None:
    check, sender = StampCheck(), Stamper()
    stamp = sender.stamp(check.receiver)

    assert check.take(stamp)
    assert not check.take(stamp)
    assert check.take(sender.stamp(check.receiver))


def test_a_stamp_for_another_process_or_an_earlier_life_counts_nowhere() -> None:
    earlier, now = StampCheck(), StampCheck()
    sender = Stamper()

    assert not now.take(sender.stamp(earlier.receiver))
    assert not now.take(sender.stamp(""))


def test_senders_do_not_get_into_each_others_way() -> None:
    check = StampCheck()
    one, two = Stamper(), Stamper()

    assert all(check.take(sender.stamp(check.receiver)) for sender in (one, two) * 3)


def test_calls_may_overtake_each_other_within_the_window() -> None:
    rng = random.Random(5)
    check, sender = StampCheck(), Stamper()
    stamps = [sender.stamp(check.receiver) for _ in range(5000)]
    late = sorted(range(len(stamps)), key=lambda i: i + rng.randrange(WINDOW // 2))

    assert all(check.take(stamps[i]) for i in late)
    assert not any(check.take(stamp) for stamp in stamps)


def test_what_is_older_than_the_window_is_refused_though_it_never_came() -> None:
    check = StampCheck()
    for number, is_taken in ((3 * WINDOW, True), (2 * WINDOW + 1, True), (2 * WINDOW, False)):
        assert check.take(Stamp(check.receiver, "s", number)) is is_taken
