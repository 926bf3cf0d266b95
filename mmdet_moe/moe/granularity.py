"""What one decision can cover, by name. A further kind of items is one file and one line here."""

from mmdet_moe.moe.images import Images
from mmdet_moe.moe.items import Items, Pixels, Tokens
from mmdet_moe.moe.patches import PatchGrid

GRANULARITIES: dict[str, type[Items]] = {
    'image': Images,
    'patch': PatchGrid,
    'pixel': Pixels,
    'token': Tokens,
}
