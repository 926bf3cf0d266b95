"""What tests of experiments make by hand and read: a layer's report, tables, renamed digits."""

import json

from mmdet_moe.moe import UtilizationReport


def report(load, **figures):
    """A layer's, as runs keep it."""
    defaults = dict(
        importance=load, load_cv2=0.5, usage_entropy=0.6, decision_entropy=0.1, mi_input=0.3,
        mi_level=0.0, level_shares=[load],
    )  # fmt: skip
    return UtilizationReport(num_items=10, load=load, **defaults | figures).as_dict()


def cells(text):
    """Of each row of the tables in a text, without the first one's head."""
    rows = [line for line in text.splitlines() if line.startswith('| ')]
    return [[cell.strip() for cell in row.split('|')[1:-1]] for row in rows[2:]]


def renamed_digits(scenes, folder, names):
    """Digit scenes as a prepared folder; the names may be more than there are digits."""
    folder.mkdir(parents=True)
    (folder / 'images').symlink_to(scenes)
    for split in ('train', 'val'):
        content = json.loads((scenes / f'annotations/instances_{split}2017.json').read_text())
        for image in content['images']:
            image['file_name'] = f'{split}2017/{image["file_name"]}'
        first = content['categories'][0]['id']
        content['categories'] = [{'id': first + i, 'name': name} for i, name in enumerate(names)]
        (folder / f'{split}.json').write_text(json.dumps(content))
    return folder
