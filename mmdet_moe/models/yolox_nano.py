"""YOLOX-nano with the weights of its authors, for fine-tuning: batch normalisation is folded."""

import re
from collections.abc import Mapping
from pathlib import Path

from mmcv.cnn.utils import fuse_conv_bn
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader
from torch import Tensor

from mmdet_moe.errors import ConfigError, explained
from mmdet_moe.files import save_weights

FILE_NAME = 'yolox-nano.pth'
_CONFIG = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'
#: Names of the authors' code, and what MMDetection calls the same, in the order of replacement.
_RENAMED = (
    (r'^backbone\.backbone\.stem\.', 'backbone.stem.'),
    (r'^backbone\.backbone\.dark(\d)\.', lambda m: f'backbone.stage{int(m[1]) - 1}.'),
    (r'^backbone\.lateral_conv0\.', 'neck.reduce_layers.0.'),
    (r'^backbone\.reduce_conv1\.', 'neck.reduce_layers.1.'),
    (r'^backbone\.C3_p4\.', 'neck.top_down_blocks.0.'),
    (r'^backbone\.C3_p3\.', 'neck.top_down_blocks.1.'),
    (r'^backbone\.bu_conv2\.', 'neck.downsamples.0.'),
    (r'^backbone\.bu_conv1\.', 'neck.downsamples.1.'),
    (r'^backbone\.C3_n3\.', 'neck.bottom_up_blocks.0.'),
    (r'^backbone\.C3_n4\.', 'neck.bottom_up_blocks.1.'),
    (r'^head\.stems\.', 'neck.out_convs.'),
    (r'^head\.(cls|reg)_convs\.', r'bbox_head.multi_level_\1_convs.'),
    (r'^head\.(cls|reg|obj)_preds\.', r'bbox_head.multi_level_conv_\1.'),
    # The parts of a CSP layer; the pooling of stage 4 (its part 1) has parts of the same names.
    (r'(stage[123]\.1|stage4\.2|_blocks\.\d)\.conv1\.', r'\1.main_conv.'),
    (r'(stage[123]\.1|stage4\.2|_blocks\.\d)\.conv2\.', r'\1.short_conv.'),
    (r'(stage[123]\.1|stage4\.2|_blocks\.\d)\.conv3\.', r'\1.final_conv.'),
    (r'\.m\.(\d)\.', r'.blocks.\1.'),
    (r'\.dconv\.', '.depthwise_conv.'),
    (r'\.pconv\.', '.pointwise_conv.'),
)


def convert_yolox_nano(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of YOLOX-nano as those of MMDetection's model with ``norm_cfg=None``.

    A trained network's batch normalisation becomes a part of the convolution before it, so that no
    expert depends on the statistics of the few images that it gets. The outputs in eval mode stay
    the same, to rounding.

    Args:
        weights: State dict, of the authors' code (https://github.com/Megvii-BaseDetection/YOLOX)
            or of MMDetection, for COCO's 80 classes.

    Raises:
        ConfigError: They are of another network.
    """
    renamed = {}
    for key, value in weights.items():
        for theirs, ours in _RENAMED:
            key = re.sub(theirs, ours, key)
        renamed[key] = value
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(get_config(_CONFIG).model).eval()
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in renamed.items()}
    for key in wanted | found:
        if found.get(key) != wanted.get(key):
            raise ConfigError(
                f"these are not YOLOX-nano's weights: {key} should be of shape "
                f'{wanted.get(key, "nothing")} and is {found.get(key, "missing")}; use the '
                "authors' yolox_nano.pth, or a checkpoint of MMDetection's yolox_nano"
            )
    model.load_state_dict(renamed)
    return fuse_conv_bn(model).state_dict()


def prepare_yolox_nano(out: str | Path, source: str | Path) -> Path:
    """Write a file of weights as :func:`convert_yolox_nano` changes them.

    Args:
        out: Folder that gets :data:`FILE_NAME`.
        source: The authors' ``yolox_nano.pth``, or a checkpoint of MMDetection.

    Returns:
        The file.

    Raises:
        ConfigError: The file is something else.
    """
    with explained(f'{source} is no file of weights'):
        weights = CheckpointLoader.load_checkpoint(str(source), map_location='cpu')
        for key in ('model', 'state_dict'):  # where both kinds of checkpoints have them
            weights = weights.get(key, weights)
    return save_weights(Path(out, FILE_NAME), convert_yolox_nano(weights))
