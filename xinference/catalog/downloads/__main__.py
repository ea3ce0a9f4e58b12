# SPDX-License-Identifier: Apache-2.0
"""The process of one download.

In: one line of JSON on stdin, `{"request", "home", "settings", "log_format"}`. Out: lines of JSON
on stdout, `{"info", "files"}` with the files that have got further, now and then, and at last
`{"path"}` or `{"error"}`. To cancel it, kill it.
"""

import logging
from dataclasses import asdict
from pathlib import Path

from xinference.errors import InternalError, XinferenceError
from xinference.protocol.downloads import DownloadProgress, FileProgress
from xinference.settings import DownloadSettings

from .cache import ModelCache, as_request
from .child import end, read_order, say
from .download import download

logger = logging.getLogger(__name__)

FILES_IN_A_LINE = 100


def main() -> None:
    """Download what stdin says."""
    given = read_order()
    teller = _Teller()
    request = as_request(given["request"])
    try:
        path = download(
            request,
            cache=ModelCache(Path(given["home"])),
            settings=DownloadSettings(**given["settings"]),
            tell=teller.tell,
        )
    except XinferenceError as error:
        logger.error("%s", error)
        say({"error": error.to_wire()})
    except Exception as error:
        logger.exception("%s: the download failed", request.model_version)
        say({"error": InternalError(where="download", problem=repr(error)).to_wire()})
    else:
        logger.info("%s is in %s", request.model_version, path)
        say({"path": path})
    end()


class _Teller:
    """Says what has changed."""

    def __init__(self) -> None:
        self._told: dict[str, FileProgress] = {}

    def tell(self, progress: DownloadProgress) -> None:
        changed = [one for one in progress.files if self._told.get(one.file_name) != one]
        self._told.update({one.file_name: one for one in changed})
        # Why so few in a line: whoever reads them takes lines of a limited length.
        for first in range(0, max(len(changed), 1), FILES_IN_A_LINE):
            some = changed[first : first + FILES_IN_A_LINE]
            say({"info": progress.info, "files": [asdict(one) for one in some]})


if __name__ == "__main__":
    main()
