"""Which decision of each layer of experts stands behind an output of a model. Nothing is guessed.

A detection is made by one prior of a pyramid level, one RoI or one query. While a :class:`Tracer`
is active, the head's own code keeps that origin with every candidate: what it selects from
remembers which rows were taken, and NMS carries the origin as it carries the boxes. Which decision
of a layer covers an origin then follows from the layer's place:

- in the dense head: the decision of that level, image and place (of the patch or pixel there);
- in an RoI head: the decision of that RoI, in every stage of a cascade; in its mask head: that of
  the detection whose mask it is;
- in the decoder or the head of a transformer: the decision of that query; in its encoder: the
  decision of the token that proposed the query. Without proposals no token did;
- in the backbone or the neck: the decision at that place of the feature map that feeds that level,
  found out once by asking autograd which level depends on which map.

A classifier's image has one place, and its weights are the mean over the image's decisions.
"""

from mmdet_moe.analysis.attribution.families import KNOWN_HEADS, origins_of
from mmdet_moe.analysis.attribution.places import PLACE_FIELD, UNKNOWN, Origins, Places, replaced
from mmdet_moe.analysis.attribution.tracer import Decisions, Tracer

__all__ = [
    'KNOWN_HEADS',
    'PLACE_FIELD',
    'UNKNOWN',
    'Decisions',
    'Origins',
    'Places',
    'Tracer',
    'origins_of',
    'replaced',
]
