"""Chapter 5 of metapt.py: mini-batches and Algorithm 1, on a domain in miniature."""

import copy
import io
import itertools
import math

import pytest
import torch
from tools import Toy, domain_of, flat, spy, training
from torch import nn

import metapt

# ------------------------------------------------------------------------------------------------
# Mini-batches


def test_batches_show_every_example_once_an_epoch():
    batches = metapt.Batches(12, 4)
    orders = []
    for _ in range(3):
        orders.append(torch.cat([batches.next() for _ in range(3)]).tolist())
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1] != orders[2]


def test_the_incomplete_end_of_an_epoch_is_left_out():
    batches = metapt.Batches(11, 4)
    for _ in range(3):
        shown = torch.cat([batches.next(), batches.next()]).tolist()
        assert len(set(shown)) == 8
    assert sorted(metapt.Batches(3, 10).next().tolist()) == [0, 1, 2]


def test_batches_are_plain_numbers_on_the_cpu(monkeypatch):
    asked = []
    spy(monkeypatch, Toy, "inputs", lambda self, part, index: asked.append(index))
    run = training().run()
    metapt.finetune(run.domain, run.network, 20, 0)
    assert len(asked) > 40
    for index in asked:
        assert (index.dtype, index.device.type, index.ndim) == (torch.int64, "cpu", 1)
        assert not vars(index)


# ------------------------------------------------------------------------------------------------
# What is told before the first step


def lose(which: int):
    """Cuts one of a loss's two dicts of parameters off."""

    def change(loss):
        def cut(*params):
            constants = {name: p.detach() for name, p in params[which].items()}
            return loss(*params[:which], constants, *params[which + 1 :])

        return cut

    return change


def twice(loss):
    """A loss for each of two copies, which is no scalar."""
    return lambda *params: loss(*params).repeat(2)


def as_number(loss):
    return lambda *params: loss(*params).item()


def zero(loss):
    return lambda *params: torch.zeros(())


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("pretrain_loss", lose(0), "does not depend on θ: its modules need metapt.call"),
        ("pretrain_loss", lose(1), "does not depend on φ: its modules need metapt.call"),
        ("pretrain_loss", twice, "gives a tensor of shape [2], not a scalar"),
        ("pretrain_loss", as_number, "gives float, not a tensor"),
        ("pretrain_loss", zero, "does not depend on θ: its modules need metapt.call"),
        ("finetune_loss", lose(0), "does not depend on θ: its modules need metapt.call"),
        ("finetune_loss", lose(1), "does not depend on ψ: its modules need metapt.call"),
        ("finetune_loss", twice, "gives a tensor of shape [2], not a scalar"),
        ("finetune_loss", as_number, "gives float, not a tensor"),
    ],
)
def test_losses_that_cannot_be_right_are_told_before_the_first_step(
    monkeypatch, method, change, message
):
    real = getattr(Toy, method)

    def changed(self, *args, **options):
        return change(real(self, *args, **options))

    monkeypatch.setattr(Toy, method, changed)
    monkeypatch.setattr(metapt.Training, "pretrain_step", lambda self: pytest.fail("a step"))
    with pytest.raises(metapt.BadInput) as caught:
        training()
    assert f"Toy.{method} {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "lost", "symbol"),
    [
        ("pretrain_loss", 0, "θ"),
        ("pretrain_loss", 1, "φ"),
        ("finetune_loss", 0, "θ"),
        ("finetune_loss", 1, "ψ"),
    ],
)
def test_losses_that_use_the_modules_own_parameters_are_told(monkeypatch, method, lost, symbol):
    """The likeliest mistake: `network(x)` in place of `metapt.call(network, theta, x)`."""
    real = getattr(Toy, method)

    def wrong(self, network, module, *rest, **options):
        loss = real(self, network, module, *rest, **options)
        own = dict((network, module)[lost].named_parameters())

        def with_own(*params):
            return loss(*params[:lost], own, *params[lost + 1 :])

        return with_own

    monkeypatch.setattr(Toy, method, wrong)
    with pytest.raises(metapt.BadInput, match=f"Toy.{method} does not depend on {symbol}"):
        training()


