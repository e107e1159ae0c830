"""Sources of text: how treebanks are read and divided, how φ draws sentences and weighs sources,
beside plain loops; its hypergradient, its tables, its commands.
"""

import csv
import io
import json
import math
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from datasets import ENDINGS, TREEBANKS, made_up, prepare_treebanks, write_treebank
from matplotlib.figure import Figure
from tools import (
    KILLED,
    ROOT,
    flat,
    main_in,
    metapt_in,
    options,
    outcome,
    pipeline_of,
    refused,
    spy,
    summary_of,
)

import metapt
from bench.domains import sources
from data_scripts import ud

TARGET = "Alpha-One"
SOURCES = ["Beta-One", "Gamma-One", "Omega-One"]
TINY = {
    "target": TARGET,
    "target_sentences": 20,
    "validation_sentences": 10,
    "per_source": 30,
    "buckets": 64,
    "embedding": 4,
    "width": 6,
    "steps": 24,
    "warmup": 4,
    "meta_every": 4,
    "batch_size": 8,
    "meta_batch_size": 12,
    # Twelve sentences are too few for CG at the preset's damping.
    "solver": "identity",
    "damping": 0.0,
    "average": 0.0,
    "compare": 1,
    "measure_steps": 8,
}
# The shares that tests give the sources, unless they say otherwise.
UNEVEN = torch.tensor([0.6, 0.1, 0.3])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder in which `sources` can run."""
    folder = tmp_path_factory.mktemp("home")
    prepare_treebanks(folder)
    return folder


def make(home: Path, **given) -> sources.Sources:
    settings = sources.SourcesSettings(**{**TINY, **given})
    return sources.Sources(settings, torch.device("cpu"), home / "data")


def shares_of(made, shares) -> sources.Shares:
    """φ with these shares."""
    meta = made.meta()
    meta.load_state_dict(made.phi_from_table(torch.as_tensor(shares).tolist()))
    return meta


def asked_rows(monkeypatch, made) -> list[torch.Tensor]:
    """The sentences that a domain's losses take from now on, as rows, one entry a loss."""
    asked = []
    spy(monkeypatch, made, "sentences", asked.append)
    return asked


def treebanks_of(made, rows: torch.Tensor) -> list[str]:
    """The names of the treebanks that sentences are of."""
    return [made.treebanks.names[i] for i in made.treebanks.treebank[rows.numpy()]]


def words_of(made, row: int) -> list[tuple[str, str]]:
    """A sentence as its words and tags."""
    words = made.treebanks.word_numbers[row]
    tags = made.treebanks.tag_numbers[row]
    length = int((tags != sources.PADDING).sum())
    assert not words[length:].any()
    return [
        (made.treebanks.words[word - 1].decode(), made.treebanks.tags[tag])
        for word, tag in zip(words[:length], tags[:length], strict=True)
    ]


# ------------------------------------------------------------------------------------------------
# The reader


def test_sentences_come_out_as_they_went_in_but_those_that_are_too_long(home):
    made = make(home)
    expected = []
    for name in TREEBANKS:
        expected += [(name, sentence) for sentence in made_up(name) if len(sentence) <= 30]
    rows = torch.arange(len(made.treebanks.treebank))
    names = treebanks_of(made, rows)
    assert [(names[row], words_of(made, row)) for row in rows.tolist()] == expected
    assert made.treebanks.tag_numbers.shape == (len(expected), 30)
    assert made.treebanks.languages == [name.partition("-")[0] for name in TREEBANKS]


def change_array(name, change):
    def spoil(about, arrays):
        change(arrays[name])

    return spoil


def move_up(offsets):
    offsets[0] = 1


def move_end(offsets):
    offsets[-1] -= 1


def not_increasing(offsets):
    offsets[2] = offsets[1]


def to_99(numbers):
    numbers[3] = 99


def below_0(numbers):
    numbers[3] = -1


