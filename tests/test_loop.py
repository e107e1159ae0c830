"""Chapters 3 to 5 of metapt.py: settings and domains, Algorithm 1, fine-tuning and comparisons, on a domain in miniature."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from tools import Toy, ToySettings, domain_of, find_domain, flat, spy, training
from torch import nn

import metapt

# 3. Settings and Domain

WRONG = {  # settings: what is wrong with them
    "steps": [10.0, True, "10", 0], "seed": [-1, 2**32], "batch_size": [0], "lr": ["fast", math.nan, math.inf, 0.0],
    "cosine": [1], "warmup": [-1, 1001], "unroll_steps": [-1], "unroll_scope": ["tail"], "unroll_hvp": ["guessed"],
    "unroll_lr": [0.0], "unroll_batch_size": [0], "validation_batch_size": [0], "meta_every": [0], "meta_lr": [-1.0],
    "meta_batch_size": [0], "meta_lr_decay": [0.0], "average": [1.0, -0.1], "alpha": ["x", 0.0], "damping": [-1.0, math.inf],
    "terms": [-1], "hvp_step": [0.0], "sizes": ["ten", "10,,20"], "compare": [-1], "measure_scope": ["tail"],
    "measure_lr": [0.0], "measure_steps": [0], "measure_epochs": [-1], "measure_batch_size": [0],
    "solver": [1, "magic", "nystrom"], "hvp": ["guessed"], "preconditioner": ["sgd", None],
    "particles": ["x", "", "0", "2", "3,1", "1,1", "3:0.5,3", "1:0.5,3", "3:0.8,2:0.5,1", "3:0.5,2", "3:0,1", "3:-1,1",
                  "3:1,1", "3:2,1", "3:x,1", "3:nan,1", "1:0.5"],
}  # fmt: skip
NAMED_OTHERWISE = {
    ("solver", "magic"): "Solver.method",
    ("hvp", "guessed"): "Solver.hvp",
    ("solver", "nystrom"): "--damping",
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_settings_that_cannot_be_are_refused_by_name(name, value):
    with pytest.raises(metapt.BadInput) as caught:
        metapt.Settings(**{name: value})
    subject = NAMED_OTHERWISE.get((name, value), f"{metapt.flag(name)} is {value!r}")
    assert str(caught.value).startswith(subject) and ", expected" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("solver", ["neumann", "nystrom"])
def test_a_preconditioner_is_refused_with_solvers_that_have_none(solver):
    with pytest.raises(metapt.BadInput, match=f"^--preconditioner is 'adam', expected nothing with --solver {solver}$"):
        metapt.Settings(solver=solver, damping=1.0, preconditioner="adam")


def test_settings_become_the_unroll_and_the_solver_field_by_field():
    s = metapt.Settings(unroll_steps=3, unroll_lr=1, unroll_scope="all", unroll_hvp="exact", solver="neumann", terms=7,
                        alpha=0.5, damping=2.0, seed=9, hvp="finite", hvp_step=0.25, particles="6:0.35,3:0.9,1")  # fmt: skip
    assert s.unroll == metapt.Unroll(steps=3, lr=1, optimizer="adam", scope="all", hvp="exact")
    solver = metapt.Solver(method="neumann", terms=7, alpha=0.5, damping=2.0, seed=9, hvp="finite", step=0.25)
    assert s.inverse == solver
    assert s.plan == [(6, 0.35), (3, 0.9), (1, 1.0)]
    assert metapt.Settings().unroll.hvp is None


class Own(metapt.Settings, steps=50, warmup=5):
    knob: float = metapt.option(0.5, "A knob", check=metapt.POSITIVE)


class OwnOfOwn(Own, knob=0.75, lr=0.1):
    word: str = metapt.option("a", "A word", check=metapt.one_of("a", "b"))


def test_a_domain_extends_the_settings_with_other_defaults_and_knobs_of_its_own():
    assert (Own().steps, Own().warmup, Own().knob, Own(knob=1).knob) == (50, 5, 0.5, 1)
    last, fields = OwnOfOwn(steps=60), {f.name: f for f in dataclasses.fields(OwnOfOwn)}
    assert (last.steps, last.warmup, last.knob, last.lr, last.word) == (60, 5, 0.75, 0.1, "a")
    assert (metapt.Settings().steps, metapt.Settings().lr, Own().lr) == (1000, 1e-3, 1e-3)
    assert list(fields) == [*(f.name for f in dataclasses.fields(metapt.Settings)), "knob", "word"]
    assert fields["steps"].metadata["help"] == "PT steps"
    with pytest.raises(dataclasses.FrozenInstanceError):
        last.steps = 1
    for given in ({"knob": 0.0}, {"word": "c"}, {"lr": -1.0}, {"knob": "x"}, {"steps": 4}):
        with pytest.raises(metapt.BadInput, match="--(knob|word|lr|warmup) is"):
            OwnOfOwn(**given)


@pytest.mark.parametrize("name", metapt.DOMAINS)
def test_all_presets_are_settings_and_paper_is_algorithm_1_as_published(name):
    kind = find_domain(name)
    for preset in kind.presets:
        metapt.settings_of(kind, {}, preset)
    settings = metapt.settings_of(kind, {}, "paper")
    assert (settings.meta_every, settings.unroll_steps, settings.plan) == (10, 1, [(1, 1.0)])
    assert settings.inverse == metapt.Solver("neumann", terms=1, alpha=settings.lr, seed=0)
    assert (settings.average, settings.cosine, settings.meta_lr_decay) == (0.0, False, 1.0)


def test_what_a_domain_must_and_what_it_need_not_define():
    assert metapt.Domain.__abstractmethods__ == {"network", "head", "meta", "pretrain_loss", "inputs", "targets"}
    with pytest.raises(TypeError, match="targets"):
        type("Half", (Toy,), {"targets": metapt.Domain.targets})(ToySettings(), torch.device("cpu"), None)
    domain = domain_of(Toy, meta_lr=0.25)
    assert (domain.finetune_sizes, domain.finetune_limits(), domain.divide(7)) == ((2, 20), (1, 20), (7, 16))
    assert domain.phi_rates(domain.meta()) == {"weight": 0.25}
    spread = domain.measure(nn.Embedding.from_pretrained(torch.tensor([[1.0], [4.0]])))
    assert spread == {"weight_std": pytest.approx(math.sqrt(4.5))}
    assert domain.measure(metapt.RotationMean(7.0)) == {"rotation_mean_deg": 7.0}
    digest = domain.data_digest()
    assert digest == domain_of(Toy).data_digest()
    domain.sizes = {**domain.sizes, "test": 31}
    assert domain.data_digest() != digest
    outputs, targets = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1])
    assert domain.score(outputs, targets) == pytest.approx(2 / 3)
    assert domain.loss(outputs, targets).item() == pytest.approx(np.log1p(np.exp([-1, -3, 1])).mean())


def test_buffers_are_kept_unless_they_are_live():
    module, inputs = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(8, 3) + 5
    params, before = dict(module.named_parameters()), module[0].running_mean.clone()
    trained = metapt.call(module, params, inputs, train=True)
    assert torch.equal(module[0].running_mean, before)
    torch.testing.assert_close(trained.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    doubled = metapt.call(module, {**params, "0.weight": 2 * params["0.weight"]}, inputs)
    torch.testing.assert_close(doubled, 2 * inputs / math.sqrt(1 + module[0].eps))
    metapt.call(module, params, inputs, train=True, live=True)
    assert not torch.equal(module[0].running_mean, before)


class Hostile:
    def __reduce__(self):
        return pytest.fail, ("code in the data was run",)


ARRAY = {"dtype": "<f4", "shape": [2, 3], "sha256": "0" * 64}
UNFIT = [  # what becomes of about.json, or of the array's bytes; the file that is named
    *(({"format": form}, "about.json") for form in ("form 2", None)), *(("[]{"[i:j], "about.json") for i, j in ((0, 2), (2, 3))),
    *(({"arrays": a}, "make data") for a in (None, {"values": {}}, {"values": 3}, {"others": ARRAY})),
    *(({"arrays": {"values": ARRAY | wrong}}, "about.json") for wrong in ({"dtype": "<f8"}, {"shape": [3, 2]})),
    *(({name: value}, f"about.json .*{name}") for name, value in (("note", 4), ("note", True), ("source", None), ("more", 1))),
    *((content, "values.npy") for content in (None, b"", b"torn", b"plain text", Hostile())),
]  # fmt: skip


@pytest.mark.parametrize(("change", "named"), [({}, "whole"), *UNFIT, ("no folder", "make data")], ids=str)
def test_prepared_data_are_read_as_they_are_or_refused(tmp_path, change, named):
    values, path, about = np.arange(6, dtype=np.float32).reshape(2, 3), tmp_path / "values.npy", tmp_path / "about.json"
    np.save(path, values)
    layout = {
        "form": "form 1",
        "prepared_by": "make data",
        "facts": {"note": 3},
        "layout": lambda about: {"values": ("<f4", [2, 3])},
    }
    about.write_text(json.dumps({"format": "form 1", "source": "", "licence": "", "arrays": {"values": ARRAY}, "note": 3}
                                | (change if isinstance(change, dict) else {})))  # fmt: skip
    if named == "whole":
        found, arrays = metapt.read_prepared(tmp_path, **layout)
        assert found["note"] == 3 and list(arrays) == ["values"]
        assert torch.equal(arrays["values"], torch.from_numpy(values))
        return
    if isinstance(change, bytes):
        path.write_bytes(path.read_bytes()[:-4] if change == b"torn" else change)
    elif isinstance(change, Hostile):
        np.save(path, np.array([change], dtype=object), allow_pickle=True)
    elif change is None:
        path.unlink()
    elif isinstance(change, str):
        about.write_text(change)
    with pytest.raises(metapt.BadInput, match=named) as caught:
        metapt.read_prepared(tmp_path / ("nowhere" if change == "no folder" else ""), **layout)
    assert "\n" not in str(caught.value) and ("make data" in str(caught.value) or isinstance(change, str))


# 4. Algorithm 1


def test_a_stream_shows_every_example_once_an_epoch():
    stream, orders = metapt.Stream(12, 4, torch.device("cpu")), []
    for _ in range(3):
        orders.append(torch.cat([stream.next() for _ in range(3)]).tolist())
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1] != orders[2]
    incomplete = metapt.Stream(11, 4, torch.device("cpu"))
    for _ in range(3):
        assert len(set(torch.cat([incomplete.next(), incomplete.next()]).tolist())) == 8
    assert sorted(metapt.Stream(3, 10, torch.device("cpu")).next().tolist()) == [0, 1, 2]


BROKEN = {  # what is told: what becomes of the loss
    "pretrain_loss does not depend on θ": lambda loss: lambda t, p: loss({k: v.detach() for k, v in t.items()}, p),
    "pretrain_loss does not depend on φ": lambda loss: lambda t, p: loss(t, {k: v.detach() for k, v in p.items()}),
    "pretrain_loss gives a tensor of shape [2], not a scalar": lambda loss: lambda t, p: loss(t, p).repeat(2),
    "finetune_loss does not depend on ψ": lambda loss: lambda t, p: loss(t, {k: v.detach() for k, v in p.items()}),
    "finetune_loss gives a tensor of shape [2], not a scalar": lambda loss: lambda t, p: loss(t, p).repeat(2),
    "pretrain_loss does not depend on θ: ": lambda loss: lambda t, p: torch.zeros(()),
}


@pytest.mark.parametrize("message", BROKEN)
def test_losses_that_cannot_be_right_are_told_before_the_first_step(monkeypatch, message):
    name, real = message.split()[0], getattr(Toy, message.split()[0])
    monkeypatch.setattr(Toy, name, lambda self, *args, **options: BROKEN[message](real(self, *args, **options)))
    monkeypatch.setattr(metapt.Learner, "pretrain_step", lambda self, progress: pytest.fail("a step was made"))
    with pytest.raises(metapt.BadInput) as caught:
        training()
    assert f"Toy.{message}" in str(caught.value)


def test_a_part_of_phi_may_be_idle_and_a_domain_with_a_backward_of_its_own_may_give_a_vector(monkeypatch):
    real = Toy.pretrain_loss
    monkeypatch.setattr(Toy, "meta", lambda self: nn.ModuleDict({"used": nn.Embedding(2, 1), "idle": nn.Linear(1, 1)}))
    monkeypatch.setattr(Toy, "pretrain_loss", lambda self, network, meta, *args, **options: lambda t, p: real(
        self, network, meta["used"], *args, **options)(t, {"weight": p["used.weight"]}).repeat(2))  # fmt: skip
    monkeypatch.setattr(Toy, "backward", lambda self, value, theta: value.sum().backward(), raising=False)
    training(steps=4, warmup=4, learn=False).run()


def test_the_check_of_the_losses_changes_nothing():
    learner = training().best
    before, random = [flat(m.state_dict()) for m in (learner.network, learner.meta)], torch.get_rng_state()
    metapt.check_losses(learner, True)
    assert all(map(torch.equal, before, [flat(m.state_dict()) for m in (learner.network, learner.meta)]))
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in learner.network.parameters())


@pytest.fixture
def watched(monkeypatch):
    """Steps that do nothing but tell their kind, progress and learner."""
    calls = []
    monkeypatch.setattr(metapt.Learner, "pretrain_step", lambda self, progress: (
        calls.append(("P", progress, self)), self.losses.update(pretrain_loss=1.0)))  # fmt: skip
    monkeypatch.setattr(metapt.Learner, "meta_step", lambda self, progress: calls.append(("M", progress, self)))
    monkeypatch.setattr(Toy, "begin_episode", lambda self, meta: calls.append(("E", None, None)), raising=False)
    return calls


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(
    ("steps", "warmup", "every"), [(40, 10, 10), (41, 10, 4), (7, 7, 3), (12, 0, 5), (9, 2, 10), (1, 0, 1)]
)
def test_the_steps_come_in_the_order_of_algorithm_1(watched, monkeypatch, steps, warmup, every, learn):
    monkeypatch.setattr(metapt, "CHECKPOINT_EVERY", 3)
    run, marks, saved = training(steps=steps, warmup=warmup, meta_every=every, learn=learn), [], []
    watched.clear()
    run.run(lambda run: marks.append(run.step), lambda run: saved.append(run.step))
    rounds = "P" * warmup + ("P" * every + "M" * learn) * ((steps - warmup) // every) + "P" * ((steps - warmup) % every)
    assert "".join(kind for kind, *_ in watched if kind != "E") == rounds
    done, length = 0, max(1, steps - warmup)
    for kind, progress, _ in watched:
        done += kind == "P"
        assert kind == "E" or progress == pytest.approx(max(0.0, (done - 1 - warmup) / length) if learn else 1.0)
    assert marks == sorted({*range(warmup, 0, -every), *range(warmup, steps, every), steps} - {0})
    assert sum(kind == "E" for kind, *_ in watched) == len(marks)
    assert saved == [mark for mark in marks if -(-mark // every) % 3 == 0 or mark == steps]


@pytest.mark.parametrize("cosine", [False, True])
def test_the_learning_rate_of_pretraining_falls_along_a_cosine_if_asked(monkeypatch, cosine):
    rates = []
    spy(
        monkeypatch, metapt.Learner, "pretrain_step", lambda self, _: rates.append(self.optimizer.param_groups[0]["lr"])
    )
    training(cosine=cosine, lr=0.5, steps=8, warmup=8).run()
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 8)) if cosine else 0.5 for i in range(8)])


def test_pretraining_is_plain_adam_on_theta_and_on_psi_beside_it(monkeypatch):
    """Against torch's own optimisers on the same batches."""
    run, seen = training(jitter=0.0, steps=9, warmup=9), []
    learner, domain = run.best, run.domain
    network, head = domain.network(), domain.head()
    network.load_state_dict(learner.network.state_dict())
    head.load_state_dict(learner.psi)
    adams = [torch.optim.Adam(network.parameters(), lr=run.settings.lr),
             torch.optim.Adam(head.parameters(), lr=run.settings.unroll_lr)]  # fmt: skip
    spy(monkeypatch, Toy, "inputs", lambda self, part, index: seen.append((part, index)))
    run.run()
    for i, (part, rows) in enumerate(list(seen)):
        points, classes, theta = domain.points[part][rows], domain.classes[part][rows], part == "pretrain"
        assert part == ("pretrain", "finetune")[i % 2] and len(rows) == 8
        outputs = network.train()(points) if theta else head(network.eval()(points, features=True).detach())
        loss = (0.5 if theta else 1) * nn.functional.cross_entropy(outputs, classes)  # sigmoid(0) = 0.5
        adams[i % 2].zero_grad()
        loss.backward()
        adams[i % 2].step()
    torch.testing.assert_close(flat(learner.network.state_dict()), flat(network.state_dict()))
    torch.testing.assert_close(flat(learner.psi), flat(head))
    assert float(learner.losses["finetune_loss"]) == pytest.approx(loss.item(), rel=1e-4)


