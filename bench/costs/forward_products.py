"""vᵀ∇²_θφ L_PT on electrocardiograms: forward-over-reverse beside exact products and differences.

    python -m bench.costs.forward_products --data data

It is the derivative along v of the gradient by φ, so one backward pass on dual numbers. It is taken
by the two views in place of φ, as torch cannot differentiate `grid_sample`'s backward pass forward;
how φ makes the views is free of θ, and costs each way the same.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.autograd import forward_ad

import metapt
from bench.accuracy.precision import cosine, make
from bench.costs import counting
from bench.domains.ecg import nt_xent


def main(
    data: Annotated[Path, typer.Option(help="Where prepared data lie")] = Path("data"),
    repeats: Annotated[int, typer.Option(help="Products of each kind that are timed")] = 7,
):
    torch.set_num_threads(1)
    training = metapt.Training(make("ecg", data), learn=True)
    domain, network, meta = training.domain, training.network, training.meta
    signals = domain.inputs("pretrain", training.batches["meta"].next())
    made = metapt.call(meta, metapt.detached(meta), signals, train=True)
    views = {str(i): view.requires_grad_() for i, view in enumerate(made)}
    theta = {name: t.requires_grad_() for name, t in metapt.detached(network).items()}
    v = {name: torch.randn_like(t) for name, t in theta.items()}
    size = domain.settings.hvp_step / torch.cat([t.flatten() for t in v.values()]).norm()

    def loss(at):
        outputs = [metapt.call(network, at, view, train=True) for view in views.values()]
        return nt_xent(*outputs, domain.settings.temperature)

    def exact():
        slopes = metapt.gradient(loss(theta), theta, create_graph=True)
        return metapt.gradient(sum((slopes[name] * v[name]).sum() for name in v), views)

    def differences():
        ends = []
        for sign in (1, -1):
            moved = {name: t.detach() + sign * size * v[name] for name, t in theta.items()}
            ends.append(metapt.gradient(loss(moved), views))
        return {name: (ends[0][name] - ends[1][name]) / (2 * size) for name in views}

    def forward_over_reverse():
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(t.detach(), v[name]) for name, t in theta.items()}
            slopes = metapt.gradient(loss(dual), views)
            return {name: forward_ad.unpack_dual(g).tangent for name, g in slopes.items()}

    ways = {way.__name__: way for way in (exact, differences, forward_over_reverse)}
    seconds = counting.in_turn(ways, repeats, domain.device, time.process_time)
    found = {name: torch.cat([g.flatten() for g in way().values()]) for name, way in ways.items()}
    of_exact = found["exact"]
    for name, product in found.items():
        off = ((product - of_exact).norm() / of_exact.norm()).item()
        ratios = np.divide(seconds[name], seconds["differences"])
        low, middle, high = np.percentile(ratios, [0, 50, 100])
        time_text = f"{middle:.2f} ({low:.2f} to {high:.2f}) of the differences' time"
        print(f"{name}: cosine {cosine(product, of_exact):.3f}, off by {off:.0e}, {time_text}")


if __name__ == "__main__":
    typer.run(main)
