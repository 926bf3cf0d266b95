"""Pictures of the report: where the experts look, as files and inside the page."""

import base64
import io
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_models import MOE_NECK, build_single, make_batch

from mmdet_moe.analysis.attribution import Tracer
from mmdet_moe.analysis.image_demo import drawing, looks
from mmdet_moe.analysis.report import pictures as pictures_module
from mmdet_moe.analysis.report.explorer.report import FOLDER
from mmdet_moe.analysis.report.pictures import pictures_of, write_looks

pytest.importorskip('captum')


class Data:
    classes = ('a', 'b', 'c')

    chosen = (4, 7, 9)

    def __len__(self):
        return 3

    def batches(self, images, batch_size, num_workers):
        (first,) = images
        yield {key: value[first : first + 1] for key, value in make_batch().items()}


def test_looks_of_images(randomise, tmp_path, monkeypatch):
    """Maps of the routing where images are divided, and activation maps of all layers."""
    monkeypatch.setattr(drawing, 'SHORTEST', 120)  # small pictures, few panels
    monkeypatch.setattr(drawing, 'LONGEST', 200)
    monkeypatch.setattr(looks, 'MAX_LOOKS', 1)
    model = randomise(build_single('moe retina', neck=MOE_NECK)).eval()
    tracer = Tracer(model)
    study = SimpleNamespace(model=model, tracer=tracer, data=Data(), score_thr=0.0)
    monkeypatch.setattr(pictures_module, 'drawn', lambda *of: {(3, 2): [1, 2]}[of])
    found = write_looks(study, 2, tmp_path)
    neck = next(name for name in tracer.layers if name.startswith('neck'))
    names = [(layer, path.relative_to(tmp_path).as_posix()) for layer, _, path in found]
    for place in (7, 9):
        assert (neck, f'{neck}/routing_{place:06d}.png') in names
        for layer in (neck, 'bbox_head.cls_moe', 'bbox_head.reg_moe'):
            assert (layer, f'{layer}/cam_{place:06d}.png') in names
    assert not any('bbox_head' in layer and 'routing' in name for layer, name in names)
    assert all(path.exists() for _, _, path in found)
    figure = tmp_path / 'bbox_head.cls_moe' / 'counterfactual.png'
    Image.new('RGB', (2000, 100)).save(figure)
    pictures = pictures_of({'layers': {'bbox_head.cls_moe': {}}}, tmp_path, found)
    assert len(pictures) == 1 + len(found)
    for picture, kind in zip(pictures, ['PNG', *['JPEG'] * len(found)], strict=True):
        head, _, content = picture['source'].partition(',')
        assert head == f'data:image/{kind.lower()};base64'
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        assert image.format == kind
        assert image.width <= 1100


def test_script_asks_for_no_network():
    for name in ('flow.js', 'choices.css', 'choices.html.j2'):
        assert '://' not in (FOLDER / name).read_text()
