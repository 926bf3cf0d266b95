"""Can a network tell a rotated image by anything but its content?

::

    python -m research.checks.rotation_traces

The images are noise that looks the same in all directions, so that nothing but traces of the
rotation is left to go by. A network of three convolutions is trained on the two versions of four
fifths of them (:class:`mmdet_moe.datasets.RotatedPairs`), and asked about the others: of versions
that were blurred before, and of some that were not.
"""

import argparse

import numpy as np
import torch
from torch import nn

from mmdet_moe.datasets.rotated_pairs import rotated_square

EPOCHS, BATCH = 6, 128


def noise_without_direction(count: int, size: int = 32, period: int = 128) -> np.ndarray:
    """Noise whose amplitude falls with the frequency, as that of photographs does.

    Returns:
        (count, size, size) uint8.
    """
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(period), np.fft.fftfreq(period)))
    frequency[0, 0] = np.inf
    amplitude = np.where(frequency <= 0.5, 1 / frequency, 0)  # no more of it along the diagonals
    rng = np.random.default_rng(0)
    white = (rng.normal(size=(period, period)) for _ in range(count))
    noise = np.stack(
        [np.fft.ifft2(amplitude * np.fft.fft2(one)).real[:size, :size] for one in white]
    )
    return (128 + 40 * noise / noise.std()).round().clip(0, 255).astype(np.uint8)


def pairs(images: np.ndarray, blur: float) -> np.ndarray:
    """Upright and rotated version in turns, (2 N, H, W) uint8 of (N, H, W)."""
    return np.stack([rotated_square(i, 30, rotate, blur) for i in images for rotate in (0, 1)])


def accuracy(shown: np.ndarray) -> float:
    """Share of right answers of the trained network on the last fifth of the pairs."""
    x = torch.from_numpy((shown.astype(np.float32) - 128) / 60)[:, None]
    y = torch.arange(len(x)) % 2
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    head = (nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 64, 2))
    network = nn.Sequential(*layers, *head)
    train = len(x) // 10 * 8
    optimizer = torch.optim.Adam(network.parameters())
    steps = EPOCHS * -(-train // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(train).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        answers = torch.cat([network(part).argmax(1) for part in x[train:].split(500)])
    return (answers == y[train:]).float().mean().item()


def main() -> None:
    """Print the share of right answers for each blur."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--images', type=int, default=12_000, metavar='N', help='(%(default)s)')
    parser.add_argument('--blurs', type=float, nargs='+', default=[0.0, 1.0], metavar='PIXELS')
    args = parser.parse_args()
    images = noise_without_direction(args.images)
    asked = 2 * args.images - 2 * args.images // 10 * 8
    print(f'chance: 50.0 % ± {50 / asked**0.5:.1f} of {asked} versions')
    for blur in args.blurs:
        print(f'blurred by {blur:g} px: {100 * accuracy(pairs(images, blur)):.1f} %', flush=True)


if __name__ == '__main__':
    main()
