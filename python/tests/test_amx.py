"""Engines that compute with all that the processor has, AMX included; all other tests do without
(see bin/test)."""

import pytest

from conftest import MODELS
from running import Running

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("model", ["demo", pytest.param("demo-awq", marks=pytest.mark.slow)])
def test_sentences_are_said(
    model: str, facts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    engine = Running()
    engine.load(MODELS / model)
    try:
        assert engine.complete_all(facts) == facts
    finally:
        engine.stop()