def no_utf8(letters):
    letters[:] = 0xFF


FAULTS = {
    "form offsets that begin late": change_array("form_offsets", move_up),
    "form offsets that end early": change_array("form_offsets", move_end),
    "an empty word": change_array("form_offsets", not_increasing),
    "sentence offsets that begin late": change_array("sentence_offsets", move_up),
    "sentence offsets that end early": change_array("sentence_offsets", move_end),
    "an empty sentence": change_array("sentence_offsets", not_increasing),
    "a tag that there is not": change_array("tags", to_99),
    "a treebank that there is not": change_array("treebank", to_99),
    "a treebank below 0": change_array("treebank", below_0),
    "words that are no text": change_array("forms", no_utf8),
    "another format": lambda about, arrays: about.update(format="metapt graphs 2"),
    "no tags": lambda about, arrays: about.pop("tags"),
    "tags that are a number": lambda about, arrays: about.update(tags=17),
    "a treebank without a language": lambda about, arrays: about["treebanks"][0].pop("language"),
    "more sentences than there are": lambda about, arrays: about["treebanks"][0].update(
        sentences=61
    ),
}


def prepared_otherwise(home: Path, folder: Path, change) -> Path:
    """A copy of the data in which `change` has altered about.json's content and the arrays."""
    shutil.copytree(home / "data", folder / "data")
    prepared = folder / "data" / "ud" / "prepared"
    about = json.loads((prepared / "about.json").read_text())
    arrays = {name: np.load(prepared / f"{name}.npy") for name in about["arrays"]}
    change(about, arrays)
    for name, values in arrays.items():
        np.save(prepared / f"{name}.npy", values)
    (prepared / "about.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_prepared_folder_that_cannot_be_is_refused(home, tmp_path, fault):
    prepared_otherwise(home, tmp_path, FAULTS[fault])
    with pytest.raises(metapt.BadInput) as caught:
        make(tmp_path)
    assert "is not what 'python metapt.py download ud --from DIR' wrote" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_data_the_command_that_prepares_them_is_named(tmp_path):
    said = refused(tmp_path, "meta", "sources")
    assert "ud/prepared/about.json is missing: 'python metapt.py download ud --from DIR'" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": "Alpha"}, "--target is 'Alpha', expected one of Alpha-One, Alpha-Two, Beta"),
        ({"target_sentences": 50}, "--target-sentences is 50, expected fewer: Alpha-One has 60"),
        ({"validation_sentences": 40}, "--target-sentences is 20, expected fewer"),
        ({"target": "Delta-Long"}, "expected fewer: Delta-Long has 0"),
        ({"target_sentences": 0}, "--target-sentences is 0, expected 1 or more"),
        ({"cotrain": 1.0}, "--cotrain is 1.0, expected at least 0 and less than 1"),
        ({"buckets": 1}, "--buckets is 1, expected 2 or more"),
        ({"own_source": True}, "--validate-on is 'all', expected validation with --own-source"),
        (
            {"own_source": True, "validate_on": "validation", "cotrain": 0.1},
            "--cotrain is 0.1, expected 0 with --own-source",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(home, given, message):
    assert message in refused(home, "meta", "sources", *options({**TINY, **given}))


def test_a_folder_of_one_language_is_refused(tmp_path):
    for code in ("one", "two"):
        folder = tmp_path / "treebanks" / f"UD_Alpha-{code}"
        write_treebank(folder, code, made_up("Alpha-One"))
    (tmp_path / "data" / "ud").mkdir(parents=True)
    ud.prepare(tmp_path / "treebanks", tmp_path / "data" / "ud" / "prepared")
    with pytest.raises(metapt.BadInput, match="no treebank of another language than Alpha$"):
        make(tmp_path, target="Alpha-one")


# ------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    ("word", "grams"),
    [
        ("a", ["wa", "sa", "<a", "a>"]),
        ("No", ["wno", "sAa", "<n", "<no", "o>", "no>"]),
        ("4.", ["w4.", "s9.", "<4", "<4.", ".>", "4.>"]),
        (
            "Straße",
            ["wstraße", "sAaa", "<s", "<st", "<str", "e>", "ße>", "aße>", "raße>", "tra", "raß"],
        ),
    ],
)
def test_a_word_is_its_grams(word, grams):
    buckets = sources.gram_buckets(word, 1000)
    expected = [1 + zlib.crc32(gram.encode()) % 999 for gram in grams]
    assert sorted(buckets) == sorted(expected + [0] * (16 - len(grams)))
    assert buckets[0] == expected[0]


def test_a_long_word_has_as_many_grams_as_are_looked_at():
    buckets = sources.gram_buckets("Donaudampfschifffahrtsgesellschaft", 8192)
    assert len(buckets) == 16
    assert min(buckets) >= 1
    assert max(buckets) < 8192


def test_the_encoder_knows_no_padding_and_no_other_sentence(home):
    """A sentence's features depend on its own words alone, however long others are."""
    made = make(home)
    torch.manual_seed(0)
    encoder = made.network().encoder
    rows = made.rows["pretrain"][:10]
    grams, tags = made.sentences(rows)
    features = encoder(grams)
    for i in range(10):
        length = int((tags[i] != sources.PADDING).sum())
        alone = encoder(grams[i : i + 1, :length])
        torch.testing.assert_close(features[i, :length], alone[0])


def test_a_word_is_the_sum_of_its_grams_over_the_root_of_their_number(home):
    encoder = sources.TaggingEncoder(50, 4, 6)
    grams = torch.zeros(1, 3, 16, dtype=torch.long)
    grams[0, 0, :2] = torch.tensor([7, 9])
    grams[0, 1, :1] = 7
    table = encoder.embedding.weight
    words = torch.zeros(1, 4, 3)
    words[0, :, 0] = (table[7] + table[9]) / math.sqrt(2)
    words[0, :, 1] = table[7]
    hidden = F.gelu(encoder.first(words))
    hidden[:, :, 2] = 0
    expected = F.gelu(encoder.second(hidden)).transpose(1, 2)
    torch.testing.assert_close(encoder(grams), expected)


# ------------------------------------------------------------------------------------------------
# Parts


def test_sources_are_the_treebanks_of_other_languages(home):
    """Without the second one of the target's language, and without one of long sentences alone."""
    made = make(home)
    assert made.sources == SOURCES
    names = treebanks_of(made, made.rows["pretrain"])
    counts = {name: names.count(name) for name in SOURCES}
    assert counts == {"Beta-One": 30, "Gamma-One": 25, "Omega-One": 12}
    assert len(names) == sum(counts.values()) == made.sizes["pretrain"]
    assert names == sorted(names)
    assert made.count.tolist() == [30, 25, 12]
    assert made.first.tolist() == [0, 30, 55]
    assert len(made.rows["pretrain"].unique()) == len(names)


def test_the_sentences_of_the_target_are_divided_by_seed(home):
    made = make(home)
    parts = ("finetune", "validation", "test")
    assert [made.sizes[part] for part in parts] == [20, 10, 30]
    together = torch.cat([made.rows[part] for part in parts])
    assert treebanks_of(made, together) == [TARGET] * 60
    assert len(together.unique()) == 60
    same = make(home)
    other = make(home, seed=1)
    for part in (*parts, "pretrain"):
        assert torch.equal(made.rows[part], same.rows[part])
    for part in parts:
        assert set(made.rows[part].tolist()) != set(other.rows[part].tolist())
    assert made.finetune_sizes == (10, 20)
    assert make(home, target_sentences=5).finetune_sizes == (5,)


def test_what_the_data_are_is_digested(home, tmp_path):
    """Other parts, and other sentences in parts of the same size."""
    made = make(home)
    assert made.data_digest() == make(home).data_digest()
    assert made.data_digest() == make(home, lr=0.5).data_digest()
    assert made.data_digest() != make(home, seed=1).data_digest()
    assert made.data_digest() != make(home, target_sentences=21).data_digest()

    def of_other_files(about, arrays):
        about["treebanks"][2]["files"] = {"x2-ud-train.conllu": "0" * 64}

    other = prepared_otherwise(home, tmp_path, of_other_files)
    assert made.data_digest() != make(other).data_digest()


# ------------------------------------------------------------------------------------------------
# L_PT


def loss_of_sentence(made, network, row: int) -> float:
    """A sentence's cross-entropy, word by word, over the mean number of words in PT."""
    grams, tags = made.sentences(torch.tensor([row]))
    outputs = network(grams)[0, :, -made.classes :].double()
    lengths = (made.treebanks.tag_numbers[made.rows["pretrain"].numpy()] >= 0).sum(1)
    total = 0.0
    for logits, tag in zip(outputs, tags[0].tolist(), strict=True):
        if tag != sources.PADDING:
            total -= logits.log_softmax(0)[tag].item()
    return total / lengths.mean()


def test_a_pt_step_draws_sentences_by_the_shares_and_evenly_within_a_source(home, monkeypatch):
    made = make(home)
    meta = shares_of(made, UNEVEN)
    asked = asked_rows(monkeypatch, made)
    torch.manual_seed(0)
    made.pretrain_loss(made.network(), meta, torch.zeros(20_000).long(), 0.0, live=True)
    (rows,) = asked
    assert len(rows) == 20_000
    counts = torch.bincount(rows, minlength=len(made.treebanks.treebank))[made.rows["pretrain"]]
    assert counts.sum() == 20_000
    expected = 20_000 * (UNEVEN / made.count).repeat_interleave(made.count)
    assert scipy.stats.chisquare(counts, expected, sum_check=False).pvalue > 0.01


def test_a_source_whose_share_is_0_is_never_drawn(home, monkeypatch):
    made = make(home)
    asked = asked_rows(monkeypatch, made)
    meta = shares_of(made, [0.0, 0.5, 0.5])
    made.pretrain_loss(made.network(), meta, torch.arange(5000), 0.0, live=True)
    assert set(treebanks_of(made, asked[0])) == {"Gamma-One", "Omega-One"}


def test_the_loss_of_a_pt_step_is_that_of_a_loop_over_its_sentences(home, monkeypatch):
    made = make(home)
    network = made.network()
    meta = shares_of(made, UNEVEN)
    asked = asked_rows(monkeypatch, made)
    loss = made.pretrain_loss(network, meta, torch.arange(15), 0.0, live=True)
    rows = asked[0].tolist()
    value = loss(dict(network.named_parameters()), metapt.detached(meta))
    expected = np.mean([loss_of_sentence(made, network, row) for row in rows])
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert value.requires_grad


@pytest.mark.parametrize(("number", "each"), [(12, 4), (14, 4), (2, 1)])
def test_the_meta_loss_is_that_of_a_loop_over_sources(home, monkeypatch, number, each):
    made = make(home)
    network = made.network()
    meta = shares_of(made, UNEVEN)
    asked = asked_rows(monkeypatch, made)
    loss = made.pretrain_loss(network, meta, torch.arange(number), 0.0, live=False)
    (rows,) = asked
    names = treebanks_of(made, rows)
    assert names == [name for name in SOURCES for _ in range(each)]
    expected = 0.0
    for row, name in zip(rows.tolist(), names, strict=True):
        share = UNEVEN[SOURCES.index(name)].item()
        expected += share * loss_of_sentence(made, network, row) / each
    value = loss(metapt.detached(network), metapt.detached(meta))
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(value, loss(metapt.detached(network), metapt.detached(meta)))


@pytest.mark.parametrize("live", [True, False], ids=["a PT step", "a meta step"])
def test_both_losses_are_the_same_on_average(home, monkeypatch, live):
    """Their mean over draws is the mean over sources of all sentences' mean loss."""
    made = make(home)
    network = made.network()
    meta = shares_of(made, UNEVEN)
    of_rows = {row: loss_of_sentence(made, network, row) for row in made.rows["pretrain"].tolist()}
    each = torch.tensor(list(of_rows.values())).split(made.count.tolist())
    expected = sum(share * losses.mean() for share, losses in zip(UNEVEN, each, strict=True))
    of_sources = torch.stack([losses.mean() for losses in each])
    assert of_sources.max() > 2 * of_sources.min()

    asked = asked_rows(monkeypatch, made)
    made.pretrain_loss(network, meta, torch.zeros(30_000).long(), 0.0, live=live)
    drawn = torch.tensor([of_rows[row] for row in asked[0].tolist()])
    if not live:
        weights = UNEVEN.repeat_interleave(len(drawn) // 3) * 3
        drawn = weights * drawn
    error = drawn.std() / math.sqrt(len(drawn))
    assert abs(drawn.mean() - expected) < 3 * error
    assert 3 * error < 0.03 * expected


def test_phi_has_a_derivative_in_meta_steps_alone(home):
    """A draw has none: θ follows it, and φ learns from the shares as weights."""
    made = make(home)
    network = made.network()
    meta = shares_of(made, UNEVEN)
    index = torch.arange(12)
    theta = metapt.detached(network)
    phi = dict(meta.named_parameters())
    assert not made.pretrain_loss(network, meta, index, 0.0, live=True)(theta, phi).requires_grad
    value = made.pretrain_loss(network, meta, index, 0.0, live=False)(theta, phi)
    (slope,) = torch.autograd.grad(value, [phi["logits"]])
    assert slope.abs().min() > 0
    assert slope.sum().abs() < 1e-6  # The shares stay shares.


@pytest.mark.parametrize(("cotrain", "number", "of_target"), [(0.25, 32, 8), (0.9, 4, 3)])
def test_cotraining_gives_ft_sentences_their_share_of_each_batch(
    home, monkeypatch, cotrain, number, of_target
):
    made = make(home, cotrain=cotrain)
    asked = asked_rows(monkeypatch, made)
    network = made.network()
    drawn = set()
    for _ in range(100):
        made.pretrain_loss(network, made.meta(), torch.arange(number), 0.0, live=True)
        names = treebanks_of(made, asked[-1])
        assert (len(names), names.count(TARGET)) == (number, of_target)
        drawn |= set(asked[-1].tolist())
    assert drawn & set(made.rows["finetune"].tolist()) == set(made.rows["finetune"].tolist())
    assert not drawn & set(made.rows["validation"].tolist() + made.rows["test"].tolist())
    # φ is learned from the sources alone.
    made.pretrain_loss(network, made.meta(), torch.arange(number), 0.0, live=False)
    assert TARGET not in treebanks_of(made, asked[-1])


def test_with_a_source_of_its_own_the_target_has_a_share(home, monkeypatch):
    made = make(home, own_source=True, validate_on="validation")
    assert made.sources == [*SOURCES, "Alpha-One (FT)"]
    assert made.count.tolist() == [30, 25, 12, 20]
    assert made.first.tolist() == [0, 30, 55, 67]
    of_target = made.rows["pretrain"][67:]
    assert torch.equal(of_target, made.rows["finetune"])
    asked = asked_rows(monkeypatch, made)
    meta = shares_of(made, [0.0, 0.0, 0.0, 1.0])
    made.pretrain_loss(made.network(), meta, torch.arange(1000), 0.0, live=True)
    assert set(asked[0].tolist()) == set(made.rows["finetune"].tolist())


@pytest.mark.parametrize(
    "given",
    [{"cotrain": 0.5}, {"own_source": True, "validate_on": "validation"}],
    ids=["cotrain", "own source"],
)
def test_what_judges_phi_is_not_seen_in_pretraining(home, monkeypatch, given):
    monkeypatch.setattr(metapt, "ENOUGH_TO_HOLD_OUT", 20)
    made = make(home, **given)
    assert metapt.held_out_count(made) == 4
    asked = asked_rows(monkeypatch, made)
    for live in (True, False):
        made.pretrain_loss(made.network(), made.meta(), torch.zeros(5000).long(), 0.0, live=live)
    seen = set(torch.cat(asked).tolist())
    assert seen >= set(made.rows["finetune"][:16].tolist())
    assert not seen & set(made.rows["finetune"][16:].tolist())


def test_the_hypergradient_is_that_of_the_whole_pipeline(home):
    """PT to its end under φ, with a pull to where it began so that there is one; an FT step; L_V:
    against central differences in float64.
    """
    step = 1e-5
    made = make(home, embedding=3, width=4, buckets=16)
    torch.manual_seed(0)
    network = made.network().double()
    head = made.head().double()
    meta = shares_of(made, UNEVEN).double()
    begin = metapt.detached(network)
    psi = metapt.detached(head)
    phi = metapt.detached(meta)
    free = made.pretrain_loss(network, meta, torch.arange(12), 0.0, live=False)
    finetune = made.finetune_loss(network, head, "finetune", torch.arange(20))
    validation = made.finetune_loss(network, head, "validation", torch.arange(10))
    pretrain, pretrained, pipeline = pipeline_of(
        free, finetune, validation, begin, psi, pull=20.0, steps=50
    )
    theta = pretrained(phi)
    moved = flat(theta) - flat(begin)
    assert moved.norm() > 1e-2
    result = metapt.hypergradient(
        pretrain,
        finetune,
        validation,
        theta,
        psi,
        phi,
        unroll=metapt.Unroll(1, 0.1),
        solver=metapt.Solver("cg", terms=50),
    )
    assert result.phi["logits"].abs().max() > 1e-4
    for source in torch.eye(3, dtype=torch.float64):
        ahead, behind = [pipeline({"logits": phi["logits"] + by * source}) for by in (step, -step)]
        expected = (ahead - behind) / (2 * step)
        assert (result.phi["logits"] @ source).item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------
# Fine-tuning


def test_finetuning_begins_as_the_classifier_of_pretraining(home):
    made = make(home)
    network = made.network()
    index = torch.arange(10)
    features = network(made.inputs("test", index), features=True)
    outputs = made.head()(features)
    torch.testing.assert_close(outputs, features[..., -made.classes :])
    assert features.shape == (10, 30, 6 + 17)
    assert outputs.std() > 0


def test_loss_and_score_are_over_words_alone(home):
    made = make(home)
    index = torch.arange(10)
    targets = made.targets("test", index)
    torch.manual_seed(0)
    outputs = torch.randn(10, 30, 17)
    losses = []
    right = []
    for i in range(10):
        for word, tag in zip(outputs[i], targets[i].tolist(), strict=True):
            if tag != sources.PADDING:
                losses.append(-word.log_softmax(0)[tag].item())
                right.append(word.argmax().item() == tag)
    assert made.loss(outputs, targets).item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert made.score(outputs, targets) == pytest.approx(np.mean(right))
    assert 0 < made.score(outputs, targets) < 1


# ------------------------------------------------------------------------------------------------
# φ by name


def test_shares_begin_even(home):
    made = make(home)
    meta = made.meta()
    assert made.measure(meta) == pytest.approx(dict.fromkeys(SOURCES, 1 / 3))
    assert made.facts(meta)["effective_sources"] == pytest.approx(3)
    one = shares_of(made, [1.0, 0.0, 0.0])
    assert made.facts(one)["effective_sources"] == pytest.approx(1, abs=1e-6)
    two = shares_of(made, [0.5, 0.0, 0.5])
    assert made.facts(two)["effective_sources"] == pytest.approx(2, abs=1e-6)


def test_phi_from_a_table_is_the_inverse_of_the_table(home):
    made = make(home)
    meta = made.meta()
    meta.logits.data = torch.tensor([3.0, -1.0, 0.5])
    columns, rows = made.table(meta)
    assert columns == ["source", "share"]
    assert [row[0] for row in rows] == SOURCES
    shares = [row[1] for row in rows]
    assert shares == pytest.approx(meta.logits.softmax(0).tolist())
    again = shares_of(made, shares)
    assert [row[1] for row in made.table(again)[1]] == pytest.approx(shares)
    # What they add up to does not matter.
    again = shares_of(made, [7 * share for share in shares])
    assert [row[1] for row in made.table(again)[1]] == pytest.approx(shares)


@pytest.mark.parametrize("shares", [[0.5, -0.1, 0.6], [0.0, 0.0, 0.0], [math.nan, 0.5, 0.5]])
def test_shares_that_cannot_be_are_refused(home, shares):
    with pytest.raises(ValueError, match="^shares are 0 or more, and not all 0$"):
        make(home).phi_from_table(shares)


def drawn(rows) -> Figure:
    figure = Figure()
    sources.draw_shares(figure, rows)
    figure.canvas.draw()
    return figure


def test_the_figure_shows_the_shares_from_the_greatest_down(home):
    made = make(home)
    figure = Figure()
    made.figures(shares_of(made, UNEVEN))["shares.png"](figure)
    (axis,) = figure.axes
    shown = [bar.get_width() for bar in axis.patches]
    assert shown == pytest.approx([0.1, 0.3, 0.6])  # The last bar is the uppermost.
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names == ["Gamma-One", "Omega-One", "Beta-One"]
    (even,) = axis.lines
    assert even.get_xdata() == pytest.approx([1 / 3, 1 / 3])


def test_of_many_sources_the_figure_says_what_it_leaves_out():
    rows = [(f"source {i}", i / 190) for i in range(20)]
    (axis,) = drawn(rows).axes
    assert len(axis.patches) == 15
    assert "(5 more have 0.05)" in axis.get_xlabel()


# ------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    "given",
    [{}, {"cotrain": 0.3}, {"own_source": True, "validate_on": "validation"}],
    ids=["plain", "cotrain", "own source"],
)
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(home, given):
    stored = {}

    def keep(run):
        file = io.BytesIO()
        torch.save(run.state_dict(), file)
        stored[run.step] = file.getvalue()

    whole = metapt.Training(make(home, **given), True).run(keep)
    assert whole.meta_steps == 5
    assert whole.meta.logits.std() > 0
    torch.manual_seed(99)
    second = metapt.Training(make(home, **given), True)
    second.load_state_dict(torch.load(io.BytesIO(stored[12]), weights_only=True))
    second.run()
    assert torch.equal(flat(second.network), flat(whole.network))
    assert torch.equal(flat(second.meta), flat(whole.meta))


def test_rounds_that_are_killed_go_on_to_the_same_end(home, tmp_path):
    """SIGKILL in the first round, at the end of it, and in the second."""
    data = f"--data={home / 'data'}"
    given = ["--rounds=2", data, *options(TINY)]
    # config.json is the first file that is replaced; six episodes of each round follow.
    start = ["meta", "sources", "--out=run", *given]
    resume = ["meta", "--resume=run", data]
    for when, arguments in [("4 after", start), ("4 before", resume), ("3 after", resume)]:
        words = [*when.split(), *arguments]
        done = metapt_in(tmp_path, *words, code=KILLED, PYTHONPATH=str(ROOT))
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "run" / "summary.json").exists()
    assert main_in(tmp_path, *resume)[0] == 0
    assert main_in(tmp_path, "meta", "sources", "--out=whole", *given)[0] == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_pretraining_with_phi_fixed_reads_no_sentence_of_the_target(home, monkeypatch):
    made = make(home)
    asked = asked_rows(monkeypatch, made)
    metapt.Training(made, False).run()
    assert TARGET not in treebanks_of(made, torch.cat(asked))


