"""Changed images that a classifier is wrong about: the attacks of a library, on pixels in [0, 1].

An image here is float32 with values in [0, 1], 255 being 1: what the data pipeline gives, after its
resizing and before the model's data preprocessor, whose normalisation and order of channels are
part of what is differentiated. So ``eps`` is in the unit of the image as it is stored: 8/255 is 8
of 255 steps in each channel of each pixel. Attacked images are not rounded to whole steps.

What is differentiated is the model as it predicts: evaluation mode, without the routers' noise. The
choice of the k best experts has no gradient; the attack knows the weights of those that are chosen,
and sees others only once a step has changed the choice. An attack is a search, so what it finds is
an upper bound of the accuracy that a better one would leave.

The search is that of the Adversarial Robustness Toolbox, ``pip install 'mmdet_moe[attacks]'``. Of
all images that it tries, the worst for the model counts, as its own answer may be another one: the
last one (PGD), or one that is wrong at the end (AutoPGD).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError

#: Images that are attacked at once; the toolbox predicts as many.
MAX_BATCH = 128
#: Of the options of the command line, what tables call them.
ATTACKS = {'pgd': 'PGD', 'apgd': 'AutoPGD'}
Logits = Callable[[Tensor], Tensor]
_ROUNDING = 1e-6  # of an image's difference from another one


@dataclass(frozen=True)
class Attack:
    """A search in the l_inf ball around an image for one that the model is wrong about.

    Attributes:
        kind: ``'pgd'``: projected gradient ascent of the cross-entropy from a random start, steps
            of ``eps / 4`` (arXiv 1706.06083). ``'apgd'``: with momentum and steps that begin with
            ``2 eps`` and adapt to each image (arXiv 2003.01690).
        eps: Radius in 0..1, the unit of the pixels; 0 changes nothing.
        steps: Of the search.
    """

    kind: str
    eps: float
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in ATTACKS:
            raise ConfigError(f'--attack={self.kind} is unknown; use one of {tuple(ATTACKS)}')
        if not 0 <= self.eps <= 1:
            raise ConfigError(
                f'--eps={self.eps:g} must lie in 0..1, for pixels do; write 8/255 for 8 of 255'
            )
        if self.steps < 1:
            raise ConfigError(f'--steps={self.steps} must be at least 1')
        try:
            version('adversarial-robustness-toolbox')  # its module shares its name with others
        except PackageNotFoundError:
            raise ConfigError(
                'attacks need the Adversarial Robustness Toolbox, which is missing: pip install '
                "'mmdet_moe[attacks]'"
            ) from None

    def __call__(self, logits: Logits, x: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
        """The attacked images.

        Args:
            logits: What gives (N, classes) for such images, differentiable.
            x: float32 (N, C, H, W) in [0, 1], at most :data:`MAX_BATCH`, of which the model is
                right.
            labels: int64 (N,).
            seed: Of the random start.

        Returns:
            As ``x``; of the images tried the one that speaks most against the label, by the largest
            other logit less that of the label.
        """
        if self.eps == 0 or not len(x):
            return x
        from art.attacks.evasion import (
            AutoProjectedGradientDescent,
            ProjectedGradientDescentPyTorch,
        )
        from art.estimators.classification import PyTorchClassifier

        watched = _Watched(logits, x, labels, self.eps)
        with torch.no_grad():
            classes = logits(x[:1]).shape[1]
        estimator = PyTorchClassifier(
            watched, nn.CrossEntropyLoss(), x.shape[1:], classes, clip_values=(0.0, 1.0),
            device_type='cpu',
        )  # fmt: skip
        options = {
            'eps': self.eps, 'max_iter': self.steps, 'batch_size': len(x), 'verbose': False
        }  # fmt: skip
        if self.kind == 'pgd':
            attack = ProjectedGradientDescentPyTorch(
                estimator, eps_step=self.eps / 4, num_random_init=1, **options
            )
        else:
            attack = AutoProjectedGradientDescent(
                estimator, eps_step=2 * self.eps, nb_random_init=1, **options
            )
        with _seeded(seed), torch.enable_grad():
            # As one row for each image, because two classes have another format as numbers.
            truth = np.eye(classes, dtype=np.float32)[labels.cpu().numpy()]
            found = attack.generate(x.cpu().numpy(), truth)
        with torch.no_grad():
            watched(torch.from_numpy(found))
        return watched.worst


class _Watched(nn.Module):
    """A model as the toolbox sees it, on the CPU, which keeps the worst image that it was given."""

    def __init__(self, logits: Logits, x: Tensor, labels: Tensor, eps: float) -> None:
        super().__init__()
        self._logits, self._x, self._labels, self._eps = logits, x, labels, eps
        self.worst = x.clone()
        self._margin = torch.full(labels.shape, float('-inf'), device=x.device)

    def forward(self, x: Tensor) -> Tensor:
        tried = x.to(self._x.device)
        logits = self._logits(tried)
        if len(x) == len(self._x):
            margin = margins(logits.detach(), self._labels)
            # The toolbox begins with an image of its own.
            is_near = (tried.detach() - self._x).abs().flatten(1).amax(1) <= self._eps + _ROUNDING
            worse = is_near & (margin > self._margin)
            self._margin[worse] = margin[worse]
            self.worst[worse] = tried.detach()[worse]
        return logits.to(x.device)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,): the largest other logit less that of the label; above 0 the model is wrong."""
    own = labels[:, None]
    return logits.scatter(1, own, float('-inf')).amax(1) - logits.gather(1, own)[:, 0]


def noisy(x: Tensor, eps: float, seed: int = 0) -> Tensor:
    """Images (N, C, H, W) with ``+eps`` or ``-eps`` at random in each value, within [0, 1].

    The control of an attack: as large in every norm as one that goes to the edge everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
    return (x + eps * signs.to(x)).clamp(0, 1)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The toolbox draws from NumPy's global generator, which is afterwards as it was."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
