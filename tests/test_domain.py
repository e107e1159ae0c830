"""Chapter 3 of metapt.py: settings, networks and how they are called, domains, prepared data."""

import dataclasses
import errno
import json
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tools import Toy, ToySettings, domain_of, find_domain
from torch import nn

import metapt

# ------------------------------------------------------------------------------------------------
# Settings

# Values that cannot be, by the setting.
WRONG = {
    "steps": [10.0, True, "10", 0],
    "seed": [-1, 2**32],
    "batch_size": [0],
    "lr": ["fast", math.nan, math.inf, 0.0],
    "cosine": [1],
    "precision": ["bf32", None],
    "warmup": [-1, 1001, 0.5],
    "warmup_share": [1.0, -0.1, None],
    "unroll_steps": [-1],
    "unroll_scope": ["tail"],
    "unroll_hvp": ["guessed"],
    "unroll_lr": [0.0],
    "unroll_batch_size": [0],
    "validation_batch_size": [0],
    "validate_on": ["test"],
    "meta_every": [0],
    "meta_lr": [-1.0],
    "meta_batch_size": [0],
    "meta_lr_decay": [0.0],
    "average": [1.0, -0.1],
    "rounds": [0, -1],
    "metric_eps": [0.0, -1e-8],
    "alpha": ["x", 0.0],
    "damping": [-1.0, math.inf],
    "terms": [-1],
    "hvp_step": [0.0],
    "sizes": ["ten", "10,,20"],
    "compare": [-1],
    "measure_scope": ["tail"],
    "measure_lr": [0.0],
    "measure_steps": [0],
    "measure_epochs": [-1],
    "measure_batch_size": [0],
    "solver": [1, "magic", "nystrom"],
    "hvp": ["guessed"],
    "preconditioner": ["sgd", None],
}
# Where the message names something else: a field of the core, or what is lacking.
NAMED_OTHERWISE = {
    ("solver", "nystrom"): "--damping",
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_settings_that_cannot_be_are_refused_by_name(name, value):
    with pytest.raises(metapt.BadInput) as caught:
        metapt.Settings(**{name: value})
    message = str(caught.value)
    subject = NAMED_OTHERWISE.get((name, value), f"{metapt.flag(name)} is {value!r}")
    assert message.startswith(subject)
    assert ", expected" in message
    assert "\n" not in message


def test_every_setting_is_tried_with_a_value_that_cannot_be():
    assert set(WRONG) == set(metapt.knobs_of(metapt.Settings))


@pytest.mark.parametrize("solver", ["neumann", "nystrom"])
def test_a_preconditioner_is_refused_with_solvers_that_have_none(solver):
    message = f"^--preconditioner is 'adam', expected nothing with --solver {solver}$"
    with pytest.raises(metapt.BadInput, match=message):
        metapt.Settings(solver=solver, damping=1.0, preconditioner="adam")


@pytest.mark.parametrize(
    ("solver", "preconditioner", "expected"),
    [
        ("identity", "auto", True),
        ("cg", "auto", False),
        ("neumann", "auto", False),
        ("identity", "", False),
        ("identity", "adam", True),
        ("cg", "adam", True),
    ],
)
def test_by_itself_the_metric_of_adam_stands_in_for_the_hessian_alone(
    solver, preconditioner, expected
):
    settings = metapt.Settings(solver=solver, preconditioner=preconditioner)
    assert settings.has_adam_metric is expected
    assert metapt.Settings().preconditioner == "auto"


def test_settings_become_the_unroll_and_the_solver_field_by_field():
    settings = metapt.Settings(
        unroll_steps=3,
        unroll_lr=1,
        unroll_scope="all",
        unroll_hvp="exact",
        solver="neumann",
        terms=7,
        alpha=0.5,
        damping=2.0,
        seed=9,
        hvp="finite",
        hvp_step=0.25,
    )
    assert settings.unroll == metapt.Unroll(
        steps=3, lr=1, optimizer="adam", scope="all", hvp="exact"
    )
    assert settings.inverse == metapt.Solver(
        method="neumann", terms=7, alpha=0.5, damping=2.0, seed=9, hvp="finite", step=0.25
    )
    assert metapt.Settings().unroll.hvp is None


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 100),
        ({"steps": 20}, 2),
        ({"steps": 25}, 2),
        ({"steps": 1}, 0),
        ({"steps": 850, "warmup_share": 1 / 17}, 50),
        ({"steps": 2600, "warmup_share": 1 / 13}, 200),
        ({"steps": 150, "warmup_share": 4 / 15}, 40),
        ({"warmup_share": 0.0}, 0),
        ({"warmup_share": 0.999, "steps": 10}, 10),
        ({"warmup": 7}, 7),
        ({"warmup": 0, "warmup_share": 0.5}, 0),
        ({"warmup": 20, "steps": 20}, 20),
    ],
)
def test_the_warm_up_is_a_share_of_the_run_unless_a_number_is_given(given, steps):
    assert metapt.Settings(**given).warmup_steps == steps


