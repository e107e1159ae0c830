"""Sources of text: PT tags sentences of many languages, FT those of one; φ is each source's share.

    python metapt.py download ud --from DIR              treebanks of Universal Dependencies in DIR
    python metapt.py meta sources --target Galician-TreeGal        φ learned: phi.csv, shares.png
    python metapt.py pretrain sources --target Galician-TreeGal --phi RUN
    python metapt.py meta sources --cotrain 0.2          a fifth of each PT batch is FT's sentences
    python metapt.py meta sources --own-source           FT's sentences are a source with a share

Which languages should a tagger be pre-trained on for a language with a hundred labelled sentences?
Treebanks: Nivre et al., "Universal Dependencies v2", LREC 2020. Learning the shares of sources by
gradient is also what DoGE does (Fan et al., ICML 2024), with q = v; see bench/docs for why the
curvature matters here.
"""

import functools
import hashlib
import itertools
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metapt

# A sentence has at most so many words; longer ones are left out.
LONGEST = 30
# So many character n-grams of a word are looked at.
GRAMS = 16
# The tag of what is no word: padding behind a sentence's end.
PADDING = -1

LAYOUT = {
    "forms": "|u1",
    "form_offsets": "<i8",
    "tags": "|u1",
    "sentence_offsets": "<i8",
    "treebank": "<i4",
}


class Treebanks:
    """Prepared sentences of many treebanks, with their words as numbers.

    Raises:
        BadInput: the folder is missing, or not what its script writes.
    """

    def __init__(self, folder: Path):
        command = "python metapt.py download ud --from DIR"
        about, arrays = metapt.read_prepared(folder, "metapt tagged sentences 1", command, layout)
        problem = f"{folder} is not what '{command}' wrote"
        self.described = about["treebanks"]
        with metapt.refusing(problem, (LookupError, TypeError, ValueError)):
            self.names = [str(treebank["name"]) for treebank in self.described]
            self.languages = [str(treebank["language"]) for treebank in self.described]
            self.tags = list(about["tags"])
            check_numbers(arrays, len(self.names), len(self.tags))

        form_offsets = arrays["form_offsets"].numpy()
        sentence_offsets = arrays["sentence_offsets"].numpy()
        of_words = arrays["tags"].numpy().astype(np.int64)
        forms = arrays["forms"].numpy().tobytes()
        words = [forms[start:end] for start, end in itertools.pairwise(form_offsets)]
        # Each different word once; a sentence is a row of their numbers, 0 behind its end.
        self.words, number_of_word = np.unique(np.array(words, dtype=object), return_inverse=True)
        with metapt.refusing(f"{folder}/forms.npy is not what '{command}' wrote"):
            for word in self.words:
                word.decode()
        lengths = np.diff(sentence_offsets)
        kept = np.flatnonzero(lengths <= LONGEST)
        self.treebank = arrays["treebank"].numpy()[kept]
        places = np.arange(LONGEST)
        there = places < lengths[kept, None]
        position = np.where(there, sentence_offsets[kept, None] + places, 0)
        self.word_numbers = np.where(there, number_of_word[position] + 1, 0).astype(np.int32)
        self.tag_numbers = np.where(there, of_words[position], PADDING)


def layout(about: dict) -> dict:
    """Names, dtypes and shapes of the arrays that about.json describes."""
    treebanks = about["treebanks"]
    words = sum(treebank["words"] for treebank in treebanks)
    sentences = sum(treebank["sentences"] for treebank in treebanks)
    [forms] = about["arrays"]["forms"]["shape"]
    lengths = {
        "forms": forms,
        "form_offsets": words + 1,
        "tags": words,
        "sentence_offsets": sentences + 1,
        "treebank": sentences,
    }
    return {name: (dtype, [lengths[name]]) for name, dtype in LAYOUT.items()}


def check_numbers(arrays: dict[str, Tensor], treebanks: int, tags: int) -> None:
    """ValueError where offsets, tags and treebanks do not fit what they are numbers of."""
    ends = {"form_offsets": len(arrays["forms"]), "sentence_offsets": len(arrays["tags"])}
    for name, end in ends.items():
        offsets = arrays[name]
        if offsets[0] != 0 or offsets[-1] != end or not (offsets.diff() > 0).all():
            raise ValueError(f"{name} does not fit")
    below = {"tags": tags, "treebank": treebanks}
    for name, count in below.items():
        numbers = arrays[name]
        if not ((numbers >= 0) & (numbers < count)).all():
            raise ValueError(f"{name} has a number that stands for nothing")