def test_pretraining_is_the_same_loop_with_phi_fixed():
    theta, phi = [], []
    for learn in (False, True):
        run = training(learn=learn, steps=23, warmup=20, meta_every=3)
        run.run(each=lambda run: (theta.append(flat(run.best.network)), phi.append(flat(run.best.meta))))
    half = len(theta) // 2
    assert all(map(torch.equal, theta[:half], theta[half:]))  # same steps on θ
    assert torch.equal(phi[0], phi[half - 1]) and torch.equal(phi[half], phi[-2])
    assert not torch.equal(phi[-1], phi[-2])


def test_the_meta_step_hands_everything_to_the_hypergradient_and_its_result_to_adam(monkeypatch):
    """φ by torch's Adam from the hypergradients; θ untouched; ψ and its moments go on from where the unroll ended."""
    real, run = metapt.hypergradient, training(unroll_steps=2, meta_lr_decay=0.1)
    learner, step, calls = run.best, run.best.meta_step, []
    expected = nn.Embedding.from_pretrained(torch.zeros(2, 1), freeze=False)
    optimizer = torch.optim.Adam(expected.parameters(), betas=(0.9, 0.99))
    monkeypatch.setattr(metapt, "hypergradient", lambda *args, **options: (
        calls.append((args, options, real(*args, **options))), calls[-1][-1])[1])  # fmt: skip

    def meta_step(progress):
        theta, psi, moments = flat(learner.network), flat(learner.psi), learner.ft_states["head"]["step"]
        step(progress)
        (_, finetune, _, at, begun, _), options, result = calls[-1]
        assert (options["unroll"], options["solver"], len(finetune)) == (run.settings.unroll, run.settings.inverse, 2)
        assert (
            torch.equal(flat(learner.network), theta) and torch.equal(flat(at), theta) and torch.equal(flat(begun), psi)
        )
        assert torch.equal(flat(learner.psi), flat(result.psi)) and not torch.equal(flat(result.psi), psi)
        assert options["ft_state"]["step"] == moments == 6 * len(calls) + 2  # 4 of warm-up, then 4 and 2 a round
        assert learner.ft_states["head"]["step"] == moments + 2
        optimizer.param_groups[0]["lr"] = run.settings.meta_lr * 0.1**progress
        expected.weight.grad = result.phi["weight"]
        optimizer.step()
        torch.testing.assert_close(flat(learner.meta), flat(expected))
        assert (learner.losses["validation_loss"], learner.losses["residual"]) == (result.value, result.residual)

    learner.meta_step = meta_step
    run.run()
    assert len(calls) == learner.meta_steps == 5
    assert {int(state["step"]) for state in learner.optimizer.state.values()} == {24}