@dataclass(frozen=True)
class Own(metapt.Settings):
    steps: int = 50
    warmup: int | None = 5
    knob: float = metapt.setting(0.5, "A knob", check=metapt.POSITIVE)


@dataclass(frozen=True)
class OwnOfOwn(Own):
    knob: float = 0.75
    lr: float = 0.1
    word: str = metapt.setting("a", "A word", check=metapt.one_of("a", "b"), data=True)
    width: "int" = 3


def test_a_domain_extends_the_settings_with_other_defaults_and_knobs_of_its_own():
    own = Own()
    assert (own.steps, own.warmup, own.knob, own.lr, Own(knob=1).knob) == (50, 5, 0.5, 1e-3, 1)
    last = OwnOfOwn(steps=60)
    assert (last.steps, last.warmup, last.knob, last.lr, last.word) == (60, 5, 0.75, 0.1, "a")
    assert (metapt.Settings().steps, metapt.Settings().lr) == (1000, 1e-3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        last.steps = 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"knob": 0.0}, "--knob is 0.0, expected positive"),
        ({"knob": "x"}, "--knob is 'x', expected float"),
        ({"word": "c"}, "--word is 'c', expected one of a, b"),
        ({"lr": -1.0}, "--lr is -1.0, expected positive"),
        ({"steps": 4}, "--warmup is 5, expected at most the 4 steps"),
        ({"width": 1.5}, "--width is 1.5, expected int"),
    ],
)
def test_a_field_that_is_declared_again_keeps_its_check(given, named):
    with pytest.raises(metapt.BadInput) as caught:
        OwnOfOwn(**given)
    assert str(caught.value) == named


def test_what_is_known_of_a_setting_is_what_the_nearest_declaration_said():
    knobs = metapt.knobs_of(OwnOfOwn)
    assert list(knobs) == [*metapt.knobs_of(metapt.Settings), "knob", "word", "width"]
    steps = knobs["steps"]
    assert (steps.default, steps.help, steps.group) == (50, "PT steps", metapt.PRETRAINING)
    assert knobs["knob"].default == 0.75
    assert knobs["knob"].help == "A knob"
    assert knobs["warmup"].kinds == (int, type(None))
    assert knobs["warmup"].learning
    assert (knobs["word"].kinds, knobs["word"].data, knobs["word"].learning) == (
        (str,),
        True,
        False,
    )
    # A field that says nothing of itself is one of the domain's, which may be anything.
    width = knobs["width"]
    assert (width.kinds, width.help, width.group) == ((int,), "", metapt.OWN)
    assert width.check is metapt.ANYTHING


def test_settings_without_the_decorator_are_refused_in_one_line():
    """They would be those of the class they extend, without a word."""

    class Plain(metapt.Settings):
        steps: int = 20
        width: int = metapt.setting(64, "Features")

    @dataclass(frozen=True)
    class OnPlain(Plain):
        steps: int = 30

    for kind in (Plain, OnPlain):
        for use in (kind, lambda kind=kind: metapt.knobs_of(kind)):
            with pytest.raises(metapt.BadInput) as caught:
                use()
            message = str(caught.value)
            assert message.endswith("Plain needs @dataclass(frozen=True) above it")
            assert "\n" not in message
            assert "OnPlain" not in message


