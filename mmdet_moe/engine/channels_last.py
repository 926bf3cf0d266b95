"""Feature maps pixel by pixel in memory: ``tools/train.py --channels-last``."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner


class ChannelsLastHook(Hook):
    """Gives the weights of convolutions that memory format before the training begins.

    A convolution whose weights lie so makes maps that do, whatever it is given. Only once the
    weights have been drawn or loaded: random numbers are drawn in the order of the memory, so the
    model would be another one.
    """

    def before_train(self, runner: Runner) -> None:
        """Change the format in place; parameters stay the same objects."""
        runner.model.to(memory_format=torch.channels_last)