def test_a_part_of_phi_may_be_idle_and_a_domain_with_its_own_backward_may_give_a_vector(
    monkeypatch,
):
    real = Toy.pretrain_loss

    def meta(self):
        return nn.ModuleDict({"used": nn.Embedding(2, 1), "idle": nn.Linear(1, 1)})

    def pretrain_loss(self, network, meta, *args, **options):
        loss = real(self, network, meta["used"], *args, **options)
        return lambda theta, phi: loss(theta, {"weight": phi["used.weight"]}).repeat(2)

    monkeypatch.setattr(Toy, "meta", meta)
    monkeypatch.setattr(Toy, "pretrain_loss", pretrain_loss)
    monkeypatch.setattr(Toy, "backward", lambda self, value, theta: value.sum().backward())
    training(steps=4, warmup=4, learn=False).run()
    with pytest.raises(metapt.BadInput, match="not a scalar"):
        training()


def test_the_check_of_the_losses_changes_nothing():
    run = training()
    before = [flat(module.state_dict()) for module in (run.network, run.meta)]
    random = torch.get_rng_state()
    metapt.check_losses(run)
    after = [flat(module.state_dict()) for module in (run.network, run.meta)]
    assert all(map(torch.equal, before, after))
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in run.network.parameters())


def test_a_domain_without_sizes_is_told_so(monkeypatch):
    domain = domain_of(Toy)
    domain.sizes = {"pretrain": 4}
    with pytest.raises(metapt.BadInput, match=r"Toy.sizes lacks finetune, test, validation"):
        metapt.Training(domain, learn=True)


def test_a_network_or_a_phi_without_anything_to_train_is_told(monkeypatch):
    real = Toy.network
    monkeypatch.setattr(Toy, "network", lambda self: real(self).requires_grad_(False))
    with pytest.raises(metapt.BadInput, match=r"Toy.network\(\) has nothing that can be trained"):
        training()
    monkeypatch.setattr(Toy, "network", real)
    monkeypatch.setattr(Toy, "meta", lambda self: nn.Identity())
    with pytest.raises(metapt.BadInput, match=r"Toy.meta\(\) has no parameters"):
        training()


