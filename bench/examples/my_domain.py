"""A domain of your own: digits, and five yes-or-no tasks to pre-train on, two of which are noise.

python metapt.py meta bench/examples/my_domain.py --out run

PT answers the five tasks, FT asks which digit it is, and φ is one weight for each task. Two tasks
are coin tosses: their weights should fall.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import metapt

TASKS = ("even", "five or more", "prime", "a coin", "another coin")


@dataclass(frozen=True)
class DigitTasksSettings(metapt.Settings):
    # Other defaults than metapt's; their help stays.
    steps: int = 1000
    meta_every: int = 5
    meta_lr: float = 0.02
    unroll_lr: float = 1e-3
    compare: int = 2
    # A knob of its own: --width on the command line.
    width: int = metapt.setting(64, "Features of the encoder", check=metapt.AT_LEAST_1)


class DigitTasks(metapt.Domain):
    Settings = DigitTasksSettings

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images).float() / 16
        y = torch.from_numpy(labels)
        prime = (y == 2) | (y == 3) | (y == 5) | (y == 7)
        coins = torch.randint(2, (2, len(y)))
        tasks = torch.stack([y % 2, y >= 5, prime, *coins], dim=1).float()

        # Each part has examples of its own. An index counts within a part.
        names = ("pretrain", "finetune", "validation", "test")
        parts = torch.randperm(len(y)).split([1000, 100, 300, 397])
        self.sizes = {name: len(rows) for name, rows in zip(names, parts, strict=True)}
        self.x = {name: x[rows].to(device) for name, rows in zip(names, parts, strict=True)}
        self.y = {name: y[rows].to(device) for name, rows in zip(names, parts, strict=True)}
        self.tasks = tasks[parts[0]].to(device)

    def network(self):
        """θ: an encoder, and PT's head with an output for each task."""
        encoder = nn.Sequential(nn.Linear(64, self.settings.width), nn.ReLU())
        head = nn.Linear(self.settings.width, len(TASKS))
        return metapt.Network(encoder, head).to(self.device)

    def head(self):
        """ψ: from the encoder's features to the ten digits."""
        return nn.Linear(self.settings.width, 10).to(self.device)

    def meta(self):
        """φ: a weight for each task, 5 together."""
        logits = torch.zeros(len(TASKS))
        return nn.ParameterDict({"logits": logits}).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        """L_PT(θ, φ) on a batch: the tasks' losses, weighted."""
        x = self.inputs("pretrain", index)
        answers = self.tasks[metapt.to_device(index, self.device)]

        def loss(theta, phi):
            outputs = metapt.call(network, theta, x, train=True, live=live)
            losses = F.binary_cross_entropy_with_logits(outputs, answers, reduction="none")
            return phi["logits"].softmax(0) @ losses.mean(0)

        return loss

    def inputs(self, part, index):
        """What the encoder sees. Example numbers come on the CPU, wherever the data lie."""
        return self.x[part][metapt.to_device(index, self.device)]

    def targets(self, part, index):
        """What FT should say, which is scored by accuracy unless `score` is redefined."""
        return self.y[part][metapt.to_device(index, self.device)]

    def table(self, meta):
        """φ by name, which metapt writes to phi.csv."""
        weights = len(TASKS) * meta["logits"].softmax(0)
        return ["task", "weight"], list(zip(TASKS, weights.tolist(), strict=True))

    def phi_from_table(self, values):
        """The way back, so that `pretrain --phi phi.csv` takes weights that were set by hand."""
        weights = torch.tensor(values)
        return {"logits": weights.log()}
