import pytest

from vllm_bridge import versions
from vllm_bridge.errors import BridgeError


@pytest.mark.parametrize(
    ("version", "reason"),
    [("0.32.0", None), ("0.32.1+cpu", None), ("0.31.0", "vllm_version"), ("0.320", "vllm_version")],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str, reason: str | None) -> None:
    monkeypatch.setattr(versions, "vllm_distribution", lambda: ("vllm", version))
    if reason is None:
        versions.check_versions()
        return
    with pytest.raises(BridgeError) as caught:
        versions.check_versions()
    assert caught.value.reason == reason
    assert caught.value.details["installed"] == version


def test_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "vllm_distribution", lambda: (None, None))
    with pytest.raises(BridgeError) as caught:
        versions.check_versions()
    assert caught.value.reason == "vllm_not_installed"


def test_the_installed_vllm_fits() -> None:
    versions.check_versions()