def test_a_domain_may_check_its_settings_against_each_other():
    @dataclass(frozen=True)
    class Pair(metapt.Settings):
        low: int = 1
        high: int = 2

        def __post_init__(self):
            super().__post_init__()
            self.require(self.low <= self.high, "low", f"at most the {self.high} of --high")

    assert Pair(low=2).low == 2
    with pytest.raises(metapt.BadInput, match="^--low is 3, expected at most the 2 of --high$"):
        Pair(low=3)
    with pytest.raises(metapt.BadInput, match="^--steps is 0, expected 1 or more$"):
        Pair(low=3, steps=0)


@pytest.mark.parametrize("name", metapt.DOMAINS)
def test_all_presets_are_settings(name):
    kind = find_domain(name)
    for preset in kind.presets:
        metapt.make_settings(kind, {}, preset)


# The paper has no experiment that is like the domain of sources.
@pytest.mark.parametrize("name", [name for name in metapt.DOMAINS if name != "sources"])
def test_the_preset_paper_is_algorithm_1_as_published(name):
    settings = metapt.make_settings(find_domain(name), {}, "paper")
    assert (settings.meta_every, settings.unroll_steps) == (10, 1)
    assert settings.inverse == metapt.Solver("neumann", terms=1, alpha=settings.lr, seed=0)
    assert (settings.average, settings.cosine, settings.meta_lr_decay) == (0.0, False, 1.0)


# ------------------------------------------------------------------------------------------------
# Networks


def test_a_network_leaves_its_head_out_where_features_are_asked_for():
    network = metapt.Network(nn.Linear(3, 2), nn.Linear(2, 1))
    inputs = torch.randn(5, 3)
    features = network(inputs, features=True)
    assert torch.equal(features, network.encoder(inputs))
    assert torch.equal(network(inputs), network.head(features))


