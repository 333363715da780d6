"""Processes that share the files of tests; see ``bin/test``."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import conftest


def item(folder: Path | None, file: str) -> Any:
    options = SimpleNamespace(getoption={"share": folder}.__getitem__)
    return SimpleNamespace(config=options, path=Path("tests", file))


def runs(folder: Path | None, file: str) -> bool:
    """Whether a test of this file is left to pytest."""
    return conftest.pytest_runtest_protocol(item(folder, file)) is None


def test_a_file_is_run_by_who_comes_to_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one: dict[str, bool] = {}
    other: dict[str, bool] = {}
    monkeypatch.setattr(conftest, "_taken", one)
    assert [runs(tmp_path, "test_a.py"), runs(tmp_path, "test_a.py")] == [True, True]
    monkeypatch.setattr(conftest, "_taken", other)
    assert [runs(tmp_path, "test_a.py"), runs(tmp_path, "test_b.py")] == [False, True]
    assert not runs(tmp_path, "test_a.py")
    monkeypatch.setattr(conftest, "_taken", one)
    assert [runs(tmp_path, "test_b.py"), runs(tmp_path, "test_a.py")] == [False, True]


def test_who_shares_with_nobody_runs_all() -> None:
    assert runs(None, "test_a.py")
    assert runs(None, "test_a.py")
