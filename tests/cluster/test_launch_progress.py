# SPDX-License-Identifier: Apache-2.0
"""The bar of a launch goes up, whatever the launch has to do."""

from xinference.cluster.messages import InstanceReport, InstanceState, LaunchId
from xinference.cluster.state.launch_progress import replica_progress
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid
from xinference.protocol.deployment import ReplicaState
from xinference.protocol.downloads import DownloadProgress, FileProgress


def report(download: DownloadProgress | None = None, progress: float = 0.0) -> InstanceReport:
    return InstanceReport(
        replica=ReplicaUid(ModelUid("m"), 0),
        instance=InstanceId("i"),
        launch_id=LaunchId("l"),
        state=InstanceState.STARTING,
        progress=progress,
        download=download,
    )


def downloaded(done: int) -> DownloadProgress:
    file = FileProgress(file_name="model.safetensors", size_bytes=1000, downloaded_bytes=done)
    return DownloadProgress(files=(file,), info="from huggingface")


def test_a_launch_that_downloads_counts_that_as_four_fifths() -> None:
    steps = [
        replica_progress(ReplicaState.PENDING, None, ""),
        replica_progress(ReplicaState.DOWNLOADING, report(downloaded(0)), ""),
        replica_progress(ReplicaState.DOWNLOADING, report(downloaded(500)), ""),
        replica_progress(ReplicaState.DOWNLOADING, report(downloaded(1000)), ""),
        replica_progress(ReplicaState.STARTING, report(downloaded(1000)), ""),
        replica_progress(ReplicaState.LOADING, report(downloaded(1000), 0.5), ""),
        replica_progress(ReplicaState.READY, report(), ""),
    ]

    shown = [step.progress for step in steps]
    assert shown == sorted(shown)
    assert shown[2] == 0.4
    assert [step.stage for step in steps] == [
        *("pending", "downloading", "downloading", "downloading"),
        *("launching", "loading", "completed"),
    ]
    assert steps[2].info == "500 of 1,000 bytes from huggingface"
    assert steps[2].download_files[0].downloaded_bytes == 500


def test_a_launch_whose_files_are_here_has_the_bar_for_loading() -> None:
    steps = [
        replica_progress(ReplicaState.STARTING, None, ""),
        replica_progress(ReplicaState.LOADING, report(progress=0.1), ""),
        replica_progress(ReplicaState.LOADING, report(progress=1.0), ""),
        replica_progress(ReplicaState.READY, report(), ""),
    ]

    shown = [step.progress for step in steps]
    assert shown == sorted(shown)
    assert shown[1] < 0.2
    assert not any(step.download_files for step in steps)