@pytest.mark.parametrize("solver", ["identity", "cg"])
def test_the_adam_preconditioner_is_the_root_of_the_moments_of_pretraining(monkeypatch, solver):
    """M = √(s / (1 − β₂ᵗ)) + ε after t = 3 steps, written out from what torch's Adam keeps; before the first step M = ε."""
    real, scales = metapt.hypergradient, []
    learner = training(solver=solver, preconditioner="adam", terms=3).best
    learner.optimizer.param_groups[0]["eps"] = eps = 1e-3  # so large that it tells

    def beside(*args, **options):
        moments = [s["exp_avg_sq"] for s in learner.optimizer.state_dict()["state"].values()]
        scales.append(flat({i: (s / (1 - 0.999**3)) ** 0.5 + eps for i, s in enumerate(moments)}))
        drawn, found = torch.get_rng_state(), real(*args, **options)

        def again(preconditioner):
            torch.set_rng_state(drawn)
            return real(*args, **{**options, "preconditioner": preconditioner})

        by_hand = again(lambda r: metapt._unflat(flat(r) / scales[-1], r))
        for name in ("q", "phi"):
            torch.testing.assert_close(flat(getattr(found, name)), flat(getattr(by_hand, name)))
        if solver == "identity":
            torch.testing.assert_close(flat(found.q), flat(again(None).q) / scales[-1])
        return found

    monkeypatch.setattr(metapt, "hypergradient", beside)
    learner.meta_step(0.5)
    assert not scales[0].sub(eps).any()
    for _ in range(3):
        learner.pretrain_step(0.5)
    learner.meta_step(0.5)
    assert learner.meta_steps == len(scales) == 2 and scales[1].max() > 10 * scales[1].min()