@functools.lru_cache(maxsize=1)
def treebanks_in(folder: Path, modified: float) -> Treebanks:
    """Read once for several domains in one process, as comparisons over targets make them."""
    return Treebanks(folder)


def gram_buckets(word: str, buckets: int) -> list[int]:
    """The numbers of a word's character n-grams, from 1 on; 0 fills the rest of the GRAMS places.

    The n-grams: the whole word; the shape of its first letters; its beginnings of up to three
    letters and its ends of up to four; and all groups of three letters in between.
    """
    low = word.lower()
    grams = ["w" + low, "s" + "".join(map(letter_shape, word[:3]))]
    grams += ["<" + low[:length] for length in (1, 2, 3)]
    grams += [low[-length:] + ">" for length in (1, 2, 3, 4)]
    grams += [low[i : i + 3] for i in range(1, len(low) - 3)]
    different = list(dict.fromkeys(grams))[:GRAMS]
    numbers = [1 + zlib.crc32(gram.encode()) % (buckets - 1) for gram in different]
    return numbers + [0] * (GRAMS - len(numbers))


def letter_shape(letter: str) -> str:
    """A capital, a small letter, a digit, or the sign itself."""
    if letter.isupper():
        return "A"
    if letter.isalpha():
        return "a"
    if letter.isdigit():
        return "9"
    return letter


