"""The use of the experts over a training, from logs written by hand."""

import json

from mmdet_moe.analysis.report.history import logged_scalars, read_history


def write(work_dir, start, text):
    logs = work_dir / start / 'vis_data'
    logs.mkdir(parents=True)
    (logs / 'scalars.json').write_text(text)


def line(step, load, importance=None, layer='bbox_head.cls_moe', mode='train'):
    importance = importance or load[::-1]
    entry = {f'{mode}/moe/{layer}/load_{e}': x for e, x in enumerate(load)}
    entry |= {f'{mode}/moe/{layer}/importance_{e}': x for e, x in enumerate(importance)}
    return json.dumps({**entry, f'{mode}/moe/{layer}/load_cv2': 0.3, 'step': step}) + '\n'


KINDS = ('inference_load', 'masked', 'bias')
LOSS = '{"loss": 0.5, "time": 0.1, "step": 50}\n'


def test_two_layers(tmp_path):
    text = LOSS + line(50, [0.25, 0.75]) + line(50, [0.5, 0.5, 0.0], layer='a/b')
    text += line(60, [1.0, 0.0], mode='val') + line(100, [0.5, 0.5], [0.1, 0.9])
    write(tmp_path, '20260101_000000', text)
    assert read_history(tmp_path) == {
        'bbox_head.cls_moe': {
            'step': [50, 100],
            'load': [[0.25, 0.75], [0.5, 0.5]],
            'importance': [[0.75, 0.25], [0.1, 0.9]],
        },
        'a/b': {'step': [50], 'load': [[0.5, 0.5, 0.0]], 'importance': [[0.0, 0.5, 0.5]]},
    }


def test_more_than_ten_experts_are_ordered_by_number(tmp_path):
    load = [e / 66 for e in range(12)]
    entry = json.loads(line(2, load))
    write(tmp_path, 'start', json.dumps(dict(sorted(entry.items()))))
    assert read_history(tmp_path)['bbox_head.cls_moe']['load'] == [load]


def test_from_its_first_iteration_on_a_later_start_counts(tmp_path):
    """Resumed from iteration 50, and begun anew, in the folder of a run that went on longer."""
    # Written in the wrong order: the names of the folders count.
    write(tmp_path, '20260102_000000', line(100, [0.9, 0.1]) + line(150, [0.8, 0.2]))
    first = line(50, [0.5, 0.5]) + line(100, [0.4, 0.6]) + line(120, [0.3, 0.7])
    write(tmp_path, '20260101_235959', first)
    history = read_history(tmp_path)['bbox_head.cls_moe']
    assert history['step'] == [50, 100, 150]
    assert [row[0] for row in history['load']] == [0.5, 0.9, 0.8]
    validation = '{"accuracy/top1": 50.0, "step": 1}\n'  # whose step is an epoch
    write(tmp_path, '20260103_000000', validation + line(150, [0.7, 0.3]))
    assert read_history(tmp_path)['bbox_head.cls_moe']['step'] == [50, 100, 150]
    write(tmp_path, '20260104_000000', line(50, [0.1, 0.9], layer='neck'))
    assert read_history(tmp_path) == {
        'neck': {'step': [50], 'load': [[0.1, 0.9]], 'importance': [[0.9, 0.1]]}
    }


def test_what_only_some_entries_have_is_left_out(tmp_path):
    entry = json.loads(line(50, [0.5, 0.5]))
    more = {f'train/moe/bbox_head.cls_moe/{kind}_{e}': e for kind in KINDS for e in range(2)}
    both = [json.dumps({**entry, **more, 'step': step}) + '\n' for step in (100, 150)]
    write(tmp_path, '1', ''.join(both))
    history = read_history(tmp_path)['bbox_head.cls_moe']
    assert set(history) == {'step', 'load', 'importance', *KINDS}
    assert history['inference_load'] == history['masked'] == [[0, 1], [0, 1]]
    write(tmp_path, '0', line(50, [0.5, 0.5]))  # of an earlier version
    history = read_history(tmp_path)['bbox_head.cls_moe']
    assert set(history) == {'step', 'load', 'importance'}
    assert history['step'] == [50, 100, 150]


def test_damaged_lines_are_left_out(tmp_path):
    whole = line(50, [0.5, 0.5])
    write(tmp_path, '1', LOSS + whole + line(100, [0.4, 0.6])[:40])
    write(tmp_path, '2', line(100, [0.3, 0.7]) + '7\n\0\0\n')
    write(tmp_path, '3', '')
    assert [entry['step'] for entry in logged_scalars(tmp_path)] == [50, 50, 100]
    history = read_history(tmp_path)['bbox_head.cls_moe']
    assert history['step'] == [50, 100]
    assert [row[0] for row in history['load']] == [0.5, 0.3]


def test_another_number_of_experts_is_another_model(tmp_path):
    write(tmp_path, '1', line(50, [0.5, 0.5]) + line(100, [0.5, 0.5]))
    write(tmp_path, '2', line(50, [0.2, 0.3, 0.5]))
    history = read_history(tmp_path)['bbox_head.cls_moe']
    assert history['step'] == [50]
    assert history['load'] == [[0.2, 0.3, 0.5]]


def test_no_logs(tmp_path):
    assert read_history(tmp_path / 'nothing') is None
    write(tmp_path, '1', LOSS + line(60, [1.0, 0.0], mode='val'))
    assert read_history(tmp_path) is None