# ------------------------------------------------------------------------------------------------
# The order of the steps


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(
    ("steps", "warmup", "every"),
    [(40, 10, 10), (41, 10, 4), (7, 7, 3), (12, 0, 5), (9, 2, 10), (1, 0, 1)],
)
def test_the_steps_come_in_the_order_of_algorithm_1(monkeypatch, steps, warmup, every, learn):
    run = training(steps=steps, warmup=warmup, meta_every=every, learn=learn)
    calls = []

    def pretrain_step(self):
        calls.append("P")
        self.losses["pretrain_loss"] = 1.0

    monkeypatch.setattr(metapt.Training, "pretrain_step", pretrain_step)
    monkeypatch.setattr(metapt.Training, "meta_step", lambda self: calls.append("M"))
    monkeypatch.setattr(Toy, "begin_episode", lambda self, meta: calls.append("|"))
    monkeypatch.setattr(metapt, "CHECKPOINT_EVERY", 3)
    ends = []
    saved = []
    run.run(lambda run: ends.append(run.step), lambda run: saved.append(run.step))

    full_rounds, rest = divmod(steps - warmup, every)
    full_round = "P" * every + "M" * learn
    expected = "P" * warmup + full_round * full_rounds + "P" * rest
    assert "".join(calls).replace("|", "") == expected
    assert ends == sorted({*range(warmup, 0, -every), *range(warmup, steps, every), steps} - {0})
    assert calls.count("|") == len(ends)
    assert saved == [end for end in ends if -(-end // every) % 3 == 0 or end == steps]


def test_losses_are_told_how_much_of_the_run_after_the_warm_up_is_over(monkeypatch):
    """A meta step is told as much as the last PT step before it."""
    asked = []
    spy(
        monkeypatch,
        Toy,
        "pretrain_loss",
        lambda self, network, meta, index, progress, live: asked.append((live, progress)),
    )
    run = training()
    asked.clear()
    run.run()
    steps = [progress for live, progress in asked if live]
    assert steps == pytest.approx([0.0] * 4 + [i / 20 for i in range(20)])
    assert [progress for live, progress in asked if not live] == steps[7::4]
    run = training(learn=False)
    asked.clear()
    run.run()
    assert asked == [(True, 1.0)] * 24


@pytest.mark.parametrize("cosine", [False, True])
def test_the_rate_of_pretraining_falls_along_a_cosine_if_asked(monkeypatch, cosine):
    run = training(cosine=cosine, lr=0.5, steps=8, warmup=8)
    rates = []
    spy(
        monkeypatch,
        Toy,
        "backward",
        lambda self, value, theta: rates.append(run.optimizer.param_groups[0]["lr"]),
    )
    run.run()
    falling = [0.25 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates == pytest.approx(falling if cosine else [0.5] * 8)


# ------------------------------------------------------------------------------------------------
# PT steps


def pretrain_by_hand(network, optimizer, points, classes) -> None:
    """A PT step where φ is as it begins: each class has the weight sigmoid(0) = 0.5."""
    loss = 0.5 * nn.functional.cross_entropy(network.train()(points), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("learn", [True, False])
def test_pretraining_is_plain_adam_on_theta_and_where_phi_is_learned_on_psi(monkeypatch, learn):
    """Against torch's own optimisers on the same batches."""
    run = training(jitter=0.0, steps=9, warmup=9, learn=learn)
    domain = run.domain
    network = domain.network()
    network.load_state_dict(run.network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=run.settings.lr)
    head = domain.head()
    if learn:
        head.load_state_dict(run.psi)
    head_optimizer = torch.optim.Adam(head.parameters(), lr=run.settings.unroll_lr)
    seen = []
    spy(monkeypatch, Toy, "inputs", lambda self, part, index: seen.append((part, index)))
    run.run()

    parts = ["pretrain", "finetune"] if learn else ["pretrain"]
    assert [part for part, _ in seen] == parts * 9
    loss = None
    for part, rows in seen:
        assert len(rows) == 8
        points = domain.points[part][rows]
        classes = domain.classes[part][rows]
        if part == "pretrain":
            pretrain_by_hand(network, optimizer, points, classes)
            continue
        features = network.eval()(points, features=True).detach()
        loss = nn.functional.cross_entropy(head(features), classes)
        head_optimizer.zero_grad()
        loss.backward()
        head_optimizer.step()
    torch.testing.assert_close(flat(run.network.state_dict()), flat(network.state_dict()))
    if learn:
        torch.testing.assert_close(flat(run.psi), flat(head))
        assert float(run.losses["finetune_loss"]) == pytest.approx(loss.item(), rel=1e-4)


def test_phi_stays_until_the_warm_up_is_over():
    run = training(steps=23, warmup=20, meta_every=3)
    phi = []
    run.run(lambda run: phi.append(flat(run.meta).clone()))
    assert torch.equal(phi[0], phi[-2])
    assert not torch.equal(phi[-1], phi[-2])


def test_pretraining_alone_draws_and_computes_nothing_for_psi(monkeypatch):
    """Its θ is what PT gives whatever FT is, and FT's head and losses are not even asked for."""
    given = {"unroll_batch_size": 3, "validation_batch_size": 5, "meta_batch_size": 7}
    first = training(learn=False).run()
    monkeypatch.setattr(Toy, "head", lambda self: pytest.fail("a head was made"))
    monkeypatch.setattr(Toy, "finetune_loss", lambda *_: pytest.fail("L_FT was computed"))
    monkeypatch.setattr(Toy, "targets", only_of_pretraining(Toy.targets))
    monkeypatch.setattr(metapt, "finetune_step", lambda *_: pytest.fail("ψ was moved"))
    second = training(learn=False, **given, unroll_lr=0.5, unroll_scope="all").run()
    assert torch.equal(flat(first.network.state_dict()), flat(second.network.state_dict()))
    assert torch.equal(first.state_dict()["random"], second.state_dict()["random"])
    for run in (first, second):
        assert run.psi == {}
        assert run.head is None
        assert list(run.batches) == ["pretrain"]
        assert "psi" not in run.state_dict()
        assert math.isnan(run.losses["finetune_loss"])
    assert second.step == 24


def only_of_pretraining(targets):
    def checked(self, part, index):
        assert part == "pretrain"
        return targets(self, part, index)

    return checked


def test_pretraining_alone_draws_what_its_own_steps_need():
    """After the network and the order of PT's examples, a step draws its noise and no more."""
    run = training(learn=False, steps=3)
    torch.manual_seed(0)
    domain = run.domain
    domain.network()
    domain.meta()
    torch.randperm(43)
    for _ in range(3):
        torch.randn(8, 4)
    expected = torch.get_rng_state()
    assert torch.equal(training(learn=False, steps=3).run().state_dict()["random"], expected)


def test_a_pretraining_loss_that_is_not_finite_ends_the_run():
    run = training(learn=False)
    run.domain.points["pretrain"].fill_(math.nan)
    with pytest.raises(metapt.Failed, match="PT loss is not finite at PT step 4"):
        run.run()


def test_in_scope_all_the_head_beside_pretraining_keeps_moments_of_its_own():
    for scope in ("head", "all"):
        run = training(unroll_scope=scope)
        for _ in range(3):
            run.pretrain_step()
        assert run.ft_states["head"]["step"] == 3
        assert run.ft_states["all"] == {}
        run.meta_step()
        assert run.ft_states["head"]["step"] == (4 if scope == "head" else 3)
        assert run.ft_states["all"].get("step", 0) == (0 if scope == "head" else 1)


# ------------------------------------------------------------------------------------------------
# Meta steps


@pytest.fixture
def hypergradients(monkeypatch):
    """What `hypergradient` was given and what it found: (args, options, result) each."""
    real = metapt.hypergradient
    calls = []

    def recorded(*args, **options):
        result = real(*args, **options)
        calls.append((args, options, result))
        return result

    monkeypatch.setattr(metapt, "hypergradient", recorded)
    return calls


def test_a_meta_step_hands_everything_to_the_hypergradient_and_its_result_to_adam(
    hypergradients,
):
    """φ moves by torch's Adam; θ stays; ψ and its moments go on from where the unroll ended."""
    run = training(unroll_steps=2, meta_lr_decay=0.1)
    settings = run.settings
    step = run.meta_step
    expected = nn.Embedding.from_pretrained(torch.zeros(2, 1), freeze=False)
    optimizer = torch.optim.Adam(expected.parameters(), betas=(0.9, 0.99))

    def meta_step():
        theta = flat(run.network)
        psi = flat(run.psi)
        moments = run.ft_states["head"]["step"]
        step()
        (_, finetune, _), options, result = hypergradients[-1]
        assert len(finetune) == 2
        assert (options["unroll"], options["solver"]) == (settings.unroll, settings.inverse)
        assert torch.equal(flat(options["theta"]), theta)
        assert torch.equal(flat(options["psi"]), psi)
        assert options["preconditioner"] is None
        assert torch.equal(flat(run.network), theta)
        assert torch.equal(flat(run.psi), flat(result.psi))
        assert not torch.equal(flat(result.psi), psi)
        # Four FT steps of the warm-up, then four and two a round.
        assert options["ft_state"]["step"] == moments == 6 * len(hypergradients) + 2
        assert run.ft_states["head"]["step"] == moments + 2
        progress = (run.step - 1 - 4) / 20
        optimizer.param_groups[0]["lr"] = settings.meta_lr * 0.1**progress
        expected.weight.grad = result.phi["weight"]
        optimizer.step()
        torch.testing.assert_close(flat(run.meta), flat(expected))
        losses = (run.losses["validation_loss"], run.losses["residual"])
        assert losses == (result.value, result.residual)

    run.meta_step = meta_step
    run.run()
    assert len(hypergradients) == run.meta_steps == 5
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {24}


@pytest.mark.parametrize("solver", ["identity", "cg"])
def test_the_adam_preconditioner_is_the_root_of_the_moments_of_pretraining(monkeypatch, solver):
    """M = √(s / (1 − β₂ᵗ)) + ε after t = 3 steps, from what Adam keeps; no M where s = 0."""
    real = metapt.hypergradient
    eps = 1e-3  # so large that it tells
    run = training(solver=solver, preconditioner="adam", terms=3, metric_eps=eps)
    scales = []

    def scale_of(state):
        s = state["exp_avg_sq"]
        return torch.where(s > 0, (s / (1 - 0.999**3)) ** 0.5 + eps, torch.inf)

    def beside(*args, **options):
        states = run.optimizer.state_dict()["state"]
        scales.append(flat({i: scale_of(state) for i, state in states.items()}))
        drawn = torch.get_rng_state()
        found = real(*args, **options)

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
    for _ in range(3):
        run.pretrain_step()
    run.meta_step()
    assert run.meta_steps == len(scales) == 1
    finite = scales[0][scales[0].isfinite()]
    assert finite.max() > 10 * finite.min()


def test_where_nothing_is_said_q_is_v_in_the_adam_metric():
    phi = {
        preconditioner: flat(training(solver="identity", preconditioner=preconditioner).run().meta)
        for preconditioner in ("auto", "adam", "")
    }
    assert torch.equal(phi["auto"], phi["adam"])
    assert not torch.allclose(phi["auto"], phi[""])


def test_the_adam_metric_is_zero_where_no_gradient_of_pretraining_ever_arrived():
    """Half of an embedding that PT has not met would drown all else: r / ε there."""
    run = training(preconditioner="adam", solver="identity")
    run.pretrain_step()
    weight = run.network.encoder[0].weight
    run.optimizer.state[weight]["exp_avg_sq"][:3] = 0
    ones = {name: torch.ones_like(p) for name, p in run.network.named_parameters()}
    scaled = run.adam_metric(ones)["encoder.0.weight"]
    assert not scaled[:3].any()
    assert (scaled[3:] > 0).all()


def test_in_each_round_theta_and_psi_begin_anew_and_phi_goes_on():
    run = training(rounds=3, steps=8, warmup=2, meta_every=3)
    seen = []

    def on_episode(run):
        seen.append((run.round, run.step, run.steps_done, flat(run.meta).clone()))

    begun = []
    real = run.begin_next_round

    def begin_next_round():
        before = flat(run.meta).clone()
        moments = run.meta_optimizer.state_dict()["state"]
        real()
        begun.append(flat(run.network).clone())
        assert torch.equal(flat(run.meta), before)
        assert run.meta_optimizer.state_dict()["state"] is not None and moments
        assert not run.optimizer.state and not run.ft_states["head"]

    run.begin_next_round = begin_next_round
    run.run(on_episode)
    assert [done for _, _, done, _ in seen] == [2, 5, 8, 10, 13, 16, 18, 21, 24]
    assert [round_ for round_, _, _, _ in seen] == [0] * 3 + [1] * 3 + [2] * 3
    assert run.meta_steps == 6
    assert run.steps_done == 24
    assert len(begun) == 2 and not torch.equal(*begun)


def test_one_round_is_the_first_of_several():
    one = training(rounds=1).run()
    several = training(rounds=2)
    kept = {}

    def keep(run):
        kept.setdefault(run.steps_done, flat(run.meta).clone())

    several.run(on_checkpoint=keep)
    assert torch.equal(kept[one.steps_done], flat(one.meta))


def test_the_rate_of_phi_falls_over_all_rounds():
    run = training(rounds=2, meta_lr_decay=0.25, meta_lr=0.1)
    rates = []
    run.run(on_episode=lambda run: rates.append(run.meta_optimizer.param_groups[0]["lr"]))
    half = len(rates) // 2
    assert rates[-1] == pytest.approx(0.1 * 0.25 ** ((1 + 19 / 20) / 2))
    assert rates[half - 1] == pytest.approx(0.1 * 0.25 ** (19 / 20 / 2))


@pytest.mark.parametrize("stop_at", [8, 24, 28, 44])
def test_a_run_of_rounds_goes_on_within_a_round_and_between_two(stop_at):
    settings = {"rounds": 2, "average": 0.5}
    whole = training(**settings).run()
    states = {}

    def keep(run):
        states[run.steps_done] = copy.deepcopy(run.state_dict())

    training(**settings).run(on_episode=keep)
    again = training(**settings)
    again.load_state_dict(states[stop_at])
    again.run()
    assert torch.equal(flat(again.network), flat(whole.network))
    assert torch.equal(flat(again.learned()), flat(whole.learned()))


def test_pretraining_alone_has_one_round():
    assert training(learn=False, rounds=3).run().steps_done == 24


def test_steps_draw_their_batches_where_the_settings_say(monkeypatch):
    asked = []
    spy(
        monkeypatch,
        Toy,
        "finetune_loss",
        lambda self, network, head, part, index: asked.append((part, len(index))),
    )
    spy(
        monkeypatch,
        Toy,
        "pretrain_loss",
        lambda self, network, meta, index, progress, live: asked.append((live, len(index))),
    )
    run = training(unroll_steps=3)
    asked.clear()
    run.meta_step()
    assert asked == [("finetune", 8)] * 3 + [(False, 16), ("validation", 12)]
    asked.clear()
    run.pretrain_step()
    assert asked == [(True, 8), ("finetune", 8)]


def test_learning_sees_no_more_than_a_domain_allows(monkeypatch):
    monkeypatch.setattr(Toy, "access", {"finetune": 5, "validation": 3, "pretrain": 9})
    run = training(unroll_batch_size=4, validation_batch_size=3)
    allowed = {"finetune": 5, "validation": 3, "pretrain": 9, "meta": 9}
    for part, most in allowed.items():
        batches = run.batches[part]
        seen = set(torch.cat([batches.next() for _ in range(50)]).tolist())
        assert seen == set(range(most))


def test_the_validation_loss_may_be_over_all_labels(hypergradients):
    """A mean over FT and validation examples, each counting once, however large the batches."""

    def loss_of(run, part, rows):
        loss = run.domain.finetune_loss(run.network, run.head, part, rows)
        return loss(metapt.detached(run.network), run.psi)

    run = training(validate_on="all", unroll_batch_size=20, validation_batch_size=16)
    of_validation = loss_of(run, "validation", torch.arange(16))
    expected = (20 * loss_of(run, "finetune", torch.arange(20)) + 16 * of_validation) / 36
    theta = metapt.detached(run.network)
    torch.testing.assert_close(run.validation_loss()(theta, run.psi), expected)
    run.meta_step()
    (_, _, validation), options, _ = hypergradients[0]
    found = validation(options["theta"], options["psi"])
    torch.testing.assert_close(found, expected)

    small = training(validate_on="all", unroll_batch_size=5, validation_batch_size=16)
    batch = small.batches["finetune"].order[:5]
    expected = (20 * loss_of(small, "finetune", batch) + 16 * of_validation) / 36
    torch.testing.assert_close(small.validation_loss()(theta, small.psi), expected)


@pytest.mark.parametrize(
    ("fails", "skipped", "made"),
    [
        (lambda call: call in (2, 3), 2, 18),
        (lambda call: call % 10, 18, 2),
        (lambda call: call > 3, 10, 3),
    ],
)
def test_meta_steps_without_a_usable_hypergradient_are_skipped_and_ten_in_a_row_end_the_run(
    monkeypatch, fails, skipped, made
):
    real = metapt.hypergradient
    calls = []

    def sometimes(*args, **options):
        calls.append(bool(fails(len(calls) + 1)))
        if calls[-1]:
            raise FloatingPointError("v is not finite")
        return real(*args, **options)

    monkeypatch.setattr(metapt, "hypergradient", sometimes)
    run = training(steps=80, warmup=0)
    phi = [flat(run.meta).clone()]
    if skipped == 10:
        with pytest.raises(metapt.Failed, match="10 meta steps in a row.*v is not finite"):
            run.run()
    else:
        run.run(lambda run: phi.append(flat(run.meta).clone()))
        assert [torch.equal(a, b) for a, b in itertools.pairwise(phi)] == calls
    assert (run.skipped, run.meta_steps) == (skipped, made)


@pytest.mark.filterwarnings("ignore:.*q is no better than 0")
def test_a_solve_that_ends_at_zero_is_skipped_and_not_a_step():
    run = training(damping=0.0).run()

    def concave(*_, **__):
        def loss(theta, phi):
            height = sum(p.square().sum() for p in theta.values())
            return -height * (3 + sum(p.sum() for p in phi.values()))

        return loss

    run.domain.pretrain_loss = concave
    phi = flat(run.meta).clone()
    psi = flat(run.psi).clone()
    skipped = run.skipped
    run.meta_step()
    assert run.skipped == skipped + 1
    assert torch.equal(flat(run.meta), phi)
    assert torch.equal(flat(run.psi), psi)


def test_learned_phi_is_the_average_over_the_end_of_the_run():
    run = training(average=0.5, steps=52)
    step = run.meta_step
    phi = []

    def meta_step():
        step()
        phi.append((run.progress(run.step - 1), flat(run.meta).clone()))

    run.meta_step = meta_step
    run.run()
    late = [values for progress, values in phi if progress >= 0.5]
    assert 1 < len(late) < len(phi)
    torch.testing.assert_close(flat(run.learned()), torch.stack(late).mean(0))
    assert torch.equal(flat(run.meta), phi[-1][1])
    plain = training().run()
    assert torch.equal(flat(plain.learned()), flat(plain.meta))
    assert plain.learned() is not plain.meta


def test_each_part_of_phi_has_the_rate_that_the_domain_says(monkeypatch):
    monkeypatch.setattr(Toy, "phi_rates", lambda self, meta: {"weight": 7.0})
    run = training(meta_lr_decay=0.5)
    run.step = 25  # so that the run after the warm-up is over
    run.meta_step()
    # Adam's first step is as long as its rate.
    assert (flat(run.meta).abs() - 3.5).abs().max() < 1e-2


# ------------------------------------------------------------------------------------------------
# Layers that PT does not move


class FrozenFirst(Toy):
    """The first layer stays as it was drawn."""

    def network(self):
        network = super().network()
        network.encoder[0].requires_grad_(False)
        return network


FROZEN = ["encoder.0.weight", "encoder.0.bias"]


def test_theta_says_what_requires_no_gradient():
    run = training(FrozenFirst)
    theta = run.theta()
    assert list(theta) == [name for name, _ in run.network.named_parameters()]
    assert [name for name, p in theta.items() if not p.requires_grad] == FROZEN
    for name, p in run.network.named_parameters():
        assert theta[name].is_leaf
        assert theta[name] is not p
        assert torch.equal(theta[name], p)
    (group,) = run.optimizer.param_groups
    assert all(p.requires_grad for p in group["params"])
    assert len(group["params"]) == len(theta) - len(FROZEN)


@pytest.mark.parametrize("given", [{}, {"unroll_scope": "all"}, {"preconditioner": "adam"}])
def test_layers_that_stay_are_constants_of_the_hypergradient(monkeypatch, given):
    """As if the losses knew them, and θ were the rest alone."""
    run = training(FrozenFirst, jitter=0.0, **given)
    before = flat(run.network.encoder[0]).clone()
    run.run()
    assert run.meta_steps == 5
    assert torch.equal(flat(run.network.encoder[0]), before)

    real = metapt.hypergradient
    found = []

    def both_ways(pretrain, finetune, validation, **options):
        options["ft_state"] = None
        whole = real(pretrain, finetune, validation, **options)
        theta = {name: p.detach() for name, p in options.pop("theta").items()}
        frozen = {name: theta.pop(name) for name in FROZEN}

        def with_frozen(loss):
            return lambda theta, other: loss({**frozen, **theta}, other)

        finetune = [with_frozen(loss) for loss in finetune]
        losses = (with_frozen(pretrain), finetune, with_frozen(validation))
        found.append((whole, real(*losses, theta=theta, **options)))
        return whole

    monkeypatch.setattr(metapt, "hypergradient", both_ways)
    run.meta_step()
    whole, rest = found[0]
    assert flat(whole.phi).all()
    torch.testing.assert_close(whole.phi, rest.phi)
    torch.testing.assert_close(whole.psi, rest.psi)
    for name, q in whole.q.items():
        torch.testing.assert_close(q, rest.q.get(name, torch.zeros_like(q)))


# ------------------------------------------------------------------------------------------------
# Checkpoints and seeds

ALL_OF_IT = {
    "unroll_steps": 1,
    "unroll_scope": "all",
    "average": 0.5,
    "cosine": True,
    "steps": 45,
    "preconditioner": "adam",
    "validate_on": "all",
}


def leaves(value, path=()) -> dict:
    """The leaves of nested dicts and lists, by their path."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        return {path: value}
    found = {}
    for name, entry in pairs:
        found |= leaves(entry, (*path, name))
    return found


def assert_same_state(found: dict, expected: dict) -> None:
    """Bit for bit, but for the clock."""
    found = leaves({**found, "seconds": 0})
    expected = leaves({**expected, "seconds": 0})
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        torch.testing.assert_close(
            found[path], value, rtol=0, atol=0, equal_nan=True, msg=str(path)
        )


@pytest.mark.parametrize(
    ("learn", "given"),
    [(True, {}), (True, ALL_OF_IT), (False, {"cosine": True})],
    ids=["plain", "everything", "pretraining alone"],
)
def test_a_run_goes_on_from_any_checkpoint_to_the_same_bits(monkeypatch, learn, given):
    """Each checkpoint goes through a file's bytes, to a training that has just begun."""
    monkeypatch.setattr(metapt, "CHECKPOINT_EVERY", 2)
    stored = []

    def keep(run):
        file = io.BytesIO()
        torch.save(run.state_dict(), file)
        stored.append((run.step, file.getvalue()))

    whole = training(learn=learn, **given).run(on_checkpoint=keep)
    assert len(stored) >= 3
    for step, content in stored:
        torch.manual_seed(12345)
        run = training(learn=learn, **given)
        run.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
        assert run.step == step
        assert run.seconds > 0
        run.run()
        assert_same_state(run.state_dict(), whole.state_dict())
        assert torch.equal(flat(run.learned()), flat(whole.learned()))


def test_a_run_that_is_cut_off_again_and_again_ends_in_the_same_bits(monkeypatch):
    monkeypatch.setattr(metapt, "CHECKPOINT_EVERY", 2)
    whole = training(**ALL_OF_IT).run()
    run = training(**ALL_OF_IT)
    stops = [0]

    def stop(run):
        if run.step > stops[-1]:
            raise InterruptedError

    while run.step < run.settings.steps:
        try:
            run.run(on_checkpoint=stop)
        except InterruptedError:
            stops.append(run.step)
            state = run.state_dict()
            run = training(**ALL_OF_IT)
            run.load_state_dict(state)
    assert len(stops) > 3
    assert_same_state(run.state_dict(), whole.state_dict())


def test_the_same_seed_gives_the_same_numbers_and_another_one_others():
    first, again, other = (flat(training(seed=seed).run().network) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.fixture
def double_precision():
    """In float64 what processors round otherwise stays far below what the test looks at."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Of 24 steps: φ, and θ and ψ each in one number, the sum of cos(i) times its i-th entry.
STORED = {
    "identity": [0.152513, 0.151376, 0.363986, -0.035829],
    "neumann": [0.151430, 0.151671, 0.363992, -0.035829],
    "cg": [0.151682, 0.152136, 0.363993, -0.035829],
    "nystrom": [0.152504, 0.151717, 0.363988, -0.035829],
}
STORED_OF_PRETRAINING_ALONE = 0.367282


@pytest.mark.parametrize("solver", STORED)
def test_the_numbers_of_a_run_are_those_stored_here(double_precision, solver):
    """Only another algorithm, or another order of random draws, changes them."""
    given = {"unroll_steps": 2, "average": 0.5, "meta_lr_decay": 0.1}
    run = training(solver=solver, preconditioner="", **given).run()
    found = [*flat(run.learned()).tolist(), checksum(run.network), checksum(run.psi)]
    assert found == pytest.approx(STORED[solver], abs=1e-6, rel=0)


def test_the_numbers_of_pretraining_alone_are_those_stored_here(double_precision):
    network = training(learn=False).run().network
    assert checksum(network) == pytest.approx(STORED_OF_PRETRAINING_ALONE, abs=1e-6, rel=0)


def checksum(params) -> float:
    numbers = flat(params)
    return (numbers * torch.arange(len(numbers)).cos()).sum().item()


def test_the_state_of_another_training_is_not_taken():
    run = training()
    state = run.state_dict()
    for lost in ("network", "batches", "psi", "random", "meta_optimizer"):
        part = {name: value for name, value in state.items() if name != lost}
        with pytest.raises(KeyError, match=lost):
            run.load_state_dict(part)
    with pytest.raises(RuntimeError, match="encoder"):
        run.load_state_dict({**state, "network": {}})
    with pytest.raises(KeyError):
        run.load_state_dict(training(learn=False).state_dict())


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_checkpoint_goes_to_the_device_of_the_domain():
    """The meta device stands for a GPU: what was saved on the CPU must not stay there."""
    run = training(average=0.5, unroll_scope="all").run()
    state = run.state_dict()
    run.network.to("meta")
    run.domain.device = torch.device("meta")
    run.load_state_dict(state)
    for name in ("psi", "ft_states", "phi_sum"):
        values = leaves(getattr(run, name)).values()
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        assert tensors, name
        assert all(t.device.type == "meta" for t in tensors), name


# ------------------------------------------------------------------------------------------------
# φ that is given


def test_phi_that_is_given_is_where_a_run_begins_and_must_fit():
    phi = {"weight": torch.tensor([[3.0], [-3.0]])}
    assert torch.equal(flat(training(phi=phi, learn=False).run().meta), flat(phi))
    wrong = [
        {},
        {"weight": torch.zeros(3)},
        {"weight": torch.zeros(2, 1), "more": torch.zeros(1)},
        {"weight": 3},
    ]
    for other in wrong:
        with pytest.raises(metapt.BadInput, match="φ does not fit Toy") as caught:
            training(phi=other)
        assert "\n" not in str(caught.value)


def test_pretraining_afresh_has_another_seed_a_frozen_phi_and_as_many_steps():
    phi = {"weight": torch.tensor([[3.0], [-3.0]])}
    domain = domain_of(Toy)
    plain = domain_of(Toy, seed=5)
    # The data stay those of the run.
    plain.points = domain.points
    plain.classes = domain.classes
    network = metapt.pretrain_afresh(domain, 5, phi)
    expected = metapt.Training(plain, learn=False, phi=phi).run()
    assert torch.equal(flat(network), flat(expected.network))
    assert domain.settings.seed == 0
    assert not torch.equal(flat(network), flat(metapt.pretrain_afresh(domain, 5, None)))
