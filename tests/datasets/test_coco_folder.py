"""Images as OpenCV reads them."""

import cv2
import numpy as np
import pytest
from PIL import Image

from mmdet_moe.datasets.coco_folder import Labelled, image_size, upright, write_folder
from mmdet_moe.errors import ConfigError


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif'])
@pytest.mark.parametrize('orientation', [1, 3, 6])
def test_orientation(tmp_path, suffix, orientation):
    file, exif = tmp_path / f'a.{suffix}', Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((24, 48, 3), np.uint8)
    pixels[:, :24] = 200
    Image.fromarray(pixels).save(file, exif=exif)
    theirs = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert image_size(file) == theirs.shape[1::-1]
    with Image.open(file) as image:
        np.testing.assert_allclose(np.asarray(upright(image), int), theirs, atol=8)


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'format': 'png'}])
def test_images_that_are_cut_off(tmp_path, options):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.jpg', **options)
    whole = (tmp_path / 'a.jpg').read_bytes()
    assert image_size(tmp_path / 'a.jpg') == (48, 24)
    (tmp_path / 'a.jpg').write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(ConfigError, match=r'a\.jpg cannot be read as an image \(OSError: '):
        image_size(tmp_path / 'a.jpg')


def test_grey_of_16_bits(tmp_path):
    values = np.arange(800, dtype=np.uint16).reshape(20, 40) * 80
    Image.fromarray(values).save(tmp_path / 'a.png')
    with Image.open(tmp_path / 'a.png') as image:
        np.testing.assert_allclose(
            np.asarray(upright(image), int), cv2.imread(str(tmp_path / 'a.png')), atol=1
        )


@pytest.mark.parametrize('name', ['../evil.png', 'a/../../evil.png', '/evil.png'])
def test_names_that_lead_out(tmp_path, name):
    Image.new('RGB', (4, 4)).save(tmp_path / 'a.png')
    item = Labelled(tmp_path / 'a.png', name, (4, 4), ())
    with pytest.raises(ConfigError, match='leads out of the data set'):
        write_folder(tmp_path / 'deep' / 'out', {'train': [item]}, lambda item: item, ('a',), {})
    assert not list(tmp_path.rglob('evil.png'))
