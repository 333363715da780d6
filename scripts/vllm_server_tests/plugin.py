"""A plugin of pytest that has vLLM's tests of its server ask one that is there already, with the
demo model under every name; see run.exs.
"""

import json
import os
from typing import Any
from urllib.parse import urlsplit

import pytest
import vllm.tokenizers
import vllm.transformers_utils.repo_utils

from tests import utils

# Fixtures of theirs; of the other files like these more would be imported than is there.
pytest_plugins = ["tests.entrypoints.conftest", "tests.entrypoints.openai.responses.conftest"]

MODEL = os.environ["VLLM_TESTS_MODEL"]


class Server(utils.RemoteVLLMServer):
    """Where a test would start a server of its own."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        url = urlsplit(os.environ["VLLM_TESTS_URL"])
        self.host, self.port, self.uds = url.hostname, url.port, None

    def __exit__(self, *_raised: Any) -> None:
        pass


class Hub:
    """Where a test would download an adapter."""

    def snapshot_download(self, repo_id: str) -> str:
        return repo_id


def _get_tokenizer(*_names: Any, get: Any = vllm.tokenizers.get_tokenizer, **_options: Any) -> Any:
    return get(MODEL)


utils.RemoteOpenAIServer = Server
vllm.tokenizers.get_tokenizer = _get_tokenizer
vllm.transformers_utils.repo_utils.hf_api = Hub


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes what has become of a test, one line of JSON for each."""
    if report.when != "call" and report.passed:
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    why = crash.message if crash else str(report.longrepr or "")
    noted = {"test": report.nodeid, "outcome": report.outcome, "why": why.strip()[:300]}
    with open(os.environ["VLLM_TESTS_REPORT"], "a") as file:
        file.write(json.dumps(noted) + "\n")