def test_meta_learns_from_no_sentence_of_the_test_part(home, monkeypatch):
    made = make(home)
    asked = asked_rows(monkeypatch, made)
    metapt.Training(made, True).run()
    seen = set(torch.cat(asked).tolist())
    assert not seen & set(made.rows["test"].tolist())
    assert seen >= set(made.rows["validation"].tolist())


def test_a_source_that_tags_as_the_target_does_gets_the_greater_share(tmp_path):
    """Two languages of the same words: in one tags are the target's, in the other exchanged."""
    exchanged = dict(zip(ENDINGS, reversed(ENDINGS), strict=True))
    sentences = made_up("Alpha-One")
    other_way = [[(form, exchanged[tag]) for form, tag in sentence] for sentence in sentences]
    for code, made in {"Alpha-x": sentences, "Beta-x": sentences, "Gamma-x": other_way}.items():
        write_treebank(tmp_path / "treebanks" / f"UD_{code}", code[0].lower(), made)
    (tmp_path / "data" / "ud").mkdir(parents=True)
    ud.prepare(tmp_path / "treebanks", tmp_path / "data" / "ud" / "prepared")
    made = make(tmp_path, target="Alpha-x", steps=60, warmup=20)
    run = metapt.Training(made, True).run()
    shares = made.measure(run.learned())
    assert shares["Beta-x"] > 0.6


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="") as file:
        titles, *rows = csv.reader(file)
    return titles, rows


