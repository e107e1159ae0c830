"""The ECG domain's encoder and warp of nn.Conv1d, as the published code has its own. Slower; tested
to equal the domain's.
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from bench.domains import ecg


def plain(module: nn.Module) -> nn.Module:
    """A copy with layers for [n, channels, t] in place of those for images of height 1."""
    if isinstance(module, nn.Conv2d):
        made = nn.Conv1d(
            module.in_channels,
            module.out_channels,
            module.kernel_size[1],
            module.stride[1],
            module.padding[1],
            bias=module.bias is not None,
        )
        state = {
            name: p[:, :, 0] if name == "weight" else p for name, p in module.state_dict().items()
        }
    elif isinstance(module, nn.BatchNorm2d):
        made = nn.BatchNorm1d(module.num_features, track_running_stats=module.track_running_stats)
        state = module.state_dict()
    elif isinstance(module, nn.MaxPool2d):
        return nn.MaxPool1d(module.kernel_size[1], module.stride[1], module.padding[1])
    else:
        made = copy.deepcopy(module)
        for name, child in module.named_children():
            setattr(made, name, plain(child))
        return made
    made.to(module.weight).load_state_dict(state)  # of its dtype and on its device
    return made


class PlainResNet18(nn.Module):
    """The same function as the `ecg.ResNet18` whose parameters it copies."""

    def __init__(self, resnet: ecg.ResNet18):
        super().__init__()
        self.stem, self.blocks = plain(resnet.stem), plain(resnet.blocks)

    def forward(self, signals: Tensor) -> Tensor:
        return self.blocks(self.stem(F.pad(signals, (0, -signals.shape[2] % 64)))).mean(2)


class PlainWarp(ecg.WarpAugmentation):
    """The same function as the `ecg.WarpAugmentation` whose parameters it copies."""

    def __init__(self, warp: ecg.WarpAugmentation):
        super().__init__(warp.layers[0][0].in_channels, 1.0)
        self.to(warp.scale).load_state_dict(warp.state_dict())  # of its dtype and on its device
        self.layers = plain(self.layers)

    def magnitudes(self, signals: Tensor) -> Tensor:
        return 2 * self.last(self.layers(signals).mean(2)).squeeze(1).sigmoid()
