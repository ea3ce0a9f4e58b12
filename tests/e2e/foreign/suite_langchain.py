# SPDX-License-Identifier: Apache-2.0
"""LangChain's own standard integration tests, through `langchain-openai`."""

from typing import Any

from conftest import ENDPOINT, GUIDE, RECITER
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

CONNECTION: dict[str, Any] = {"base_url": f"{ENDPOINT}/v1", "api_key": "none", "max_retries": 0}


class TestStandard(ChatModelIntegrationTests):
    """What every chat model of LangChain has to do."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**CONNECTION, "model": RECITER, "stream_usage": True}

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return GUIDE