class TaggingEncoder(nn.Module):
    """Words as the sum of their n-grams' embeddings, then two convolutions along the sentence."""

    def __init__(self, buckets: int, embedding: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(buckets, embedding, padding_idx=0)
        self.first = nn.Conv1d(embedding, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, grams: Tensor) -> Tensor:
        """Bucket numbers [n, words, GRAMS] to features [n, words, width]."""
        count = (grams > 0).sum(-1, keepdim=True)
        words = self.embedding(grams).sum(2) / count.clamp(min=1).sqrt()
        there = (count > 0).transpose(1, 2)
        hidden = F.gelu(self.first(words.transpose(1, 2))) * there
        return F.gelu(self.second(hidden)).transpose(1, 2)


class Shares(nn.Module):
    """φ = one number a source; the shares are their softmax, even at the start."""

    def __init__(self, sources: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(sources))

    def forward(self, losses: Tensor) -> Tensor:
        """The mean of the sources' losses [sources], weighed by their shares."""
        return self.logits.softmax(0) @ losses


@dataclass(frozen=True)
class SourcesSettings(metapt.Settings):
    steps: int = 300
    batch_size: int = 32
    lr: float = 3e-3
    warmup_share: float = 0.1
    meta_every: int = 5
    meta_batch_size: int = 512
    meta_lr: float = 0.2
    unroll_lr: float = 1e-3
    unroll_batch_size: int = 100
    validation_batch_size: int = 100
    validate_on: str = "all"
    # Chosen on seed 0 of six targets by accuracy after FT: see bench/docs/languages.md.
    solver: str = "cg"
    terms: int = 10
    damping: float = 0.01
    preconditioner: str = "adam"
    average: float = 0.5
    hvp: str = "finite"
    unroll_hvp: str = "exact"
    measure_batch_size: int = 32

    target: str = metapt.setting("Galician-TreeGal", "Treebank of the target language", data=True)
    target_sentences: int = metapt.setting(100, "FT sentences", check=metapt.AT_LEAST_1, data=True)
    validation_sentences: int = metapt.setting(
        50, "Validation sentences", check=metapt.AT_LEAST_1, data=True
    )
    per_source: int = metapt.setting(
        600, "PT sentences of a source at most", check=metapt.AT_LEAST_1, data=True
    )
    cotrain: float = metapt.setting(
        0.0, "Share of FT sentences in each PT batch", check=metapt.BELOW_1
    )
    own_source: bool = metapt.setting(
        False, "FT sentences are one more source (L_V: --validate-on validation)", data=True
    )
    buckets: int = metapt.setting(
        8192, "Rows of the embedding of n-grams", check=metapt.Check(lambda n: n > 1, "2 or more")
    )
    embedding: int = metapt.setting(32, "Width of that embedding", check=metapt.AT_LEAST_1)
    width: int = metapt.setting(64, "Features of a word", check=metapt.AT_LEAST_1)

    def check_together(self):
        super().check_together()
        if self.own_source:
            # Otherwise L_V would be lowest where PT learns these very sentences by heart.
            fits = self.validate_on == "validation"
            self.require(fits, "validate_on", "validation with --own-source")
            self.require(self.cotrain == 0, "cotrain", "0 with --own-source")


class Sources(metapt.Domain):
    """Part-of-speech tagging. The target's sentences are divided by seed: FT, validation, test.

    PT's sentences are those of all treebanks of other languages. L_PT is the mean over sources,
    weighed by their shares, of each source's loss summed over words; it is divided by the mean
    number of words in a sentence, for all sources alike. A PT step draws its sentences by the
    shares. A meta step draws equally many of each source and weighs the sources by their shares:
    the same loss on average, and one that φ has a derivative of.

    FT begins with PT's own classifier, as both have the same tags.
    """

    Settings = SourcesSettings
    threads = 1
    tests: ClassVar = {"test": "accuracy"}
    captions: ClassVar = {}

    def __init__(self, settings, device, data):
        super().__init__(settings, device, data)
        folder = data / "ud" / "prepared"
        about = folder / "about.json"
        modified = about.stat().st_mtime if about.exists() else 0.0
        self.treebanks = treebanks_in(folder, modified)
        names = self.treebanks.names
        settings.require(settings.target in names, "target", f"one of {', '.join(names)}")
        target = names.index(settings.target)
        language = self.treebanks.languages[target]
        self.classes = len(self.treebanks.tags)

        random = np.random.default_rng(settings.seed)
        rows = random.permutation(np.flatnonzero(self.treebanks.treebank == target))
        last_finetune = settings.target_sentences
        last_validation = last_finetune + settings.validation_sentences
        enough = last_validation < len(rows)
        settings.require(enough, "target_sentences", f"fewer: {settings.target} has {len(rows)}")
        of_target = {
            "finetune": rows[:last_finetune],
            "validation": rows[last_finetune:last_validation],
            "test": rows[last_validation:],
        }

        with_sentences = set(self.treebanks.treebank.tolist())
        others = [
            i
            for i, other in enumerate(self.treebanks.languages)
            if other != language and i in with_sentences
        ]
        if not others:
            raise metapt.BadInput(f"{folder} has no treebank of another language than {language}")
        self.sources = [names[i] for i in others]
        of_sources = [
            random.permutation(np.flatnonzero(self.treebanks.treebank == i))[: settings.per_source]
            for i in others
        ]
        self.sizes = {part: len(numbers) for part, numbers in of_target.items()}
        # What `meta` judges φ by in the end is not among what PT may see.
        self.known = self.sizes["finetune"] - metapt.held_out_count(self)
        if settings.own_source:
            self.sources.append(f"{settings.target} (FT)")
            of_sources.append(of_target["finetune"][: self.known])

        rows = {"pretrain": np.concatenate(of_sources), **of_target}
        self.rows = {part: torch.from_numpy(numbers) for part, numbers in rows.items()}
        self.sizes["pretrain"] = len(rows["pretrain"])
        # Where the sentences of each source begin in PT's part, and how many there are.
        self.count = torch.tensor([len(numbers) for numbers in of_sources])
        self.first = self.count.cumsum(0) - self.count
        self.finetune_sizes = tuple(sorted({min(10, last_finetune), last_finetune}))

        self.word_numbers = torch.from_numpy(self.treebanks.word_numbers).to(device)
        self.tag_numbers = torch.from_numpy(self.treebanks.tag_numbers).to(device)
        self.grams = gram_table(self.treebanks, settings.buckets).to(device)
        pretrain_tags = self.treebanks.tag_numbers[rows["pretrain"]]
        self.mean_words = float((pretrain_tags != PADDING).sum(1).mean())

    def data_digest(self):
        parts = {part: rows.tolist() for part, rows in self.rows.items()}
        described = json.dumps([self.treebanks.described, self.sources, parts], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def network(self):
        settings = self.settings
        encoder = TaggingEncoder(settings.buckets, settings.embedding, settings.width)
        with_logits = metapt.EncoderWithLogits(encoder, settings.width, self.classes)
        return metapt.Network(with_logits, nn.Identity()).to(self.device)

    def head(self):
        return metapt.head_on_logits(self.settings.width, self.classes).to(self.device)

    def meta(self):
        return Shares(len(self.sources)).to(self.device)

    def pretrain_loss(self, network, meta, index, progress, live):
        if live:
            return self.loss_of_drawn_sentences(network, meta, len(index))
        return self.loss_of_all_sources(network, meta, len(index))

    def loss_of_drawn_sentences(self, network, meta, number: int) -> metapt.Loss:
        """L_PT of a PT step: sentences drawn by the shares, each of weight 1."""
        from_target = min(round(self.settings.cotrain * number), number - 1)
        shares = meta.logits.detach().cpu().softmax(0)
        source = torch.multinomial(shares, number - from_target, replacement=True)
        rows = self.rows["pretrain"][self.draw_of(source)]
        if from_target:
            of_target = torch.randint(self.known, (from_target,))
            rows = torch.cat([rows, self.rows["finetune"][of_target]])
        grams, tags = self.sentences(rows)

        def loss(theta, phi):
            return self.word_losses(network, theta, grams, tags, live=True).sum(1).mean()

        return loss

    def loss_of_all_sources(self, network, meta, number: int) -> metapt.Loss:
        """L_PT of a meta step: equally many sentences of each source, weighed by its share."""
        each = max(1, number // len(self.sources))
        source = torch.arange(len(self.sources)).repeat_interleave(each)
        grams, tags = self.sentences(self.rows["pretrain"][self.draw_of(source)])

        def loss(theta, phi):
            of_sentences = self.word_losses(network, theta, grams, tags, live=False).sum(1)
            of_sources = of_sentences.view(len(self.sources), each).mean(1)
            return metapt.call(meta, phi, of_sources)

        return loss

    def draw_of(self, source: Tensor) -> Tensor:
        """A random sentence of each of these sources, as its number in PT's part."""
        within = (torch.rand(len(source)) * self.count[source]).long()
        return self.first[source] + within

    def word_losses(self, network, theta, grams, tags, live: bool) -> Tensor:
        """Cross-entropy of each word over the mean number of words in a sentence, 0 for padding."""
        outputs = metapt.call(network, theta, grams, train=True, live=live)
        logits = outputs[..., -self.classes :]
        losses = F.cross_entropy(
            logits.flatten(0, 1), tags.flatten(), ignore_index=PADDING, reduction="none"
        )
        return losses.view(tags.shape) / self.mean_words

    def sentences(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Bucket numbers [n, words, GRAMS] and tags [n, words] of sentences."""
        rows = metapt.to_device(rows, self.device)
        grams = self.grams[self.word_numbers[rows]].long()
        return grams, self.tag_numbers[rows]

    def inputs(self, part, index):
        grams, _ = self.sentences(self.rows[part][index])
        return grams

    def targets(self, part, index):
        _, tags = self.sentences(self.rows[part][index])
        return tags

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=PADDING)

    def score(self, outputs, targets):
        is_word = targets != PADDING
        return (outputs.argmax(-1) == targets)[is_word].double().mean().item()

    def measure(self, meta):
        shares = meta.logits.detach().softmax(0).tolist()
        return dict(zip(self.sources, shares, strict=True))

    def table(self, meta):
        shares = meta.logits.detach().softmax(0).tolist()
        return ["source", "share"], list(zip(self.sources, shares, strict=True))

    def phi_from_table(self, values):
        shares = torch.tensor(values)
        if not (shares >= 0).all() or not shares.sum() > 0:
            raise ValueError("shares are 0 or more, and not all 0")
        # A share of 0 has no finite number; this one is never drawn.
        return {"logits": (shares / shares.sum()).clamp(min=1e-12).log()}

    def facts(self, meta):
        shares = meta.logits.detach().softmax(0)
        return {"effective_sources": torch.special.entr(shares).sum().exp().item()}

    def figures(self, meta):
        return {"shares.png": lambda figure: draw_shares(figure, self.table(meta)[1])}


@functools.lru_cache(maxsize=2)
def gram_table(treebanks: Treebanks, buckets: int) -> Tensor:
    """The n-grams of each different word, [words + 1, GRAMS]; row 0 is padding."""
    rows = [gram_buckets(word.decode(), buckets) for word in treebanks.words]
    return torch.tensor([[0] * GRAMS, *rows], dtype=torch.int32)


def draw_shares(figure, rows: list[tuple[str, float]], shown: int = 15) -> None:
    """The sources of the greatest shares, beside the even share that φ begins with."""
    largest = sorted(rows, key=lambda row: row[1], reverse=True)[:shown]
    names = [metapt.as_label(name) for name, _ in reversed(largest)]
    shares = [share for _, share in reversed(largest)]
    figure.set_size_inches(4.5, 0.2 * len(largest) + 0.8)
    axis = figure.subplots()
    axis.barh(range(len(names)), shares, color="C0")
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.axvline(1 / len(rows), color="0.5", lw=0.8, ls="--", label="even shares")
    left = sum(share for _, share in rows) - sum(shares)
    axis.set(xlabel=f"share of PT's sentences ({len(rows) - len(largest)} more have {left:.2f})")
    axis.legend(loc="lower right")
