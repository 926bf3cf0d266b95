"""Layers in human words: ``bbox_head.cls_moe`` is the classification head."""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import count
from pathlib import Path

# The first pattern that fits the beginning of a path, and what it is called.
_PLACES = (
    (r'roi_head\.mask_head(\.\d+)?', 'mask head'),
    (r'roi_head\.bbox_head\.(\d+)', 'box head of stage {1:+}'),
    (r'roi_head\.bbox_head', 'box head'),
    (r'rpn_head', 'region proposal head'),
    (r'(?:bbox_head|head)\.(?:multi_level_)?cls\w*', 'classification head'),
    (r'(?:bbox_head|head)\.(?:multi_level_)?(?:reg|conv_reg)\w*', 'regression head'),
    (r'bbox_head', 'detection head'),
    (r'head\.fc', 'classifier'),
    (r'head', 'head'),
    (r'backbone\.layer(\d+)', 'stage {1} of the backbone'),
    (r'backbone\.stages\.(\d+)', 'stage {1:+} of the backbone'),
    (r'backbone\.stage_?(\d+)', 'stage {1} of the backbone'),
    (r'backbone', 'backbone'),
    (r'neck', 'neck'),
    (r'encoder\.layers\.(\d+)', 'layer {1:+} of the encoder'),
    (r'decoder\.layers\.(\d+)', 'layer {1:+} of the decoder'),
)
_COUNTED = re.compile(r'\{1(:\+)?\}')  # with :+ the path counts from 0


def layer_names(paths: Iterable[str]) -> dict[str, str]:
    """What to call layers, by their paths; each is different.

    Args:
        paths: Of all layers of a model.

    Returns:
        Words for each path. What the words leave out of it follows where two layers would be called
        the same; an unknown path stays as it is.
    """
    paths = list(paths)
    named = {path: _name(path) for path in paths}
    often = Counter(name for name, _ in named.values())
    return {
        path: f'{name}, {rest}' if rest and often[name] > 1 else name
        for path, (name, rest) in named.items()
    }


def run_names(folders: Iterable[Path]) -> list[str]:
    """What to call runs: as much of the ends of their folders' paths as tells them apart.

    Args:
        folders: Of the runs; equal ones get equal names.
    """
    folders = [Path(folder).resolve() for folder in folders]
    ends = (['/'.join(folder.parts[-parts:]) for folder in folders] for parts in count(1))
    return next(names for names in ends if len(set(names)) == len(set(folders)))


def _name(path: str) -> tuple[str, str]:
    """The words, and the rest of the path."""
    for pattern, words in _PLACES:
        # Not within a word of the path.
        if found := re.match(rf'{pattern}(?=\.|$)', path):
            rest = path[found.end() :].lstrip('.')
            return _COUNTED.sub(lambda c: str(int(found[1]) + bool(c[1])), words), rest
    return path, ''