def test_an_encoder_with_logits_ends_in_them_and_the_head_on_them_passes_them_on():
    encoder = metapt.EncoderWithLogits(nn.Linear(4, 3), features=3, classes=2)
    inputs = torch.randn(5, 4)
    hidden = encoder.encoder(inputs)
    logits = encoder.classifier(hidden)
    outputs = encoder(inputs)
    assert torch.equal(outputs, torch.cat([hidden, logits], dim=1))
    assert list(dict(encoder.named_parameters())) == [
        "encoder.weight",
        "encoder.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    head = metapt.head_on_logits(features=3, classes=2)
    assert torch.equal(head(outputs), logits)
    assert all(p.requires_grad for p in head.parameters())


def test_buffers_are_kept_unless_they_are_live():
    module = nn.Sequential(nn.BatchNorm1d(3))
    inputs = torch.randn(8, 3) + 5
    params = dict(module.named_parameters())
    before = module[0].running_mean.clone()
    trained = metapt.call(module, params, inputs, train=True)
    assert torch.equal(module[0].running_mean, before)
    torch.testing.assert_close(trained.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    doubled = metapt.call(module, {**params, "0.weight": 2 * params["0.weight"]}, inputs)
    torch.testing.assert_close(doubled, 2 * inputs / math.sqrt(1 + module[0].eps))
    metapt.call(module, params, inputs, train=True, live=True)
    assert not torch.equal(module[0].running_mean, before)


def test_a_call_passes_options_on_and_refuses_names_that_the_module_has_not():
    network = metapt.Network(nn.Linear(3, 2), nn.Linear(2, 1))
    params = metapt.detached(network)
    inputs = torch.randn(5, 3)
    features = metapt.call(network, params, inputs, features=True)
    assert torch.equal(features, network.encoder(inputs))
    with pytest.raises(KeyError, match="Network has no bias, weight"):
        metapt.call(network, {**params, "weight": torch.ones(1), "bias": torch.ones(1)}, inputs)


class TwoNames(nn.Module):
    """A module and a parameter under two names each, and weights that two modules share."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.alias = self.encoder
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.encoder[0].weight
        self.scale = nn.Parameter(torch.ones(3))
        self.factor = self.scale

    def forward(self, inputs):
        return self.tied(self.scale * self.alias(inputs)) + self.factor * self.encoder(inputs)


@pytest.mark.parametrize("live", [False, True])
def test_a_module_under_two_names_keeps_its_parameters(live):
    """torch's functional_call would leave plain tensors in their place, which stop learning."""
    module = TwoNames()
    before = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    params = metapt.detached(module)
    inputs = torch.randn(4, 3)
    metapt.call(module, params, inputs, train=True, live=live)
    after = dict(module.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert all(isinstance(p, nn.Parameter) for p in after.values())
    held = dict(module.named_buffers(remove_duplicate=False))
    assert all(held[name] is buffers[name] for name in buffers)


def test_shared_weights_are_replaced_at_each_of_their_places():
    module = TwoNames().eval()
    inputs = torch.randn(4, 3)
    params = {name: torch.randn_like(p) for name, p in metapt.detached(module).items()}
    assert "encoder.0.weight" in params
    assert "tied.weight" not in params
    found = metapt.call(module, params, inputs)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(params[name])
    assert torch.equal(found, module(inputs))


def test_detached_parameters_share_memory_and_need_no_gradient():
    module = nn.Linear(2, 2)
    params = metapt.detached(module)
    assert not any(p.requires_grad for p in params.values())
    assert params["weight"].data_ptr() == module.weight.data_ptr()


# ------------------------------------------------------------------------------------------------
# Domains


def test_what_a_domain_must_and_what_it_need_not_define():
    needed = {"network", "head", "meta", "pretrain_loss", "inputs", "targets"}
    assert metapt.Domain.__abstractmethods__ == needed
    half = type("Half", (Toy,), {"targets": metapt.Domain.targets})
    with pytest.raises(TypeError, match="targets"):
        half(ToySettings(), torch.device("cpu"), None)
    domain = domain_of(Toy, meta_lr=0.25)
    assert domain.finetune_sizes is None
    assert metapt.compared_sizes(domain) == [2, 20]
    assert domain.finetune_limits() == (1, 20)
    assert domain.finetune_split(7) == (7, 16)
    assert domain.mean_over_examples
    meta = domain.meta()
    assert domain.phi_rates(meta) == {"weight": 0.25}
    assert (domain.facts(meta), domain.table(meta), domain.figures(meta)) == ({}, None, {})
    assert domain.phi_from_table([1.0]) is None
    network = domain.network().train()
    domain.finetune_mode(network)
    assert not network.training


def test_what_the_data_are_is_digested():
    domain = domain_of(Toy)
    digest = domain.data_digest()
    assert digest == domain_of(Toy, lr=0.5).data_digest()
    assert digest != domain_of(Toy, seed=1).data_digest()
    domain.sizes = {**domain.sizes, "test": 31}
    assert domain.data_digest() != digest


def test_the_metric_is_accuracy_and_the_loss_cross_entropy():
    domain = domain_of(Toy)
    outputs = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    targets = torch.tensor([0, 1, 1])
    assert domain.score(outputs, targets) == pytest.approx(2 / 3)
    expected = np.log1p(np.exp([-1, -3, 1])).mean()
    assert domain.loss(outputs, targets).item() == pytest.approx(expected)


def test_a_domain_seeds_torch():
    domain_of(Toy, seed=3)
    first = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(()))


def test_phi_is_measured_by_its_numbers_or_by_the_ten_largest_of_them():
    domain = domain_of(Toy)
    assert domain.measure(metapt.RotationMean(7.0)) == {"rotation_mean_deg": 7.0}
    few = nn.Embedding.from_pretrained(torch.tensor([[1.0], [4.0]]))
    assert domain.measure(few) == {"weight[0]": 1.0, "weight[1]": 4.0}
    many = nn.Linear(1, 1)
    many.weight = nn.Parameter(torch.tensor([5.0, -9.0] + [1.0 + i for i in range(11)]))
    measured = domain.measure(many)
    # Of 5, -9, 1, 2, ..., 11 the smallest three are left out, whatever their size.
    assert measured.pop("bias") == many.bias.item()
    assert list(measured) == ["weight[0]", *(f"weight[{i}]" for i in range(4, 13))]
    assert list(measured.values()) == [5.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]


class Named(Toy):
    """φ by name: its logits as shares."""

    def table(self, meta):
        logits = meta.weight.flatten().tolist()
        shares = meta.weight.detach().flatten().softmax(0).tolist()
        rows = list(zip(["low", "high"], logits, shares, strict=True))
        return ["class", "logit", "share"], rows

    def phi_from_table(self, values):
        return {"weight": torch.tensor(values).log()[:, None]}


def test_phi_with_names_is_measured_by_its_table():
    domain = domain_of(Named)
    meta = nn.Embedding.from_pretrained(torch.tensor([[0.0], [math.log(3.0)]]))
    assert domain.measure(meta) == pytest.approx({"low": 0.25, "high": 0.75})
    long = {f"task {i}": 0.5 * i for i in range(25)}
    domain.table = lambda meta: (["task", "weight"], list(long.items()))
    assert domain.measure(meta) == {f"task {i}": 0.5 * i for i in range(15, 25)}


def test_phi_comes_from_a_table_by_name(tmp_path):
    path = tmp_path / "phi.csv"
    path.write_text("class,logit,share\nhigh,9,0.75\nlow,9,0.25\n")
    domain = domain_of(Named)
    phi = metapt.phi_from_table(path, domain)
    torch.testing.assert_close(phi["weight"], torch.tensor([[0.25], [0.75]]).log())


@pytest.mark.parametrize(
    "end", ["\n\n", "\r\n", "\r\n\r\n", "\r"], ids=["blank", "crlf", "blank crlf", "cr"]
)
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_a_table_may_come_from_a_spreadsheet(tmp_path, begin, end):
    path = tmp_path / "phi.csv"
    text = "class,logit,share\nhigh,9,0.75\nlow,9,0.25\n".replace("\n", end)
    path.write_bytes(begin + text.encode())
    phi = metapt.phi_from_table(path, domain_of(Named))
    torch.testing.assert_close(phi["weight"], torch.tensor([[0.25], [0.75]]).log())


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (Toy, "class,share\nlow,1\n", "the φ of Toy cannot be made from a table"),
        (Named, "class,share\nlow,1\n", "its names are not those of Named: high"),
        (Named, "class,share\nlow,1\nhigh,1\nmore,1\n", "its names are not those of Named: more"),
        (Named, "class,share\nlow,1\nhigh,1\nlow,1\n", "a name stands there twice"),
        (Named, "class,share\nlow,1\nhigh,much\n", "could not convert string to float: 'much'"),
        (Named, "class,share\nlow,-1\nhigh,1\n", "weight is not finite"),
        (Named, "", "is no table of φ"),
        (Named, None, "it is missing"),
    ],
)
def test_a_table_that_is_not_of_this_phi_is_refused_in_one_line(tmp_path, kind, text, message):
    path = tmp_path / "phi.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(metapt.BadInput) as caught:
        metapt.phi_from_table(path, domain_of(kind))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_on_the_cpu_example_numbers_stay_and_random_numbers_are_drawn_there_alone():
    index = torch.arange(3)
    assert metapt.to_device(index, torch.device("cpu")) is index
    assert metapt.random_devices(domain_of(Toy)) == []


