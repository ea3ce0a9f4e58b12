# SPDX-License-Identifier: Apache-2.0
"""Routes of Xinference that are not here, and what to do instead: a caller who moves is told."""

import re

_MEDIA = "Models of images, sound and video are not served."
_USERS = "There are no users: API keys, at /v1/admin/keys, say who may do what."
_UPGRADE = "An upgrade starts the processes anew; what ran comes back by itself."
_RELAUNCH = "A model is changed by DELETE /v1/models/{model_uid} and another POST /v1/models."
_SERVED_PAGE = "It is for a page that is not here; /docs lists what there is."

_INSTEAD = tuple(
    (re.compile(pattern), told)
    for pattern, told in (
        (r"/v1/(images|audio|video|worlds|requests)/|/sdapi/", _MEDIA),
        (
            r"/v1/convert_ids_to_tokens$",
            "The tokenizer of the model's files turns ids into tokens; with transformers: "
            "AutoTokenizer.from_pretrained(…).convert_ids_to_tokens(ids).",
        ),
        (r"/v1/flexible/", "Models of the type flexible are not served."),
        (r"/v1/(internal/token-router|token_router|tokenizer_assets)", "There is no token router."),
        (r"/v1/auth/|/v1/admin/(setup|users|security)|/api/oidc/", _USERS),
        (r"/v1/models/[^/]+/reload", _RELAUNCH),
        (r"/v1/(api|supervisor|workers/[^/]+)/relaunch$", _UPGRADE),
        (r"/v1/(api|supervisor|worker)-relaunches", _UPGRADE),
        (
            r"/v1/models/update_(type|spec)$",
            "The catalogue comes with the package; POST /v1/model_registrations/{model_type} "
            "adds to it, and POST /v1/models takes the id of any repository.",
        ),
        (
            r"/v1/models/llm/auto-register$",
            "POST /v1/models with model_path, and no model_name, finds out what the files are.",
        ),
        (
            r"/v1/models/recommend$",
            "GET /v1/model_registrations/{model_type}?detailed=true&fits=true lists what there is "
            "memory for.",
        ),
        (
            r"/v1/launch_history",
            "Launches are not remembered; POST /v1/autostart/models keeps one, and makes it again.",
        ),
        (
            r"/v1/downloads",
            "POST /v1/cache/models begins a download, and "
            "GET /v1/cache/models/{cache_uid}/progress says how far it is.",
        ),
        (r"/v1/virtualenvs/packages$", "GET /v1/virtualenvs lists the packages, too."),
        (r"/v1/cluster/logs/|/v1/cluster/runtime-logs", "GET /v1/cluster/logs has the logs."),
        (r"/v1/(model_favorites|audit/)", _SERVED_PAGE),
        (r"/v1/cluster/(ui_config|monitor_config|system_settings)", _SERVED_PAGE),
    )
)


def instead_of(path: str) -> str | None:
    """Return what to do instead of asking a path that is no route; None: nobody knows it."""
    return next((told for pattern, told in _INSTEAD if pattern.match(path)), None)
