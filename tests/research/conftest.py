"""What the tests of experiments share."""

import pytest

from research.experiments import records


@pytest.fixture(autouse=True)
def records_folder(tmp_path, monkeypatch):
    """No test reads or writes the records of the repository."""
    monkeypatch.setattr(records, 'RECORDS', tmp_path / 'records')
    return tmp_path / 'records'
