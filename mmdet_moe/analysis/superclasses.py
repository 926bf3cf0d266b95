"""Groups of classes that a data set defines, by the name of the group."""

import json
from collections.abc import Sequence
from pathlib import Path

from mmdet_moe.datasets.class_folders import COARSE_CLASSES


def superclasses(
    classes: Sequence[str], ann_file: str | Path | None
) -> dict[str, list[int]] | None:
    """The groups of a data set's classes, each with the indices of its classes.

    Args:
        classes: Names of the classes.
        ann_file: An annotation file in COCO's layout, whose categories name their supercategory.

    Returns:
        None if the data set has no groups, or one group alone, or one for each class.
    """
    if set(classes) == {name for group in COARSE_CLASSES.values() for name in group}:
        group_of = {name: group for group, names in COARSE_CLASSES.items() for name in names}
    elif ann_file is not None:
        categories = json.loads(Path(ann_file).read_bytes())['categories']
        group_of = {c['name']: c.get('supercategory', '') for c in categories}
    else:
        return None
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(classes):
        groups.setdefault(group_of.get(name, ''), []).append(index)
    return groups if 1 < len(groups) < len(classes) else None