# ------------------------------------------------------------------------------------------------
# What fails becomes one line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("what was done\n  what was wrong  \n"), "the file: what was wrong"),
        (ValueError(""), "the file: ValueError"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "the file: it is missing"),
        (OSError(errno.EIO, "Input/output error"), "the file: [Errno 5] Input/output error"),
    ],
)
def test_refusing_says_what_was_tried_and_the_last_line_of_the_reason(error, line):
    with pytest.raises(metapt.BadInput) as caught, metapt.refusing("the file"):
        raise error
    assert str(caught.value) == line
    with pytest.raises(metapt.Failed), metapt.refusing("the file", becomes=metapt.Failed):
        raise error


@pytest.mark.parametrize(
    "error", [KeyError("x"), MemoryError(), OSError(errno.ENOMEM, "no memory")]
)
def test_refusing_lets_pass_what_it_was_not_told_of_and_a_lack_of_memory(error):
    with pytest.raises(type(error)) as caught, metapt.refusing("the file"):
        raise error
    assert caught.value is error


# ------------------------------------------------------------------------------------------------
# Prepared data


class Hostile:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return pytest.fail, ("code in the data was run",)


ARRAY = {"dtype": "<f4", "shape": [2, 3], "sha256": "0" * 64}
ABOUT = {"format": "form 1", "source": "", "licence": "", "arrays": {"values": ARRAY}, "rows": 2}


