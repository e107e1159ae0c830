"""Hypergradients of a decoder: right by central differences of the whole pipeline, costs within
bounds, kernels of attention.
"""

import functools

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

import metapt
from bench.accuracy.precision import cosine
from bench.costs import counting, transformer
from bench.costs.transformer import DAMPING, FT_LR, Case, Size

TINY = Size(
    layers=2,
    width=6,
    heads=2,
    context=5,
    symbols=6,
    letters=4,
    languages=3,
    batch=6,
    before=100,
)
SMALL = Size(
    layers=2,
    width=32,
    heads=2,
    context=32,
    symbols=64,
    letters=16,
    languages=4,
    batch=8,
    before=50,
)


# What the numbers are


@functools.cache
def by_differences(scope: str, steps: int) -> torch.Tensor:
    """dL_V/dφ by central differences of PT and FT together, without metapt.

    PT is held near a centre c: θ*(φ) minimises L_PT(θ, φ) + ½·damping·‖θ − c‖². Its Hessian is
    H + damping·I, and with c = θ + ∇L_PT(θ, φ_0) / damping θ*(φ_0) is the θ that is there.
    """
    task = transformer.after_pretraining(TINY, dtype=torch.float64)
    names = list(task.theta())
    shapes = [p.shape for p in task.theta().values()]
    psi = {name: p.detach() for name, p in task.ft_head.named_parameters()}

    def as_dict(w):
        pieces = w.split([shape.numel() for shape in shapes])
        return {n: piece.view(shape) for n, piece, shape in zip(names, pieces, shapes)}

    def pretrain_gradient(w, phi):
        return torch.func.grad(lambda w: task.pretrain_loss(as_dict(w), {"weights": phi}))(w)

    start = torch.cat([p.detach().flatten() for p in task.theta().values()])
    phi = task.phi
    centre = start + pretrain_gradient(start, phi) / DAMPING
    with transformer.math_kernel():
        hessian = torch.func.jacrev(pretrain_gradient)(start, phi)
    inverse = torch.linalg.inv(hessian + DAMPING * torch.eye(len(start), dtype=torch.float64))

    def after_pretraining(phi):
        """By Newton's method with the Hessian at the start, from where it is near."""
        w = start
        for _ in range(30):
            slope = pretrain_gradient(w, phi) + DAMPING * (w - centre)
            if slope.norm() < 1e-13:
                return w
            w = w - inverse @ slope
        raise AssertionError(f"no minimum: {slope.norm():.1e}")

    def value(phi):
        """L_V after K steps of SGD by torch's own optimiser."""
        theta = as_dict(after_pretraining(phi))
        leaves = {}
        for name, t in (*theta.items(), *psi.items()):
            leaves[name] = t.clone().requires_grad_()
        of_head = {name: leaves[name] for name in psi}
        of_theta = {name: leaves[name] for name in names}
        moving = leaves if scope == "all" else of_head
        optimizer = torch.optim.SGD(moving.values(), FT_LR)
        inner = {n.removeprefix("encoder."): t for n, t in of_theta.items() if "encoder" in n}

        def loss(x, y):
            features = functional_call(task.encoder, inner, x)
            return F.cross_entropy(functional_call(task.ft_head, of_head, features), y)

        for _ in range(steps):
            optimizer.zero_grad()
            loss(task.xf, task.yf).backward()
            optimizer.step()
        return loss(task.xv, task.yv).item()

    found = []
    for direction in torch.eye(len(phi), dtype=torch.float64):
        ahead = value(phi + 1e-3 * direction)
        behind = value(phi - 1e-3 * direction)
        found.append((ahead - behind) / 2e-3)
    return torch.tensor(found, dtype=torch.float64)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scope", ["head", "all"])
def test_the_reference_agrees_with_differences_of_the_whole_pipeline(scope):
    found = transformer.reference(TINY, scope, steps=3, draws=1)
    assert off(found, by_differences(scope, 3)) < 1e-6


@pytest.mark.parametrize("scope", ["head", "all"])
def test_finite_products_agree_with_differences_of_the_whole_pipeline(scope):
    case = Case("finite", "float64", scope, 3, "cg 500")
    found = transformer.joined(TINY, case, draws=1)
    assert off(found, by_differences(scope, 3)) < 1e-6


def test_a_language_draws_its_own_letters_by_its_own_transitions():
    languages = transformer.Languages(SMALL)
    generator = torch.Generator().manual_seed(1)
    texts = languages.texts(torch.full((400,), 2), 50, generator)
    # From here on by the numbers of letters, each of which is a byte of this language.
    places = (texts[:, :, None] == languages.alphabets[2]).int()
    assert (places.sum(2) == 1).all()
    places = places.argmax(2)
    counts = torch.zeros(SMALL.letters, SMALL.letters)
    pairs = (places[:, :-1].flatten(), places[:, 1:].flatten())
    counts.index_put_(pairs, torch.ones(pairs[0].shape), accumulate=True)
    often = counts.sum(1) > 500
    assert often.sum() > 5
    shares = counts[often] / counts[often].sum(1, keepdim=True)
    assert (shares - languages.transitions[2][often]).abs().max() < 0.06


