"""Pictures inside the report: where the experts look, and figures that need no script."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmdet_moe.analysis.data import drawn
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.image_demo.command import routed_maps
from mmdet_moe.analysis.image_demo.drawing import draw_routing, page_style
from mmdet_moe.analysis.image_demo.looks import draw_looks, find_looks, network_picture
from mmdet_moe.analysis.image_demo.pipeline import Placement
from mmdet_moe.analysis.report.figures import folder_of
from mmdet_moe.analysis.saliency import has_maps
from mmdet_moe.analysis.study import Study
from mmdet_moe.drawing import to_bytes

#: Images that may be looked at: a report holds a picture or two of each, and of each layer.
MAX_IMAGES = 32
_WIDTH = 1100  # of a picture in the report, px
_CHOICES = {
    'counterfactual': 'Is the choice a good one? The main expert against the others, alone',
    'confusion': 'What each expert alone takes for what',
}


def write_looks(study: Study, number: int, folder: Path) -> list[tuple[str, str, Path]]:
    """Draw the routing of patches and pixels, and where the experts look, for some images.

    Args:
        study: Its model is run on the images once more.
        number: How many images, drawn at random.
        folder: Of the figures; ``<layer>/routing_<place>.png`` and ``<layer>/cam_<place>.png``,
            by the image's place in the data set.

    Returns:
        ``(layer, title, path)`` of each picture.
    """
    data, tracer, written = study.data, study.tracer, []
    classes = data.classes

    def write(figure, layer: str, kind: str, place: int, title: str) -> None:
        path = folder_of(folder, layer) / f'{kind}_{place:06d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, to_bytes(figure, 'png'))
        written.append((layer, f'{title}, image {place}', path))

    for index in drawn(len(data), number):
        place = data.chosen[index]
        with tracer, page_style():
            batch = next(data.batches([index], batch_size=1, num_workers=0))
            inputs = study.model.data_preprocessor(batch, False)
            (result,) = tracer.predict(inputs, preprocessed=True)
            picture, looks = network_picture(inputs), {}
            height, width = picture.shape[:2]
            padded = tuple(inputs['inputs'].shape[:1:-1])
            for name, layer in tracer.layers.items():
                decisions = tracer.decisions(name, 1)
                looks[name] = find_looks(tracer, name, result, study.score_thr, classes.__getitem__)
                is_divided = has_maps(name, layer, decisions) and any(
                    len(items) > 1 for items in decisions.maps
                )
                if is_divided:
                    placement = Placement((1.0, 1.0), (0.0, 0.0), (width, height))
                    maps = routed_maps(decisions, placement, padded)
                    title = f'image {place}: main expert e of every {layer.granularity} and its '
                    title += f'weight (opacity)\n{name}'
                    figure = draw_routing(picture, maps, title, (0, 0, width, height))
                    write(figure, name, 'routing', place, 'Routing')
            for name, found in looks.items():  # which run the model again: the last thing to do
                if found:
                    title = f'image {place}: where the main experts e look, and their weights'
                    figure = draw_looks(study.model, inputs, tracer, name, found, title)
                    write(figure, name, 'cam', place, 'Where the main experts look')
    return written


def pictures_of(
    experts: dict, folder: Path, looks: Sequence[tuple[str, str, Path]] = ()
) -> list[dict]:
    """What the report shows as pictures.

    Args:
        experts: The content of ``experts.json``.
        folder: Of the figures, where :func:`~mmdet_moe.analysis.report.figures.write_figures` has
            left those of this run alone.
        looks: From :func:`write_looks`.

    Returns:
        ``layer``, ``title`` and ``source`` (a data URI) of each.
    """
    figures = [
        (layer, title, folder_of(folder, layer) / f'{name}.png')
        for layer in experts['layers']
        for name, title in _CHOICES.items()
    ]
    return [
        {'layer': layer, 'title': title, 'source': _data_uri(path, is_photograph)}
        for found, is_photograph in ((figures, False), (looks, True))
        for layer, title, path in found
        if path.exists()
    ]


def _data_uri(path: Path, is_photograph: bool) -> str:
    image = Image.open(path).convert('RGB')
    image.thumbnail((_WIDTH, 4 * _WIDTH))
    content = io.BytesIO()
    if is_photograph:
        image.save(content, 'JPEG', quality=82)
    else:
        image.quantize(32).save(content, 'PNG', optimize=True)
    kind = 'jpeg' if is_photograph else 'png'
    return f'data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}'