def test_from_a_run_to_shares_by_hand(home, tmp_path):
    given = ["--out", tmp_path / "run", *options(TINY)]
    summary = summary_of(home, "meta", "sources", *given)
    assert summary["domain"] == "sources"
    assert summary["phi"]["logits"]["shape"] == [3]
    assert 1 < summary["effective_sources"] <= 3
    assert {row["ft_examples"] for row in summary["comparison"]} == {10, 20}
    assert {row["metric"] for row in summary["comparison"]} == {"accuracy"}
    figures = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert figures == {"phi.png", "losses.png", "comparison.png", "shares.png"}
    titles, rows = read_table(tmp_path / "run" / summary["phi_table"])
    assert titles == ["source", "share"]
    assert [row[0] for row in rows] == SOURCES
    assert sum(float(row[1]) for row in rows) == pytest.approx(1)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert [last[name] for name in SOURCES] == pytest.approx([float(row[1]) for row in rows])

    path = tmp_path / "hand.csv"
    of_meta = ("warmup", "meta_every", "meta_batch_size", "solver", "damping", "average")
    settings = {name: value for name, value in TINY.items() if name not in of_meta}
    settings |= {"steps": 4, "compare": 0}
    command = ["pretrain", "sources", "--phi", path, *options(settings)]
    path.write_text("source,share\nGamma-One,3\nBeta-One,1\n")
    assert "its names are not those of Sources: Omega-One" in refused(home, *command)
    path.write_text("source,share\nGamma-One,3\nBeta-One,1\nOmega-One,-1\n")
    assert "shares are 0 or more, and not all 0" in refused(home, *command)
    path.write_text("source,share\nGamma-One,3\nBeta-One,1\nOmega-One,inf\n")
    assert "not finite" in refused(home, *command)
    path.write_text("source,share\nGamma-One,3\nBeta-One,1\nOmega-One,0\n")
    code, _, err = main_in(home, *command, "--out", tmp_path / "frozen")
    assert code == 0, err
    _, rows = read_table(tmp_path / "frozen" / "phi.csv")
    assert [row[0] for row in rows] == SOURCES
    assert [float(row[1]) for row in rows] == pytest.approx([0.25, 0.75, 0], abs=1e-6)
