"""Groups of classes that a data set defines, by the name of the group."""

import json
from collections.abc import Sequence
from pathlib import Path

#: The 20 coarse classes of CIFAR-100 (Krizhevsky 2009), fine names as MMPretrain writes them.
CIFAR100 = {
    'aquatic mammals': ('beaver', 'dolphin', 'otter', 'seal', 'whale'),
    'fish': ('aquarium_fish', 'flatfish', 'ray', 'shark', 'trout'),
    'flowers': ('orchid', 'poppy', 'rose', 'sunflower', 'tulip'),
    'food containers': ('bottle', 'bowl', 'can', 'cup', 'plate'),
    'fruit and vegetables': ('apple', 'mushroom', 'orange', 'pear', 'sweet_pepper'),
    'household electrical devices': ('clock', 'keyboard', 'lamp', 'telephone', 'television'),
    'household furniture': ('bed', 'chair', 'couch', 'table', 'wardrobe'),
    'insects': ('bee', 'beetle', 'butterfly', 'caterpillar', 'cockroach'),
    'large carnivores': ('bear', 'leopard', 'lion', 'tiger', 'wolf'),
    'large man-made outdoor things': ('bridge', 'castle', 'house', 'road', 'skyscraper'),
    'large natural outdoor scenes': ('cloud', 'forest', 'mountain', 'plain', 'sea'),
    'large omnivores and herbivores': ('camel', 'cattle', 'chimpanzee', 'elephant', 'kangaroo'),
    'medium-sized mammals': ('fox', 'porcupine', 'possum', 'raccoon', 'skunk'),
    'non-insect invertebrates': ('crab', 'lobster', 'snail', 'spider', 'worm'),
    'people': ('baby', 'boy', 'girl', 'man', 'woman'),
    'reptiles': ('crocodile', 'dinosaur', 'lizard', 'snake', 'turtle'),
    'small mammals': ('hamster', 'mouse', 'rabbit', 'shrew', 'squirrel'),
    'trees': ('maple_tree', 'oak_tree', 'palm_tree', 'pine_tree', 'willow_tree'),
    'vehicles 1': ('bicycle', 'bus', 'motorcycle', 'pickup_truck', 'train'),
    'vehicles 2': ('lawn_mower', 'rocket', 'streetcar', 'tank', 'tractor'),
}  # fmt: skip


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
    if set(classes) == {name for group in CIFAR100.values() for name in group}:
        group_of = {name: group for group, names in CIFAR100.items() for name in names}
    elif ann_file is not None:
        categories = json.loads(Path(ann_file).read_bytes())['categories']
        group_of = {c['name']: c.get('supercategory', '') for c in categories}
    else:
        return None
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(classes):
        groups.setdefault(group_of.get(name, ''), []).append(index)
    return groups if 1 < len(groups) < len(classes) else None