def test_steps_draw_their_batches_where_the_settings_say_and_see_no_more_than_a_domain_allows(monkeypatch):
    asked = []
    spy(monkeypatch, Toy, "finetune_loss", lambda self, network, head, part, index: asked.append((part, len(index))))
    spy(monkeypatch, Toy, "pretrain_loss", lambda self, network, meta, index, progress, live: asked.append(
        (live, len(index), progress)))  # fmt: skip
    learner = training(unroll_steps=3).best
    asked.clear()
    learner.meta_step(0.25)
    learner.pretrain_step(0.5)
    assert asked == [("finetune", 8)] * 3 + [(False, 16, 0.25), ("validation", 12), (True, 8, 0.5), ("finetune", 8)]
    monkeypatch.setattr(Toy, "access", {"finetune": 5, "validation": 3})
    learner = training(unroll_batch_size=4, validation_batch_size=3).best
    for part, most in {"finetune": 5, "validation": 3}.items():
        assert set(torch.cat([learner.streams[part].next() for _ in range(50)]).tolist()) == set(range(most))


def test_the_validation_loss_may_be_over_all_labels(monkeypatch):
    """A mean over FT and validation examples, each counting once."""
    learner = training(validate_on="all", unroll_batch_size=20, validation_batch_size=16).best
    network, psi = metapt.detached(learner.network), learner.psi
    every = {part: torch.arange(learner.domain.sizes[part]) for part in ("finetune", "validation")}
    losses = {part: learner.domain.finetune_loss(learner.network, learner.head, part, i)(network, psi)
              for part, i in every.items()}  # fmt: skip
    expected = (20 * losses["finetune"] + 16 * losses["validation"]) / 36
    halved = training(validate_on="all", unroll_batch_size=5, validation_batch_size=16).best  # counts as much
    torch.manual_seed(0)
    part = halved.streams["finetune"].order[:5]
    some = halved.domain.finetune_loss(halved.network, halved.head, "finetune", part)(network, psi)
    wanted = (20 * some + 16 * losses["validation"]) / 36
    torch.testing.assert_close(halved.validation_loss()(network, psi), wanted)
    torch.testing.assert_close(learner.validation_loss()(network, psi), expected)
    given = []
    real = metapt.hypergradient
    monkeypatch.setattr(metapt, "hypergradient", lambda *args, **kw: (given.append(args[2]), real(*args, **kw))[1])
    learner.meta_step(0.0)
    torch.testing.assert_close(given[0](network, psi), expected)
    torch.testing.assert_close(training().best.validation_loss()(network, psi).shape, expected.shape)


