# SPDX-License-Identifier: Apache-2.0
"""A process whose stderr is a file puts it aside when it is full, and loses nothing."""

import subprocess
import sys
from pathlib import Path

from xinference.cluster.log_rotation import MAX_BYTES, open_log

WRITER = """
import os, sys
from pathlib import Path
from xinference.cluster.log_rotation import put_aside

path = Path(sys.argv[1])
os.dup2(2, 1)
moves = 0
for number in range(300):
    print("line", number, file=sys.stderr, flush=True)
    os.write(1, b"raw %d\\n" % number)
    moves += put_aside(path, max_bytes=4000)
assert moves == 1, moves
"""


def test_a_full_file_is_put_aside_and_every_output_goes_on_in_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "m-rep0.log"
    with open_log(path) as log:
        subprocess.run([sys.executable, "-c", WRITER, str(path)], stderr=log, check=True)

    older = (tmp_path / "m-rep0.log.1").read_text().splitlines()
    newer = path.read_text().splitlines()
    assert older
    assert newer
    wanted = [one for number in range(300) for one in (f"line {number}", f"raw {number}")]
    assert older + newer == wanted


def test_a_file_that_is_not_this_processs_own_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m-rep0.log"
    path.write_text("x" * 5000)
    program = (
        "import sys; from pathlib import Path; "
        "from xinference.cluster.log_rotation import put_aside; "
        "sys.exit(put_aside(Path(sys.argv[1]), max_bytes=-1))"
    )

    with (tmp_path / "other").open("ab") as log:
        subprocess.run([sys.executable, "-c", program, str(path)], stderr=log, check=True)

    assert path.stat().st_size == 5000


def test_a_process_that_starts_puts_aside_what_is_full(tmp_path: Path) -> None:
    path = tmp_path / "m-rep0.log"
    path.write_bytes(b"x" * (MAX_BYTES + 1))

    with open_log(path) as log:
        assert log.tell() == 0

    assert (tmp_path / "m-rep0.log.1").stat().st_size == MAX_BYTES + 1