def test_features_of_a_place_know_nothing_of_later_bytes():
    task = transformer.Transformer(SMALL)
    texts = task.x[:1].clone()
    before = task.encoder(texts)
    texts[0, 20] = (texts[0, 20] + 1) % SMALL.symbols
    changed = (task.encoder(texts) - before).abs().amax(1) > 1e-5
    assert not changed[:20].any()
    assert changed[20:].all()


def test_pretraining_learns():
    start = transformer.Transformer(SMALL)
    end = transformer.after_pretraining(SMALL)
    start.draw(SMALL.before)
    losses = [task.pretrain_loss_of_modules(task.phi).item() for task in (start, end)]
    assert losses[1] < 0.9 * losses[0]


def test_a_weight_is_that_of_its_language():
    task = transformer.Transformer(SMALL)
    phi = {"weights": torch.tensor([0.0, -1e9, 0.0, 0.0])}
    before = task.pretrain_loss(task.theta(), phi)
    # The bytes to be predicted of texts in one language, moved by one place in the batch.
    targets = task.y.view(SMALL.batch, SMALL.context)
    targets[1::4] = targets[1::4].roll(1, 1)
    assert task.pretrain_loss(task.theta(), phi) == before
    targets[2::4] = targets[2::4].roll(1, 1)
    assert task.pretrain_loss(task.theta(), phi) != before


# Kernels of attention


def test_exact_products_are_refused_in_one_line_where_torch_chose_the_flash_kernel():
    task = transformer.after_pretraining(SMALL)
    with pytest.raises(NotImplementedError) as caught:
        metapt.hypergradient(*transformer.problem(task), solver=metapt.Solver("identity"))
    message = str(caught.value)
    assert "flash_attention" in message
    assert "hvp='finite'" in message
    assert "\n" not in message


def test_adjoints_of_the_heads_steps_may_be_exact_with_the_flash_kernel():
    task = transformer.after_pretraining(SMALL, dtype=torch.float64)
    exact = transformer.hypergradient(task, Case("exact", "float64", "head", 3))
    found = transformer.hypergradient(task, Case("finite, FT exact", "float64", "head", 3))
    assert off(found.phi["weights"], exact.phi["weights"]) < 1e-6


def test_flops_of_the_flash_kernel_are_counted():
    query, key, value = torch.randn(3, 2, 4, 16, 8)
    leaf = query.clone().requires_grad_()

    def attend(query):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    forward = 2 * 2 * (2 * 4 * 16 * 16 * 8)  # two products of matrices
    assert counting.flops(lambda: attend(query)) == forward
    with transformer.math_kernel():
        assert counting.flops(lambda: attend(query)) == forward
    # Backward are five, the scores being computed anew.
    assert counting.flops(lambda: attend(leaf).sum().backward()) == forward * (1 + 5 / 2)


# Costs, and what precision leaves


def costs(*case) -> dict:
    return transformer.measure(SMALL, Case(*case), draws=0, repeats=0)


@pytest.mark.parametrize(
    ("case", "flops"),
    [
        (("exact", "float32", "head", 1, "identity"), 3.65),
        (("finite", "float32", "head", 1, "identity"), 4.0),
        (("finite, FT exact", "float32", "head", 1, "identity"), 2.72),
        (("finite", "bf16", "head", 1, "identity"), 4.0),
        (("exact", "float32", "all", 5, "cg 5"), 26.4),
        (("finite", "float32", "all", 5, "cg 5"), 26.0),
    ],
)
def test_a_meta_step_takes_so_many_pt_steps(case, flops):
    row = costs(*case)
    assert 0.95 * flops < row["flops"] < 1.02 * flops
    products = case[0]
    if products == "finite":
        assert row["bytes"] <= 1.01
    else:
        assert row["bytes"] >= 2


def test_bytes_grow_with_finetuning_steps_where_they_are_exact_alone():
    found = {}
    for products in ("exact", "finite"):
        few = costs(products, "float32", "all", 1, "identity")["bytes"]
        many = costs(products, "float32", "all", 5, "identity")["bytes"]
        found[products] = many - few
    assert found["exact"] > 4
    assert found["finite"] == 0


@pytest.mark.parametrize(
    ("products", "precision", "least"),
    [
        ("exact", "float32", 0.999999),
        ("finite", "float32", 0.9999),
        ("exact", "bf16", 0.999),
        ("finite", "bf16", 0.99),
    ],
)
def test_precision_leaves_the_direction(products, precision, least):
    case = Case(products, precision, "all", 3, "cg 5")
    found = transformer.joined(SMALL, case, draws=2)
    assert cosine(found, transformer.in_float64(SMALL, "all", 3, "cg 5", 2)) > least


def test_what_is_stored_becomes_tables_and_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transformer, "STORED", tmp_path / "transformer.json")
    monkeypatch.setattr(transformer, "PEERS", tmp_path / "transformer-peers.json")
    row = transformer.measure(SMALL, Case("finite", "bf16"), draws=1, repeats=1)
    found = {"about": transformer.about(SMALL, repeats=1), "rows": [row], "bf16_steps": []}
    transformer.save_json(transformer.STORED, found)
    transformer.report()
    assert (tmp_path / "transformer.png").exists()
    assert f"{row['flops']:.2f}" in capsys.readouterr().out
