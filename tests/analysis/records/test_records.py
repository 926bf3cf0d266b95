"""Records in memory, and their files: no gaps, no mixtures, nothing half written."""

import json

import numpy as np
import pytest

from mmdet_moe.analysis.records.contents import (
    BoxRecords,
    ImageRecords,
    concatenated,
    select,
)
from mmdet_moe.analysis.records.files import RecordFiles
from mmdet_moe.errors import ConfigError

PLAN = {'model': 'a', 'images': 10}


def open_records(folder, plan, overwrite=False):
    return RecordFiles(ImageRecords, folder, plan, overwrite)


def images(first, end):
    return ImageRecords(np.arange(first, end), np.ones((end - first, 2), np.int32))


def write(records, *bounds):
    for first, end in bounds:
        records.write(first, end, images(first, end))


def test_round_trip(tmp_path):
    records = open_records(tmp_path / 'r', PLAN)
    assert records.num_images == 0
    assert list(records) == []
    write(records, (0, 4), (4, 10))
    read = list(open_records(tmp_path / 'r', dict(reversed(PLAN.items()))))
    assert [list(part.index) for part in read] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert read[1].size.dtype == np.int32
    assert records.num_images == 10


def boxes(*scores):
    columns = np.arange(len(scores)), np.zeros((len(scores), 4)), np.array(scores)
    return BoxRecords(*columns, np.ones(len(scores), int))


def test_lists_of_records_on_disk(tmp_path):
    """Beyond ten, whose names are not in the order of the alphabet."""
    many = [boxes(*range(i)) for i in range(12)]
    files = RecordFiles(list[BoxRecords], tmp_path / 'r', PLAN)
    files.write(0, 4, many)
    (read,) = files
    assert [found.score.tolist() for found in read] == [list(range(i)) for i in range(12)]
    for number in (1, 11):
        (one,) = files.part(str(number))
        assert one.score.tolist() == list(range(number))
    files = RecordFiles(list[np.ndarray], tmp_path / 's', PLAN)
    files.write(0, 4, [np.array([i]) for i in range(12)])
    assert [array.tolist() for (read,) in [files] for array in read] == [[i] for i in range(12)]


def test_one_after_the_other():
    parts = [[boxes(1, 2), boxes()], [boxes(3), boxes(4)]]
    first, second = concatenated(parts)
    assert (first.score.tolist(), second.score.tolist()) == ([1, 2, 3], [4])
    assert first.box.shape == (3, 4)
    joined = concatenated([{'a': np.zeros(2)}, {'a': np.ones(1)}])
    assert joined['a'].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match='argument'):
        concatenated([[boxes(1)], []])


def test_some_rows():
    found = select(boxes(1, 2, 3), np.array([False, True, True]))
    assert (found.score.tolist(), found.image.tolist()) == ([2, 3], [1, 2])
    assert select(boxes(1, 2), np.array([1, 0])).score.tolist() == [2, 1]


def test_order_is_that_of_the_images(tmp_path):
    """Also beyond the digits of the names."""
    records = open_records(tmp_path / 'r', PLAN)
    write(records, (99999999, 100000001), (0, 99999999 % 7), (100000001, 100000002))
    firsts = [part.index[0] for part in records]
    assert firsts == sorted(firsts)


def test_a_gap_ends_what_is_done(tmp_path):
    records = open_records(tmp_path / 'r', PLAN)
    write(records, (0, 4), (8, 10))
    assert records.num_images == 4
    write(records, (4, 8))
    assert records.num_images == 10


def test_written_again(tmp_path):
    records = open_records(tmp_path / 'r', PLAN)
    write(records, (0, 4), (0, 4))
    assert len(list(records)) == 1


@pytest.mark.parametrize('content', [{'model': 'b', 'images': 10}, {**PLAN, 'images': 9}])
def test_another_plan(content, tmp_path):
    folder = tmp_path / 'out' / 'statistics'
    write(open_records(folder, PLAN), (0, 4))
    with pytest.raises(ConfigError, match=r'out holds the analysis of another .*--overwrite') as e:
        open_records(folder, content)
    assert '\n' not in str(e.value)
    assert (
        open_records(folder, PLAN, overwrite=True).num_images == 4
    )  # the same: nothing to replace
    assert open_records(folder, content, overwrite=True).num_images == 0
    assert json.loads((folder / 'plan.json').read_text()) == content


def test_interrupted_writing_leaves_no_file(tmp_path, monkeypatch):
    records = open_records(tmp_path / 'r', PLAN)
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
    assert open_records(tmp_path / 'r', PLAN).num_images == 0


def test_damaged_files_are_recorded_again(tmp_path, capsys):
    whole = ((0, 4), (4, 8), (8, 10))
    for name in ('cut', 'empty', 'bit'):
        records = open_records(tmp_path / name, PLAN)
        write(records, *whole)
        path = tmp_path / name / '00000004-00000008.npz'
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        changed = {'cut': content[: len(content) // 2], 'empty': b'', 'bit': content}
        path.write_bytes(changed[name])
        records = open_records(tmp_path / name, PLAN)
        assert f'{path} is damaged' in capsys.readouterr().out
        assert records.num_images == 4
        write(records, (4, 9), (9, 10))  # in other portions than before
        assert records.num_images == 10
        found = np.concatenate([part.index for part in records])
        assert found.tolist() == list(range(10))
