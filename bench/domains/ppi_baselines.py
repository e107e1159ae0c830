"""What task weights are compared to on protein graphs: FT tasks in PT, and a choice of PT tasks.

    python metapt.py pretrain bench/domains/ppi_baselines.py:CoTrain      FT tasks beside PT's
    python metapt.py pretrain bench/domains/ppi_baselines.py:PCGrad       without conflicts
    python metapt.py meta bench/domains/ppi_baselines.py:WeightedCoTrain  φ weighs both
    python metapt.py meta bench/domains/ppi_baselines.py:Selection        φ chooses PT tasks
    python metapt.py meta bench/domains/ppi_baselines.py:Selection --agnostic
                                                                  and is learned without FT data

Raghu et al., NeurIPS 2021, section 5.1; PCGrad: Yu et al., NeurIPS 2020. Data and all else: ppi.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metapt

PPI = metapt.find_domain("ppi")


# ------------------------------------------------------------------------------------------------
# FT tasks join PT


class CoTrain(PPI):
    """L_PT plus the FT tasks' mean BCE over the graphs whose FT labels may be seen before FT."""

    mean_over_examples = False  # How many graphs of a batch have FT labels differs.

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        # What `meta` judges φ by in the end is not among what may be seen.
        not_held_out = self.sizes["finetune"] - metapt.held_out_count(self)
        known = min(self.access["finetune"], not_held_out)
        rows = self.rows["finetune"][:known]
        # By row of the graphs, on the CPU
        self.labelled = torch.zeros(len(self.graphs.sizes), dtype=torch.bool)
        self.labelled[rows] = True
        self.outputs += len(self.seen)
        self.rates = torch.cat([self.rates, self.term_rates(rows, self.seen_tasks)])

    def all_tasks(self) -> Tensor:
        """The PT tasks, then the FT tasks that are seen before FT."""
        return torch.cat([self.pretrain_tasks, self.seen_tasks])

    def task_losses(self, network, index, live):
        """The BCE of all tasks [tasks] as a function of θ.

        Each is averaged over the graphs that have labels of it: all for a PT task, for an FT task
        those whose FT labels may be seen.
        """
        rows = self.rows["pretrain"][index]
        batch = self.inputs("pretrain", index)
        targets = self.graphs.labels(rows, self.all_tasks())
        known = metapt.to_device(self.labelled[rows], self.device)
        share = torch.full_like(targets, 1 / len(rows))
        share[:, len(self.pretrain_tasks) :] = known[:, None] / known.sum().clamp(min=1)
        train = live or self.settings.meta_train

        def losses(theta):
            outputs = metapt.call(network, theta, batch, train=train, live=live)
            each = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
            return (share * each).sum(0)

        return losses

    def pretrain_losses(self, network, meta, index, live):
        """The weighted loss of the PT tasks and that of the FT tasks [2], as a function of θ, φ."""
        task_losses = self.task_losses(network, index, live)
        tasks = len(self.pretrain_tasks)

        def losses(theta, phi):
            each = task_losses(theta)
            of_pretrain = metapt.call(meta, phi, each[:tasks])
            of_finetune = each[tasks:].mean()
            return torch.stack([of_pretrain, of_finetune])

        return losses

    def pretrain_loss(self, network, meta, index, progress, live):
        losses = self.pretrain_losses(network, meta, index, live)
        return lambda theta, phi: losses(theta, phi).sum()


class WeightedCoTrain(CoTrain):
    """CoTrain with φ: a weight for each FT task beside those of the PT tasks.

    With all weights 1, where φ begins, it is CoTrain.
    """

    def meta(self):
        return self.Weights(self.outputs).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        losses = self.task_losses(network, index, live)
        pretrain_tasks = len(self.pretrain_tasks)
        finetune_tasks = len(self.seen)
        # As in CoTrain the PT tasks count together as much as the FT tasks do.
        shares = torch.empty(self.outputs, device=self.device)
        shares[:pretrain_tasks] = 1 / pretrain_tasks
        shares[pretrain_tasks:] = 1 / finetune_tasks
        scale = shares * self.outputs
        return lambda theta, phi: metapt.call(meta, phi, losses(theta) * scale)

    def weighted_tasks(self):
        return self.all_tasks()

    def figures(self, meta):
        return {}