def test_in_scope_all_the_head_beside_pretraining_keeps_moments_of_its_own():
    for scope, steps in (("head", {"head": 3}), ("all", {"head": 3, "all": 0})):
        learner = training(unroll_scope=scope).best
        for _ in range(3):
            learner.pretrain_step(0.0)
        assert {scope: state["step"] for scope, state in learner.ft_states.items()} == steps


@pytest.mark.parametrize(("fails", "skipped", "made"), [
    (lambda n: n in (2, 3), 2, 18), (lambda n: n % 10, 18, 2), (lambda n: n > 3, 10, 3),
])  # fmt: skip
def test_meta_steps_without_a_finite_hypergradient_are_skipped_and_ten_in_a_row_end_the_run(
    monkeypatch, fails, skipped, made
):
    real, calls, phi = metapt.hypergradient, [], [torch.zeros(2)]

    def sometimes(*arguments, **options):
        calls.append(bool(fails(len(calls) + 1)))
        if calls[-1]:
            raise FloatingPointError("v is not finite")
        return real(*arguments, **options)

    monkeypatch.setattr(metapt, "hypergradient", sometimes)
    run = training(steps=80, warmup=0)
    if skipped == 10:
        with pytest.raises(metapt.Failed, match="10 meta steps in a row.*v is not finite"):
            run.run()
    else:
        run.run(each=lambda run: phi.append(flat(run.best.meta)))
        assert [torch.equal(a, b) for a, b in itertools.pairwise(phi)] == calls
    assert (run.best.skipped, run.best.meta_steps) == (skipped, made)


def test_a_solve_that_ends_at_zero_is_skipped_and_not_a_step():
    learner = training(damping=0.0).run().best
    learner.domain.pretrain_loss = lambda *_, **__: lambda theta, phi: -sum(  # concave in θ
        p.square().sum() for p in theta.values()) * (3 + sum(p.sum() for p in phi.values()))  # fmt: skip
    before, skipped = flat(learner.meta).clone(), learner.skipped
    learner.meta_step(1.0)
    assert learner.skipped == skipped + 1 and torch.equal(flat(learner.meta), before)


def test_a_pretraining_loss_that_is_not_finite_ends_the_run():
    run = training(learn=False)
    run.domain.points["pretrain"].fill_(math.nan)
    with pytest.raises(metapt.Failed, match="PT loss is not finite at PT step 4"):
        run.run()


def test_learned_phi_is_the_average_over_the_end_and_losses_are_kept_of_ten_meta_steps():
    run, phi, losses = training(average=0.5, steps=52), [], []
    real = run.best.meta_step
    run.best.meta_step = lambda progress: (real(progress), phi.append((progress, flat(run.best.meta))))
    run.run(each=lambda run: losses.append(run.best.losses["validation_loss"]))
    assert run.best.recent == [float(loss) for loss in losses[-10:]]  # what particles are compared by
    late = [p for progress, p in phi if progress >= 0.5]
    assert 1 < len(late) < len(phi)
    torch.testing.assert_close(flat(run.best.learned()), torch.stack(late).mean(0))
    assert torch.equal(flat(run.best.meta), phi[-1][1])
    plain = training().run().best
    assert torch.equal(flat(plain.learned()), flat(plain.meta))


def test_each_part_of_phi_has_the_rate_that_the_domain_says(monkeypatch):
    monkeypatch.setattr(Toy, "phi_rates", lambda self, meta: {"weight": 7.0}, raising=False)
    learner = training(meta_lr_decay=0.5).best
    learner.meta_step(1.0)
    assert (flat(learner.meta).abs() - 3.5).abs().max() < 1e-2  # Adam's first step is as long as its rate