def layout_of(about):
    return {"values": ("<f4", [about["rows"], 3])}


@pytest.fixture
def prepared(tmp_path):
    """A folder as a data script writes it."""
    np.save(tmp_path / "values.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    (tmp_path / "about.json").write_text(json.dumps(ABOUT))
    return tmp_path


def read(folder):
    return metapt.read_prepared(folder, "form 1", "make data", layout_of)


def must_be_refused(folder, named: str) -> None:
    with pytest.raises(metapt.BadInput, match=named) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert "make data" in str(caught.value)


def test_prepared_data_are_read_as_they_are(prepared):
    about, arrays = read(prepared)
    assert about == ABOUT
    assert list(arrays) == ["values"]
    assert torch.equal(arrays["values"], torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "form 2"},
        {"format": None},
        {"arrays": None},
        {"arrays": []},
        {"arrays": {"values": {}}},
        {"arrays": {"values": 3}},
        {"arrays": {"others": ARRAY}},
        {"arrays": {"values": ARRAY, "others": ARRAY}},
        {"arrays": {"values": ARRAY | {"dtype": "<f8"}}},
        {"arrays": {"values": ARRAY | {"shape": [3, 2]}}},
        {"rows": 4},
        {"rows": "2"},
        {"rows": None},
        {"rows": [2]},
    ],
    ids=str,
)
def test_an_about_that_is_not_what_the_script_writes_is_refused(prepared, change):
    (prepared / "about.json").write_text(json.dumps(ABOUT | change))
    must_be_refused(
        prepared, f"^{re.escape(str(prepared))}/about.json is not what 'make data' wrote"
    )


@pytest.mark.parametrize("lost", ["format", "arrays", "rows"])
def test_an_about_that_lacks_something_is_refused(prepared, lost):
    about = {name: value for name, value in ABOUT.items() if name != lost}
    (prepared / "about.json").write_text(json.dumps(about))
    must_be_refused(prepared, f"about.json is not what .*{lost}")


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "null", "[" * 100_000, "\0"])
def test_an_about_that_is_no_object_is_refused(prepared, text):
    (prepared / "about.json").write_text(text)
    must_be_refused(prepared, "about.json")


def test_an_about_that_is_no_text_is_refused(prepared):
    (prepared / "about.json").write_bytes(b"\xff\xfe\xff")
    must_be_refused(prepared, "about.json")


def test_a_layout_that_cannot_be_made_of_what_about_says_is_a_refusal(prepared):
    for error in (KeyError("x"), TypeError("x"), ValueError("x"), IndexError("x")):

        def layout(about, error=error):
            raise error

        with pytest.raises(metapt.BadInput, match="about.json is not what 'make data' wrote"):
            metapt.read_prepared(prepared, "form 1", "make data", layout)


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "text", "hostile", "other"])
def test_an_array_that_is_not_what_about_says_is_refused(prepared, damage):
    path = prepared / "values.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "text":
        path.write_bytes(b"plain text")
    elif damage == "hostile":
        np.save(path, np.array([Hostile()], dtype=object), allow_pickle=True)
    else:
        np.save(path, np.zeros((2, 3)))
    must_be_refused(prepared, f"^{re.escape(str(path))} is not what 'make data' wrote")


def test_a_folder_that_is_not_there_names_the_command_that_makes_it(prepared):
    must_be_refused(prepared / "nowhere", "about.json is missing: 'make data' prepares the data")