class PCGrad(CoTrain):
    """Each of the two gradients loses what of it goes against the other."""

    def pretrain_loss(self, network, meta, index, progress, live):
        return self.pretrain_losses(network, meta, index, live)

    def backward(self, value, theta):
        parameters = list(theta.values())
        of_pretrain, of_finetune = value
        a = flat_gradient(of_pretrain, parameters)
        b = flat_gradient(of_finetune, parameters)
        dot = a @ b
        a_without = a - dot / (b @ b) * b
        b_without = b - dot / (a @ a) * a
        # Not by an `if`, which would wait for the device.
        total = torch.where(dot < 0, a_without + b_without, a + b)
        pieces = total.split([p.numel() for p in parameters])
        for p, gradient in zip(parameters, pieces, strict=True):
            p.grad = gradient.view_as(p)


def flat_gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """The gradient as one vector; its graph is kept for the next one."""
    gradient = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in gradient])


# ------------------------------------------------------------------------------------------------
# φ chooses PT tasks


class TaskChoice(PPI.Weights):
    """φ chooses tasks, which then count alike."""

    chosen: Tensor | None = None  # bool [tasks], once `choose` was called

    def choose(self, k: int) -> None:
        """Draws k tasks without replacement, in proportion to exp φ_t (Gumbel top-k).

        They are drawn, and not the k best: at the start all φ_t are equal, and a task that is never
        chosen would never be tried.
        """
        exponential = -torch.rand_like(self.task_logits).clamp_min(1e-20).log()
        gumbel = -exponential.log()
        best = (self.task_logits.detach() + gumbel).topk(k).indices
        self.chosen = torch.zeros_like(self.task_logits, dtype=torch.bool)
        self.chosen[best] = True

    def forward(self, losses):
        """The mean of losses [tasks] over the chosen ones.

        A choice has no derivative: the weights lend it theirs (straight-through, Bengio et al.
        2013), so that the tasks that were not chosen learn what they would have been worth too.
        """
        weights = self.weights()
        of_chosen = self.chosen * (len(losses) / self.chosen.sum())
        straight_through = of_chosen + weights - weights.detach()
        return (straight_through * losses).mean()


@dataclass(frozen=True)
class SelectionSettings(PPI.Settings):
    select: int = metapt.setting(
        0, "PT tasks chosen a round; 0: a quarter", check=metapt.AT_LEAST_0
    )
    agnostic: bool = metapt.setting(
        False, "L_V is of PT tasks left out, not of FT's", learning=True
    )


class Selection(PPI):
    """Each round trains on PT tasks that φ draws.

    With --agnostic the PT tasks that were not drawn validate the round, and no FT data are seen.
    """

    Settings = SelectionSettings
    Weights = TaskChoice

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        tasks = len(self.pretrain_tasks)
        settings.require(settings.select < tasks, "select", f"less than the {tasks} PT tasks")
        self.select = settings.select or max(1, tasks // 4)

    def begin_episode(self, meta):
        meta.choose(self.select)
        if self.settings.agnostic:
            left_out = (~meta.chosen).nonzero()[:, 0]
            self.seen = len(self.finetune_tasks) + left_out
            self.seen_tasks = self.pretrain_tasks[left_out]

    def head(self):
        """The FT tasks; and, where φ is learned without them, the PT tasks after these."""
        outputs = len(self.finetune_tasks)
        if self.settings.agnostic:
            outputs += len(self.pretrain_tasks)
        return nn.Linear(2 * self.settings.width, outputs).to(self.device)
