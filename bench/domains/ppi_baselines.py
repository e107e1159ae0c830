"""What task weights are compared to on protein interaction graphs: FT tasks that join PT, and a choice of PT tasks.

    python metapt.py pretrain bench/domains/ppi_baselines.py:CoTrain            FT tasks beside the PT tasks
    python metapt.py pretrain bench/domains/ppi_baselines.py:PCGrad             the same without conflicting gradients
    python metapt.py meta bench/domains/ppi_baselines.py:WeightedCoTrain        φ weighs PT and FT tasks together
    python metapt.py meta bench/domains/ppi_baselines.py:Selection              φ chooses PT tasks
    python metapt.py meta bench/domains/ppi_baselines.py:Selection --agnostic   and is learned without FT data

Raghu et al., NeurIPS 2021, section 5.1; PCGrad: Yu et al., NeurIPS 2020. Data and everything else: ppi.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

import metapt

PPI = metapt.find_domain("ppi")


class CoTrain(PPI):
    """L_PT plus the FT tasks' mean BCE over the graphs whose FT labels may be seen before FT."""

    divisible = False  # ranks do not know how many of the others' graphs have labels

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        self.labelled = torch.zeros_like(self.graphs.sizes, dtype=torch.bool)
        known = min(
            self.access["finetune"], self.sizes["finetune"] - metapt.held_out(self)
        )  # not what `meta` chooses by
        rows = self.rows["finetune"][:known]
        self.labelled[rows] = True
        self.outputs += len(self.seen)
        self.rates = torch.cat([self.rates, self.term_rates(rows, self.seen_tasks)])

    def task_losses(self, network, index, live):
        """BCE of the PT tasks, then of the FT tasks [tasks], as a function of θ: each averaged over the graphs with labels."""
        rows, tasks = self.rows["pretrain"][index], torch.cat([self.pretrain_tasks, self.seen_tasks])
        batch, targets, known = self.inputs("pretrain", index), self.graphs.labels(rows, tasks), self.labelled[rows]
        share = torch.full_like(targets, 1 / len(rows))
        share[:, len(self.pretrain_tasks) :] = known[:, None] / known.sum().clamp(min=1)

        def losses(theta):
            outputs = metapt.call(network, theta, batch, train=live or self.settings.meta_train, live=live)
            return (share * F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")).sum(0)

        return losses

    def pretrain_losses(self, network, meta, index, live):
        """Both, as a function of θ and φ."""
        losses, tasks = self.task_losses(network, index, live), len(self.pretrain_tasks)

        def both(theta, phi):
            each = losses(theta)
            return torch.stack([metapt.call(meta, phi, each[:tasks]), each[tasks:].mean()])

        return both

    def pretrain_loss(self, network, meta, index, progress, live):
        losses = self.pretrain_losses(network, meta, index, live)
        return lambda theta, phi: losses(theta, phi).sum()


class WeightedCoTrain(CoTrain):
    """CoTrain with φ: a weight for each FT task beside those of the PT tasks. All weights 1, where φ begins, is CoTrain."""

    def meta(self):
        return self.Weights(self.outputs).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        losses, (tasks, others) = self.task_losses(network, index, live), (len(self.pretrain_tasks), len(self.seen))
        # As in CoTrain the PT tasks count together as much as the FT tasks do.
        scale = torch.tensor([1 / tasks] * tasks + [1 / others] * others, device=self.device) * self.outputs
        return lambda theta, phi: metapt.call(meta, phi, losses(theta) * scale)

    def table(self, meta):
        tasks = torch.cat([self.pretrain_tasks, self.seen_tasks]).tolist()
        terms = [self.graphs.about["terms"][task] for task in tasks]
        return ["GO term", "weight"], list(zip(terms, meta.weights().tolist(), strict=True))

    def figures(self, meta):
        return {}


class PCGrad(CoTrain):
    """Each of the two gradients loses what of it goes against the other."""

    def pretrain_loss(self, network, meta, index, progress, live):
        return self.pretrain_losses(network, meta, index, live)

    def backward(self, value, theta):
        parameters = list(theta.values())
        gradients = [torch.autograd.grad(part, parameters, retain_graph=True, materialize_grads=True) for part in value]
        a, b = (torch.cat([g.reshape(-1) for g in gradient]) for gradient in gradients)
        if (dot := a @ b) < 0:
            a, b = a - dot / (b @ b) * b, b - dot / (a @ a) * a
        for p, gradient in zip(parameters, (a + b).split([p.numel() for p in parameters]), strict=True):
            p.grad = gradient.view_as(p)


class TaskChoice(PPI.Weights):
    """φ chooses tasks, which then count alike."""

    chosen = None  # bool, [tasks]

    def choose(self, k: int) -> None:
        """k tasks without replacement, in proportion to exp φ_t (Gumbel top-k).

        Drawn, not the k best: at the start all φ_t are equal, and a task that is never chosen would never be tried.
        """
        noise = -torch.rand_like(self.task_logits).clamp_min(1e-20).log()
        self.chosen = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
        self.chosen[(self.task_logits.detach() - noise.log()).topk(k).indices] = True

    def forward(self, losses):
        """The mean of losses [tasks] over the chosen ones.

        A choice has no derivative: the weights lend it theirs (straight-through, Bengio et al. 2013), so that the tasks
        that were not chosen learn what they would have been worth too.
        """
        weights, alike = self.weights(), self.chosen * (len(losses) / self.chosen.sum())
        return ((alike + weights - weights.detach()) * losses).mean()


class SelectionSettings(PPI.Settings):
    select: int = metapt.option(0, "PT tasks chosen an episode; 0: a quarter", check=metapt.AT_LEAST_0)
    agnostic: bool = metapt.option(False, "L_V is of PT tasks left out, not of FT's", learning=True)


class Selection(PPI):
    """An episode (P PT steps and a meta step) trains on PT tasks that φ draws; `agnostic`: the others validate it."""

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
            self.seen, self.seen_tasks = len(self.finetune_tasks) + left_out, self.pretrain_tasks[left_out]

    def head(self):
        """The FT tasks; and, where φ is learned without them, the PT tasks after these."""
        outputs = len(self.finetune_tasks) + self.settings.agnostic * len(self.pretrain_tasks)
        return nn.Linear(2 * self.settings.width, outputs).to(self.device)
