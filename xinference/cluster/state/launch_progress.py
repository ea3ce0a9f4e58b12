# SPDX-License-Identifier: Apache-2.0
"""How far one replica of a launch is, from what its worker says. Pure."""

from xinference.cluster.messages import InstanceReport
from xinference.protocol.deployment import LaunchProgress, ReplicaState
from xinference.protocol.downloads import DownloadProgress

SHARE_OF_DOWNLOADING = 0.8
"""Of a launch that has to download: so much of its bar, the rest for loading."""
SHARE_OF_STARTING = 0.05
"""Of one that has the files here."""
MAX_UNTIL_READY = 0.99


def replica_progress(
    state: ReplicaState, report: InstanceReport | None, problem: str
) -> LaunchProgress:
    """Return how far a replica is.

    Args:
        report: its worker's latest; None: there is none yet.
        problem: why it waits.
    """
    if state is ReplicaState.READY:
        return LaunchProgress(progress=1.0, stage="completed")
    download = None if report is None else report.download
    before = SHARE_OF_STARTING if download is None else SHARE_OF_DOWNLOADING
    files = () if download is None else download.files
    match state:
        case ReplicaState.DOWNLOADING if download is not None:
            return LaunchProgress(
                progress=SHARE_OF_DOWNLOADING * download.fraction,
                stage="downloading",
                info=_words_of(download),
                download_files=files,
            )
        case ReplicaState.LOADING if report is not None:
            share = min(before + (1.0 - before) * report.progress, MAX_UNTIL_READY)
            return LaunchProgress(
                progress=share, stage="loading", info=report.info, download_files=files
            )
        case ReplicaState.STARTING | ReplicaState.DOWNLOADING:
            info = "" if report is None else report.info
            return LaunchProgress(
                progress=before, stage="launching", info=info, download_files=files
            )
    return LaunchProgress(progress=0.0, stage="pending", info=problem)


def _words_of(download: DownloadProgress) -> str:
    if not download.files:
        return download.info
    done = sum(file.downloaded_bytes for file in download.files)
    total = sum(file.size_bytes for file in download.files)
    return f"{done:,} of {total:,} bytes {download.info}".rstrip()
