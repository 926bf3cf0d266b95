"""Files of records: no gaps, no mixtures, nothing half written."""

import json

import numpy as np
import pytest

from mmdet_moe.analysis.records.store import Records
from mmdet_moe.errors import ConfigError

PLAN = {'model': 'a', 'images': 10}


def arrays(first, end):
    return {'image': np.arange(first, end), '0/weights': np.ones((end - first, 2), np.float32)}


def write(records, *bounds):
    for first, end in bounds:
        records.write(first, end, arrays(first, end))


def test_round_trip(tmp_path):
    records = Records(tmp_path / 'r', PLAN)
    assert records.num_images == 0
    assert list(records) == []
    write(records, (0, 4), (4, 10))
    read = list(Records(tmp_path / 'r', dict(reversed(PLAN.items()))))
    assert [list(part['image']) for part in read] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert read[1]['0/weights'].dtype == np.float32
    assert records.num_images == 10


def test_order_is_that_of_the_images(tmp_path):
    """Also beyond the digits of the names."""
    records = Records(tmp_path / 'r', PLAN)
    write(records, (99999999, 100000001), (0, 99999999 % 7), (100000001, 100000002))
    firsts = [part['image'][0] for part in records]
    assert firsts == sorted(firsts)


def test_a_gap_ends_what_is_done(tmp_path):
    records = Records(tmp_path / 'r', PLAN)
    write(records, (0, 4), (8, 10))
    assert records.num_images == 4
    write(records, (4, 8))
    assert records.num_images == 10


def test_written_again(tmp_path):
    records = Records(tmp_path / 'r', PLAN)
    write(records, (0, 4), (0, 4))
    assert len(list(records)) == 1


@pytest.mark.parametrize('content', [{'model': 'b', 'images': 10}, {**PLAN, 'images': 9}])
def test_another_plan(content, tmp_path):
    folder = tmp_path / 'out' / 'statistics'
    write(Records(folder, PLAN), (0, 4))
    with pytest.raises(ConfigError, match=r'out holds the analysis of another .*--overwrite') as e:
        Records(folder, content)
    assert '\n' not in str(e.value)
    assert Records(folder, PLAN, overwrite=True).num_images == 4  # the same: nothing to replace
    assert Records(folder, content, overwrite=True).num_images == 0
    assert json.loads((folder / 'plan.json').read_text()) == content


def test_interrupted_writing_leaves_no_file(tmp_path, monkeypatch):
    records = Records(tmp_path / 'r', PLAN)
    write(records, (0, 4))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr('os.replace', stop)
    with pytest.raises(KeyboardInterrupt):
        write(records, (4, 8))
    assert records.num_images == 4
    assert sorted(path.name for path in (tmp_path / 'r').iterdir()) == [
        '00000000-00000004.npz',
        'plan.json',
    ]


def test_killed_before_the_plan(tmp_path):
    """A folder without a plan has no records of anything."""
    (tmp_path / 'r').mkdir()
    assert Records(tmp_path / 'r', PLAN).num_images == 0