@pytest.mark.parametrize("losses", [[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
def test_the_particle_with_the_lowest_recent_validation_loss_stays(watched, monkeypatch, losses):
    def meta_step(self, progress):  # the very last loss says something else: it is one of ten
        self.recent = [losses[self.number]] * 9 + [10 - losses[self.number]]

    monkeypatch.setattr(metapt.Learner, "meta_step", meta_step)
    run, seen = training(particles="3:0.4,2:0.8,1", steps=52, warmup=12), []
    run.run(each=lambda run: seen.append((run.step, [learner.number for learner in run.learners])))
    order = sorted(range(3), key=lambda number: losses[number])
    for step, numbers in seen:
        share = (step - 12) / 40
        assert set(numbers) == set(order[: 3 if share <= 0.4 else 2 if share <= 0.8 else 1])
    assert run.best.number == order[0]


def test_particles_start_alike_and_come_apart():
    run, seen = training(particles="3:0.5,1", steps=44), []
    first, *others = run.learners
    assert [learner.number for learner in run.learners] == [0, 1, 2]
    for other in others:
        assert torch.equal(flat(first.network), flat(other.network)) and torch.equal(flat(first.psi), flat(other.psi))
        assert other.optimizer.param_groups[0]["params"][0] is next(other.network.parameters())
        assert other.meta_optimizer.param_groups[0]["params"][0] is next(other.meta.parameters())
        assert other.domain is first.domain and other.ranks is first.domain.ranks
    last = lambda run: {learner.number: float(learner.recent[-1]) for learner in run.learners if learner.recent}
    run.run(lambda run: seen.append(last(run)))
    assert len(seen[1]) == len({*seen[1].values()}) == 3
    assert len(seen[-1]) == len(run.learners) == 1
    assert len(training(particles="3:0.5,1", learn=False).learners) == 1


FULL = {"unroll_steps": 1, "unroll_scope": "all", "particles": "3:0.5,1", "average": 0.5, "cosine": True, "steps": 45,
        "preconditioner": "adam"}  # fmt: skip


@pytest.mark.parametrize("given", [{}, FULL], ids=["plain", "everything"])
def test_a_state_is_gone_on_with_bit_for_bit(monkeypatch, given):
    """From every checkpoint there is, in turn, each through a file's bytes."""
    monkeypatch.setattr(metapt, "CHECKPOINT_EVERY", 2)
    whole, run, stops = training(**given).run(), training(**given), [0]

    def stop(run):
        if run.step > stops[-1]:
            raise InterruptedError

    while run.step < run.settings.steps:
        try:
            run.run(at_checkpoint=stop)
        except InterruptedError:
            stops, file = [*stops, run.step], io.BytesIO()
            torch.save(run.state_dict(), file)
            file.seek(0)
            torch.manual_seed(12345)
            run = training(**given)
            run.load_state_dict(torch.load(file, weights_only=True))
            assert run.step == stops[-1]
    assert len(stops) > 3
    ends = [leaves(r.state_dict()) for r in (whole, run)]
    del ends[0]["seconds",], ends[1]["seconds",]
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=0, atol=0, equal_nan=True, msg=str(key))


def leaves(value, path=()) -> dict:
    """The leaves of nested dicts and lists, by their path."""
    if not isinstance(value, dict | list | tuple):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, each in pairs for key, leaf in leaves(each, (*path, name)).items()}


def test_the_same_seed_gives_the_same_numbers_and_another_one_others():
    first, again, other = (flat(training(seed=seed).run().best.network) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    run = training()
    with pytest.raises(ValueError, match="learners.0 is missing"):
        run.load_state_dict({**run.state_dict(), "learners": []})


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_checkpoint_goes_to_the_device_of_the_network():
    """The meta device stands for a GPU: what was saved on the CPU must not stay there."""
    learner = training(average=0.5, unroll_scope="all").run().best
    state = learner.state_dict()
    learner.network.to("meta")
    learner.domain.device = torch.device("meta")
    learner.load_state_dict(state)
    for name in ("psi", "ft_states"):
        tensors = [t for t in leaves(getattr(learner, name)).values() if isinstance(t, torch.Tensor)]
        assert tensors and all(t.device.type == "meta" for t in tensors), name


def test_phi_that_is_given_is_where_a_run_begins_and_must_fit():
    phi = {"weight": torch.tensor([[3.0], [-3.0]])}
    assert torch.equal(flat(training(phi=phi, learn=False).run().best.meta), flat(phi))
    for wrong in ({}, {"weight": torch.zeros(3)}, {"weight": torch.zeros(2, 1), "more": torch.zeros(1)}, {"weight": 3}):
        with pytest.raises(metapt.BadInput, match="φ does not fit Toy") as caught:
            training(phi=wrong)
        assert "\n" not in str(caught.value)


def test_pretraining_afresh_has_another_seed_a_frozen_phi_and_as_many_steps():
    domain, plain, phi = (
        domain_of(Toy, particles="3:0.5,1"),
        domain_of(Toy, seed=5),
        {"weight": torch.tensor([[3.0], [-3.0]])},
    )
    plain.points, plain.classes = domain.points, domain.classes  # the data stay those of the run
    network, expected = metapt.pretrain_afresh(domain, 5, phi), metapt.Training(plain, False, phi).run()
    assert torch.equal(flat(network), flat(expected.best.network))
    assert domain.settings.seed == 0
    assert not torch.equal(flat(network), flat(metapt.pretrain_afresh(domain, 5, None)))


# 5. Fine-tuning and comparisons


@pytest.fixture
def asked(monkeypatch):
    """The examples that fine-tuning asks of a domain: (part, numbers) each."""
    calls = []
    spy(monkeypatch, Toy, "inputs", lambda self, part, index: calls.append((part, index.tolist())))
    return calls


def examples(asked, part: str) -> set[int]:
    return {i for which, index in asked if which == part for i in index}


@pytest.mark.parametrize("scope", ["head", "all"])
def test_sets_are_nested_and_the_same_for_all_methods(asked, scope, monkeypatch):
    domain, sets = domain_of(Toy, measure_scope=scope, measure_steps=20), {}
    for method, size, seed in [(m, n, s) for m in range(2) for n in (3, 8, 20) for s in (0, 1)]:
        asked.clear()
        metapt.finetune(domain, domain.network(), size, seed)
        sets[method, size, seed] = examples(asked, "finetune")
        assert len(sets[method, size, seed]) == size
        assert (examples(asked, "validation"), examples(asked, "test")) == (set(range(16)), set(range(30)))
    for seed in (0, 1):
        assert sets[0, 3, seed] < sets[0, 8, seed] < sets[0, 20, seed]
    assert sets[0, 3, 0] != sets[0, 3, 1]
    assert all(sets[0, size, seed] == sets[1, size, seed] for size in (3, 8, 20) for seed in (0, 1))
    monkeypatch.setattr(Toy, "divide", lambda self, size: (size - 3, 3), raising=False)
    asked.clear()
    metapt.finetune(domain, domain.network(), 10, 0)
    assert [len(examples(asked, part)) for part in ("finetune", "validation")] == [7, 3]


@pytest.mark.parametrize("scope", ["head", "all"])
def test_examples_that_are_held_are_scored_and_nothing_else(asked, scope):
    domain = domain_of(Toy, measure_scope=scope)
    whole = examples_of_finetuning(asked, domain, None)
    held = torch.tensor([3, 7, 8])
    assert examples_of_finetuning(asked, domain, held) == whole - {3, 7, 8}
    assert examples(asked, "test") == set()
    found = metapt.finetune(domain, domain.network(), 20, 0, held)
    assert set(found.scores) == {"held"} and 0 <= found.scores["held"] <= 1


def examples_of_finetuning(asked, domain, held) -> set[int]:
    """What FT learns from: its batches are those with a gradient."""
    asked.clear()
    seen, real = set(), domain.targets
    domain.targets = lambda part, index: (
        seen.update(index.tolist() if part == "finetune" and torch.is_grad_enabled() else ()),
        real(part, index),
    )[1]
    metapt.finetune(domain, domain.network(), 20, 0, held)
    del domain.targets
    return seen


@pytest.mark.parametrize("enough", [True, False])
def test_what_is_held_is_kept_from_learning_phi_where_there_is_enough(monkeypatch, enough):
    """A fifth of the FT examples, or each fifth in turn."""
    monkeypatch.setattr(metapt, "HELD_OUT", 20 if enough else 21)
    learner, calls = training(unroll_batch_size=4).best, []
    seen = set(torch.cat([learner.streams["finetune"].next() for _ in range(50)]).tolist())
    assert seen == set(range(16 if enough else 20))
    monkeypatch.setattr(metapt, "finetune", lambda domain, network, n, seed, held: (
        calls.append((n, seed, held.tolist())), metapt.Finetuned({"held": len(calls) / 10}, 0.0))[1])  # fmt: skip
    score = metapt.held_score(learner.domain, learner.network, 20, 5)
    assert score == pytest.approx(0.1 if enough else 0.3)
    folds = [held for _, _, held in calls]
    assert folds == ([[16, 17, 18, 19]] if enough else [list(range(i, i + 4)) for i in range(0, 20, 4)])
    assert {(n, seed) for n, seed, _ in calls} == {(20, 5)}


@pytest.mark.parametrize(("held", "chosen", "words"), [
    ({"default_phi": 0.7, "learned_phi": 0.72, "online": 0.71}, "learned_phi", "the learned φ is worth +2.0 ± 0.0.*: keep it"),
    ({"default_phi": 0.7, "learned_phi": 0.72, "online": 0.75}, "online", "the θ of this run is worth +5.0.*: keep it"),
    ({"default_phi": 0.7, "learned_phi": 0.69, "online": 0.68}, "default_phi", "the learned φ is worth -1.0.*not worth it"),
    ({"default_phi": 0.7, "learned_phi": 0.7, "online": 0.6}, "default_phi", "learned φ is worth [+]0.0.*keep the default"),
    ({"default_phi": math.nan, "learned_phi": math.nan, "online": math.nan}, "default_phi", "unknown number.*keep the default"),
])  # fmt: skip
def test_what_did_best_on_held_labels_is_chosen(monkeypatch, held, chosen, words):
    monkeypatch.setattr(metapt, "held_score", lambda domain, network, n, seed: held[network] + seed / 100)
    methods = {method: lambda seed, method=method: method for method in held}
    found, line = metapt.choose(domain_of(Toy, compare=3), methods, 20, lambda: None)
    assert found["chosen"] == chosen
    assert re.search(words.replace("+2", "[+]2").replace("+5", "[+]5"), line), line
    assert set(found["held_score"]) == set(held)


@pytest.mark.parametrize(("scope", "given", "rate"), [("head", None, 1e-2), ("all", None, 1e-3), ("all", 0.5, 0.5)])
def test_the_encoder_that_is_given_is_not_changed_and_a_copy_moves_in_scope_all(asked, monkeypatch, scope, given, rate):
    domain, optimizers, modes = domain_of(Toy, measure_scope=scope, measure_lr=given), [], []
    network, real = domain.network(), metapt.adam
    before = flat(network.state_dict())
    monkeypatch.setattr(metapt, "adam", lambda *args: (optimizers.append(real(*args)), optimizers[-1])[1])
    spy(monkeypatch, Toy, "transfer", lambda self, network: modes.append(network.training))
    metapt.finetune(domain, network, 10, 0)
    assert torch.equal(flat(network.state_dict()), before)
    (group,) = optimizers[0].param_groups
    assert (len(group["params"]), group["lr"]) == (2 if scope == "head" else 8, rate)
    assert not {id(p) for p in group["params"]} & {id(p) for p in network.parameters()}
    assert len(modes) == (10 if scope == "all" else 0)
    if scope == "head":  # each example passes the encoder once
        assert sorted(part for part, _ in asked) == ["finetune", "test", "validation"]
    else:
        moved = flat(dict(enumerate(group["params"][2:])))
        assert (moved[: 4 * 6] - before[: 4 * 6]).abs().min() > 0


@pytest.mark.parametrize(("given", "steps", "looks"), [
    ({"measure_steps": 50}, 50, 25), ({"measure_steps": 7}, 7, 7), ({"measure_epochs": 3, "measure_batch_size": 8}, 9, 3),
    ({"measure_epochs": 2, "measure_batch_size": 64}, 2, 2),
])  # fmt: skip
def test_steps_epochs_and_looks_are_as_many_as_asked(monkeypatch, given, steps, looks):
    domain, calls = domain_of(Toy, **given), []
    spy(monkeypatch, Toy, "loss", lambda self, outputs, targets: calls.append((outputs.requires_grad, len(outputs))))
    metapt.finetune(domain, domain.network(), 20, 0)
    assert [sum(grad for grad, _ in calls), sum(not grad for grad, _ in calls)] == [steps, looks]
    assert {n for grad, n in calls if not grad} == {16}


def test_the_best_look_counts(monkeypatch):
    """FT at a learning rate that ruins the head: the score is that of the lowest validation loss, not of the last."""
    torch.manual_seed(0)
    domain, losses = domain_of(Toy, measure_lr=10.0, measure_steps=50), []
    real = domain.loss

    def loss(outputs, targets):
        losses.extend([] if outputs.requires_grad else [real(outputs, targets).item()])
        return real(outputs, targets)

    monkeypatch.setattr(domain, "loss", loss)
    monkeypatch.setattr(domain, "score", lambda outputs, targets: float(len(losses)))
    found = metapt.finetune(domain, domain.network(), 20, 0)
    assert len(losses) == 25
    assert found.validation_loss == min(losses) < losses[-1]
    assert found.scores == {"test": losses.index(min(losses)) + 1}


def test_networks_are_measured_in_evaluation_mode(monkeypatch):
    """Fine-tuning that trains BatchNorm, as a domain may want, measures with the statistics and not with the batch's."""
    domain, modes = domain_of(Toy, measure_scope="all"), set()
    network = domain.network()
    network.encoder.register_forward_hook(lambda module, *_: modes.add((module.training, torch.is_grad_enabled())))
    monkeypatch.setattr(Toy, "transfer", lambda self, network: network.train(), raising=False)
    metapt.finetune(domain, network, 10, 0)
    assert modes == {(True, True), (False, False)}


def test_fine_tuning_learns_what_there_is_and_a_failed_one_has_no_score():
    domain = domain_of(Toy, measure_steps=300)
    assert metapt.finetune(domain, domain.network(), 20, 0).scores["test"] > 0.75
    domain.points["validation"].fill_(math.nan)
    failed = metapt.finetune(domain, domain.network(), 20, 0)
    assert failed.validation_loss == math.inf and math.isnan(failed.scores["test"])


def test_compare_measures_each_method_with_each_seed_and_size(monkeypatch):
    measure = lambda domain, network, n, seed: (network, n, seed)
    asked, advanced = [], []
    methods = {name: lambda seed, name=name: (asked.append((name, seed)), f"{name}{seed}")[1] for name in "ab"}
    results = metapt.compare(domain_of(Toy), methods, [5, 9], 2, lambda: advanced.append(1), measure)
    assert results == {(name, n): [(f"{name}{seed}", n, seed) for seed in (0, 1)] for name in "ab" for n in (5, 9)}
    assert asked == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]  # a network is made once for all sizes
    assert len(advanced) == 4


@pytest.mark.parametrize(
    ("text", "sizes"), [("", [2, 20]), ("7", [7]), ("9,3,9,20", [3, 9, 20]), ("0", 0), ("5,21", 0)]
)
def test_sizes_are_the_ones_given_or_the_domains(text, sizes):
    refusal = pytest.raises(metapt.BadInput, match="--sizes.* between 1 and the 20 FT examples")
    with contextlib.nullcontext() if sizes else refusal:
        assert metapt.finetune_sizes(domain_of(Toy, sizes=text)) == sizes


SCORES = {"a": [0.5, 0.7, 0.9, 0.4], "b": [0.6, 0.9, 0.9, 0.7]}


def outcomes(scores) -> list:
    return [metapt.Finetuned({"test": x, "hard": x / 2}, 0.0) for x in scores]


def test_comparisons_are_means_and_standard_errors_over_seeds():
    domain = domain_of(Toy)
    domain.tests = {"test": "accuracy", "hard": "hard accuracy"}
    rows = metapt.comparison_rows(domain, {(name, 5): outcomes(scores) for name, scores in SCORES.items()})
    assert [(row["method"], row["metric"]) for row in rows] == [
        ("a", "accuracy"), ("b", "accuracy"), ("a", "hard accuracy"), ("b", "hard accuracy")]  # fmt: skip
    for row in rows:
        scores = np.array(SCORES[row["method"]]) / (2 if row["metric"] == "hard accuracy" else 1)
        assert [row["mean"], row["stderr"]] == pytest.approx([scores.mean(), scipy.stats.sem(scores)])
        assert (row["ft_examples"], row["seeds"]) == (5, 4)
    for scores, expected in (([0.5], (0.5, None, 1)), ([0.5, math.nan], (None, None, 2))):
        (row,) = metapt.comparison_rows(domain_of(Toy), {("a", 5): outcomes(scores)})
        assert (row["mean"], row["stderr"], row["seeds"]) == expected


def test_differences_are_paired_by_seed_with_students_interval():
    def difference(a, b):
        (row,) = metapt.difference_rows(domain_of(Toy), {("a", 5): outcomes(a), ("b", 5): outcomes(b)}, ["a", "b"], [5])
        assert (row["method"], row["versus"], row["ft_examples"], row["metric"]) == ("b", "a", 5, "accuracy")
        return [row["mean"], row["low"], row["high"]]

    expected = scipy.stats.ttest_rel(SCORES["b"], SCORES["a"]).confidence_interval(0.95)
    assert difference(*SCORES.values()) == pytest.approx([0.15, expected.low, expected.high])
    assert difference([0.5], [0.75]) == [0.25, None, None]
    assert difference([0.5, math.nan], [0.5, 0.7]) == [None, None, None]


@pytest.mark.parametrize(("method", "lost", "symbol"), [
    ("pretrain_loss", 0, "θ"), ("pretrain_loss", 1, "φ"), ("finetune_loss", 0, "θ"), ("finetune_loss", 1, "ψ"),
])  # fmt: skip
def test_losses_that_use_the_modules_own_parameters_are_told(monkeypatch, method, lost, symbol):
    """The likeliest mistake: `network(x)` in place of `metapt.call(network, theta, x)`."""
    real = getattr(Toy, method)

    def wrong(self, network, module, *rest, **options):
        own = [dict(network.named_parameters()), dict(module.named_parameters())]
        loss = real(self, network, module, *rest, **options)
        return lambda first, second: loss(*(own[i] if i == lost else given for i, given in enumerate((first, second))))

    monkeypatch.setattr(Toy, method, wrong)
    with pytest.raises(metapt.BadInput, match=f"Toy.{method} does not depend on {symbol}"):
        training()


def test_a_domain_without_sizes_is_told_so(monkeypatch):
    monkeypatch.setattr(Toy, "sizes", {"pretrain": 4}, raising=False)
    domain = domain_of(Toy)
    domain.__dict__.pop("sizes", None)
    with pytest.raises(metapt.BadInput, match=r"Toy.sizes lacks finetune, test, validation"):
        metapt.Training(domain, learn=True)
