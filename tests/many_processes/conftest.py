import pytest
from pictures import write_pictures

from fastconv.training import loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture
def report_every_step(monkeypatch):
    monkeypatch.setattr(loop, "REPORT_SECONDS", -1.0)
