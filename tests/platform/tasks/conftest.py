"""A home folder of each test's own."""

import pytest


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
