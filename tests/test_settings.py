# SPDX-License-Identifier: Apache-2.0
"""The environment is read once, strictly, and says what it does not know."""

from pathlib import Path

import pytest

from xinference.errors import InvalidSetting
from xinference.settings import OBSOLETE, VARIABLES, DownloadSettings, PortRange, Settings


def test_an_empty_environment_gives_the_defaults() -> None:
    settings, warnings = Settings.from_environ({})

    assert settings == Settings()
    assert warnings == []


def test_every_variable_fills_its_setting() -> None:
    environ = {
        "XINFERENCE_HOME": "/some/where",
        "XINFERENCE_ENDPOINT": "http://host:1",
        "XINFERENCE_API_KEY": "sk-1",
        "XINFERENCE_CLUSTER_KEY": "abc",
        "XINFERENCE_LOG_LEVEL": "debug",
        "XINFERENCE_LOG_FORMAT": "JSON",
        "XINFERENCE_LOG_REQUESTS": "summary",
        "XINFERENCE_DISABLE_METRICS": "1",
        "XINFERENCE_MODEL_ACTOR_AUTO_RECOVER_LIMIT": "0",
        "XINFERENCE_LAUNCH_STRATEGY": "Least-Models-Launch-Strategy",
        "XINFERENCE_ALLOW_MULTI_REPLICA_PER_GPU": "0",
        "XINFERENCE_REPLICA_PORTS": "4000-4010",
        "XINFERENCE_ENCRYPT_DATA_PLANE": "0",
        "XINFERENCE_DRAIN_SECONDS": "5",
        "XINFERENCE_CONTINUE_STREAMS": "no",
        "XINFERENCE_HTTP_TIMEOUT_KEEP_ALIVE": "2.5",
        "XINFERENCE_ANSWER_TIMEOUT": "30",
        "XINFERENCE_ENABLE_VIRTUAL_ENV": "0",
        "XINFERENCE_VIRTUAL_ENV_SKIP_INSTALLED": "0",
        "XINFERENCE_VIRTUAL_ENV_OFFLINE_INSTALL": "1",
        "XINFERENCE_VIRTUAL_ENV_FIND_LINKS_ALLOWED_ROOTS": "/wheels:/more",
        "XINFERENCE_BATCH_SIZE": "64",
        "XINFERENCE_BATCH_INTERVAL": "0",
        "XINFERENCE_MODEL_SRC": "ModelScope",
        "XINFERENCE_OFFLINE": "1",
        "XINFERENCE_HUB_DETECT_TIMEOUT": "1.5",
        "XINFERENCE_DOWNLOAD_STALL_SECONDS": "20",
        "XINFERENCE_DOWNLOAD_MAX_ATTEMPTS": "5",
        "XINFERENCE_MODEL_DOWNLOAD_WORKERS": "8",
        "HF_ENDPOINT": "https://mirror.example/",
        "HF_TOKEN": "hf_1",
        "HF_HUB_OFFLINE": "1",
        "MODELSCOPE_DOMAIN": "scope.example",
        "MODELSCOPE_API_TOKEN": "ms-1",
    }
    assert environ.keys() == VARIABLES.keys()

    settings, warnings = Settings.from_environ(environ)

    assert settings == Settings(
        home=Path("/some/where"),
        endpoint="http://host:1",
        api_key="sk-1",
        cluster_key="abc",
        log_level="DEBUG",
        log_format="json",
        log_requests="summary",
        disable_metrics=True,
        restart_limit=0,
        launch_strategy="least_models",
        allow_multi_replica_per_gpu=False,
        replica_ports=PortRange(4000, 4010),
        encrypt_data_plane=False,
        drain_seconds=5.0,
        continue_streams=False,
        http_keep_alive_seconds=2.5,
        answer_timeout_seconds=30.0,
        enable_virtual_env=False,
        virtual_env_skip_installed=False,
        virtual_env_offline=True,
        virtual_env_find_links_roots=(Path("/wheels"), Path("/more")),
        batch_size=64,
        batch_interval_seconds=0.0,
        downloads=DownloadSettings(
            model_src="modelscope",
            hf_endpoint="https://mirror.example",
            hf_token="hf_1",
            modelscope_endpoint="https://scope.example",
            modelscope_token="ms-1",
            is_offline=True,
            is_hf_offline=True,
            hub_timeout_seconds=1.5,
            stall_seconds=20.0,
            max_attempts=5,
            num_workers=8,
        ),
    )
    assert warnings == []


def test_a_hub_s_variable_that_is_empty_is_none() -> None:
    settings, warnings = Settings.from_environ({"HF_ENDPOINT": "", "HF_TOKEN": " "})

    assert settings == Settings()
    assert warnings == []


def test_a_token_is_not_in_what_is_printed_of_the_settings() -> None:
    settings, _ = Settings.from_environ({"HF_TOKEN": "hf_secret"})

    assert "hf_secret" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("XINFERENCE_DISABLE_METRICS", "perhaps"),
        ("XINFERENCE_MODEL_ACTOR_AUTO_RECOVER_LIMIT", "-1"),
        ("XINFERENCE_LAUNCH_STRATEGY", "busiest"),
        ("XINFERENCE_BATCH_SIZE", "0"),
        ("XINFERENCE_BATCH_INTERVAL", "soon"),
        ("XINFERENCE_BATCH_INTERVAL", "nan"),
        ("XINFERENCE_REPLICA_PORTS", "10-5"),
        ("XINFERENCE_REPLICA_PORTS", "1-99999"),
        ("XINFERENCE_HTTP_TIMEOUT_KEEP_ALIVE", "nan"),
        ("XINFERENCE_LOG_LEVEL", "LOUD"),
        ("XINFERENCE_LOG_FORMAT", "xml"),
        ("XINFERENCE_LOG_REQUESTS", "1"),
        ("XINFERENCE_HOME", " "),
    ],
)
def test_a_malformed_value_is_an_error_that_names_it(name: str, value: str) -> None:
    with pytest.raises(InvalidSetting) as refused:
        Settings.from_environ({name: value})

    assert refused.value.name == name
    assert refused.value.value == value


def test_an_unknown_name_warns_with_the_nearest_known_one() -> None:
    _, warnings = Settings.from_environ({"XINFERENCE_HOMES": "x", "OTHER": "y"})

    assert len(warnings) == 1
    assert "Did you mean XINFERENCE_HOME?" in warnings[0]


@pytest.mark.parametrize("name", OBSOLETE)
def test_an_obsolete_name_gets_one_line(name: str) -> None:
    settings, warnings = Settings.from_environ({name: "1"})

    assert settings == Settings()
    assert len(warnings) == 1
    assert "obsolete" in warnings[0]
