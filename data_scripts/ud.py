"""Sentences with a part of speech for each word: the treebanks of Universal Dependencies.

    python -m data_scripts.ud [--data data] [--from SOURCE | --url MIRROR | --check]
                              [--release 2.16]

Fetches a release, or takes SOURCE: a folder of folders UD_NAME, as a release or a number of
repositories has them, or a release's .tgz. Writes DATA/ud/prepared, format
"metapt tagged sentences 1":

- forms uint8 [bytes]: the words of all sentences as UTF-8, one after the other;
- form_offsets int64 [words + 1]: word i is forms[form_offsets[i] : form_offsets[i + 1]];
- tags uint8 [words]: the place of each word's tag in the list `tags` of about.json;
- sentence_offsets int64 [sentences + 1]: the words of sentence i, in the same way;
- treebank int32 [sentences]: the place of its treebank in the list `treebanks` of about.json.

`treebanks` has of each its name, language, code, licence, sentences, words, and the SHA-256 of its
files; `left_out` says which are not there, and why; `archive` is the file that was fetched. No
checksums of releases are published: what arrived is recorded. It stays in DATA/ud.

A treebank is left out where its licence excludes commercial use or is unknown. The licence is what
its README or LICENSE says, else what is known here (`KNOWN_LICENCES`).
"""

import re
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, NamedTuple

import numpy as np
import typer

from data_scripts import files
from data_scripts.files import BadInput, Check, Data, From, Url

FORMAT = "metapt tagged sentences 1"
SOURCE = "Universal Dependencies, https://universaldependencies.org"
LICENCE = "each treebank has its own"
HANDLES = "https://lindat.mff.cuni.cz/repository/xmlui/bitstream/handle/11234"
RELEASES = {"2.14": "1-5502", "2.15": "1-5787", "2.16": "1-5901"}  # their handles
NEWEST = "2.16"
TAGS = (
    "ADJ",
    "ADP",
    "ADV",
    "AUX",
    "CCONJ",
    "DET",
    "INTJ",
    "NOUN",
    "NUM",
    "PART",
    "PRON",
    "PROPN",
    "PUNCT",
    "SCONJ",
    "SYM",
    "VERB",
    "X",
)
COLUMNS = 10  # of CoNLL-U: number, form, lemma, UPOS, …
NO_WORD = re.compile(r"[0-9]+-[0-9]+|[0-9]+\.[0-9]+")  # words written as one; an empty node
WITHHELD = b"_"  # stands for each word where a treebank may not give its texts away
EXCERPT = "excerpt"
FOLDER = re.compile(r"UD_(?P<name>(?P<language>[^-]+)-.+)")
PART = re.compile(r"(?P<code>.+?)-ud-(?P<part>.+)\.(?i:conllu(\.gz)?)")
CONLLU = re.compile(r".+\.(?i:conllu(\.gz)?)")
README = re.compile(r"(?i:readme)(\..+)?")
LICENSE = re.compile(r"(?i:licen[cs]e)(\..+)?")

# Licences of treebanks whose folder does not say it.
KNOWN_LICENCES = {
    "CC BY-SA 3.0": "Arabic-PUD Hindi-PUD Irish-IDT Italian-PUD Turkish-PUD",
    "CC BY-SA 4.0": (
        "Afrikaans-AfriBooms Armenian-ArmTDP Belarusian-HSE Chinese-GSDSimp Croatian-SET Czech-PUD "
        "Danish-DDT Dutch-Alpino English-EWT Faroese-OFT Finnish-TDT French-GSD German-GSD "
        "Greek-GUD Hebrew-IAHLTwiki Icelandic-Modern Icelandic-PUD Indonesian-GSD Japanese-GSD "
        "Kazakh-KTB Korean-GSD Latin-LLCT Latvian-LVTB Lithuanian-ALKSNIS Maltese-MUDT "
        "North_Sami-Giella Norwegian-Bokmaal Norwegian-Nynorsk Persian-PerDT Polish-PUD "
        "Portuguese-GSD Romanian-RRT Russian-GSD Scottish_Gaelic-ARCOSG Serbian-SET Slovak-SNK "
        "Slovenian-SSJ Spanish-GSD Swedish-Talbanken Ukrainian-ParlaMint Upper_Sorbian-UFAL "
        "Vietnamese-VTB Welsh-CCG Wolof-WTB"
    ),
    "LGPL-LR": "Galician-TreeGal",
}
# Creative Commons' licences, in short, in words and by address.
CREATIVE_COMMONS = (
    re.compile(
        r"\bCC[\s-]+(?P<kind>BY([\s-]+(NC|SA|ND))*)([\s-]+v?(?P<version>\d\.\d))?",
        re.IGNORECASE,
    ),
    re.compile(
        r"\battribution(?P<kind>([\s-]+(non[\s-]?commercial|share[\s-]?alike|no[\s-]?deriv\w*))*)"
        r"[\s-]+(version\s+)?(?P<version>\d\.\d)",
        re.IGNORECASE,
    ),
    re.compile(
        r"creativecommons\.org/licenses/(?P<kind>[a-z-]+)/(?P<version>\d\.\d)", re.IGNORECASE
    ),
)
OTHER_LICENCES = {
    "CC0": re.compile(r"\bCC[\s-]?(0|zero)\b|\bpublic domain\b|/publicdomain/", re.IGNORECASE),
    "LGPL-LR": re.compile(
        r"\bLGPL-?LR\b|lesser general public licen[cs]e for linguistic", re.IGNORECASE
    ),
    "LGPL": re.compile(r"\bLGPL|\blesser general public licen[cs]e", re.IGNORECASE),
    "GPL": re.compile(r"\bGPL|\bGNU general public licen[cs]e", re.IGNORECASE),
    "Apache": re.compile(r"\bapache licen[cs]e", re.IGNORECASE),
    "MIT": re.compile(r"\bMIT licen[cs]e", re.IGNORECASE),
}
# The texts of the GNU licences speak of distribution that is not commercial, and exclude no other.
GNU = ("LGPL-LR", "LGPL", "GPL")
NONCOMMERCIAL = re.compile(r"\bnon[\s-]?commercial", re.IGNORECASE)


class Licence(NamedTuple):
    """What a text says of a licence."""

    name: str
    commercial: bool  # whether it allows commercial use


class Treebank(NamedTuple):
    """A folder UD_NAME."""

    name: str
    language: str
    code: str
    licence: str
    parts: dict[str, Path]  # "train", "dev", …: its file


class Sentences(NamedTuple):
    """The sentences of a treebank."""

    forms: list[bytes]  # of all words, as UTF-8
    tags: list[int]  # of all words
    lengths: list[int]  # words of each sentence


class NotUsed(Exception):
    """Why a treebank is left out."""


# Licences.


def recognise(text: str) -> Licence | None:
    """The licence that a text names first, or the one that excludes commercial use, if any does."""
    found = []  # place in the text, licence
    for pattern in CREATIVE_COMMONS:
        for match in pattern.finditer(text):
            licence = creative_commons(match["kind"], match["version"])
            if not licence.commercial:
                return licence
            found.append((match.start(), licence.name))
    for name, pattern in OTHER_LICENCES.items():
        match = pattern.search(text)
        if match:
            found.append((match.start(), name))
    if not found:
        return None
    _, name = min(found, key=lambda place_and_name: place_and_name[0])
    return Licence(name, name in GNU or not NONCOMMERCIAL.search(text))


def creative_commons(kind: str, version: str | None) -> Licence:
    """The licence of a kind in short ("by-nc-sa") or in words ("NonCommercial-ShareAlike")."""
    kind = kind.lower()
    terms = ["BY"]
    if "nc" in kind or "non" in kind:
        terms.append("NC")
    if "sa" in kind or "share" in kind:
        terms.append("SA")
    if "nd" in kind or "deriv" in kind:
        terms.append("ND")
    name = f"CC {'-'.join(terms)}"
    if version:
        name += f" {version}"
    return Licence(name, "NC" not in terms)


def read_licence(folder: Path, name: str) -> str:
    """The licence of a treebank.

    Raises:
        NotUsed: it excludes commercial use, or is unknown.
    """
    stated = []
    found = []
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace") if is_prose(path) else ""
        if README.fullmatch(path.name):
            # A line of the part that programs read.
            line = re.search(r"^licen[cs]e:[ \t]*(.+)$", text, re.IGNORECASE | re.MULTILINE)
            text = line[1].strip() if line else ""
            if text:
                stated.append(text)
        licence = recognise(text)
        if licence:
            found.append(licence)
        elif LICENSE.fullmatch(path.name):
            stated.append(f"what {path.name} says")
    for licence in found:
        if not licence.commercial:
            raise NotUsed(f"its licence excludes commercial use: {licence.name}")
    if found:
        return found[-1].name  # README comes after LICENSE, and is as UD asks for it
    if stated:
        raise NotUsed(f"its licence is not known here: {stated[-1][:80]}")
    for licence, treebanks in KNOWN_LICENCES.items():
        if name in treebanks.split():
            return licence
    raise NotUsed("its licence is unknown: there is no README or LICENSE that says it")


def is_prose(path: Path) -> bool:
    """Whether a file may tell of the licence."""
    return bool(README.fullmatch(path.name) or LICENSE.fullmatch(path.name))


# Treebanks.


def find_folders(source: Path) -> list[Path]:
    """The folders UD_NAME of a folder, or of the one release that lies in it.

    Raises:
        BadInput: there are none, or two releases.
    """
    if not source.is_dir():
        raise BadInput(f"{source} is missing")
    releases = sorted(path for path in source.glob("ud-treebanks-*") if path.is_dir())
    places = {source: treebank_folders(source)}
    for release in releases:
        places[release] = treebank_folders(release)
    filled = [place for place, found in places.items() if found]
    if not filled:
        raise BadInput(f"{source} holds no folder UD_LANGUAGE-NAME")
    if len(filled) > 1:
        raise BadInput(f"treebanks in both {filled[0]} and {filled[1]}: name one with --from")
    return places[filled[0]]


def treebank_folders(place: Path) -> list[Path]:
    """The folders UD_NAME that lie in a folder."""
    return sorted(path for path in place.iterdir() if path.is_dir() and FOLDER.fullmatch(path.name))


def open_treebank(folder: Path) -> Treebank:
    """What a folder UD_NAME holds.

    Raises:
        BadInput: two files in one role.
        NotUsed: it is to be left out.
    """
    named = FOLDER.fullmatch(folder.name)
    licence = read_licence(folder, named["name"])
    parts = {}
    codes = {}
    for path in sorted(folder.iterdir()):
        found = PART.fullmatch(path.name)
        if found:
            if found["part"] in parts:
                raise two_files(f"the part {found['part']}", parts[found["part"]], path)
            parts[found["part"]] = path
            codes.setdefault(found["code"], path)
        elif CONLLU.fullmatch(path.name):
            print(f"left out: {folder.name}/{path.name} is not named CODE-ud-PART.conllu")
    if not parts:
        raise NotUsed("it has no file CODE-ud-PART.conllu")
    if len(codes) > 1:
        raise two_files("two treebanks", *list(codes.values())[:2])
    if EXCERPT in parts and len(parts) > 1:
        other = next(path for part, path in parts.items() if part != EXCERPT)
        raise two_files("the same sentences", parts[EXCERPT], other)
    return Treebank(named["name"], named["language"], next(iter(codes)), licence, parts)


def two_files(role: str, first: Path, second: Path) -> BadInput:
    """The error that names two files or folders where one is wanted."""
    return BadInput(f"{first} and {second} are both of {role}: remove one of them")


def read_treebank(treebank: Treebank) -> Sentences:
    """All sentences of a treebank.

    Raises:
        BadInput: a file is torn or no CoNLL-U; it and the line are named.
        NotUsed: there are no sentences, or no words in them.
    """
    sentences = Sentences([], [], [])
    for path in treebank.parts.values():
        try:
            with files.open_plain(path) as file:
                read_conllu(file, path, sentences)
        except (EOFError, zlib.error, OSError) as error:
            raise BadInput(f"{path} cannot be read: {type(error).__name__} {error}") from None
    if not sentences.lengths:
        raise NotUsed("it has no sentences")
    if all(form == WITHHELD for form in sentences.forms):
        raise NotUsed("its words are withheld: each is _")
    return sentences


def read_conllu(file: BinaryIO, path: Path, sentences: Sentences) -> None:
    """Adds the sentences of a file.

    Comments, words written as one and empty nodes are passed over; lines may end in carriage
    return and line feed, and the last sentence need not end in a blank line.
    """
    length = 0  # words of the sentence so far
    for number, raw in enumerate(file, 1):
        place = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise BadInput(f"{place}: it is not UTF-8") from None
        if not line.strip():
            if length:
                sentences.lengths.append(length)
            length = 0
            continue
        if line.startswith("#"):
            continue
        columns = line.split("\t")
        if len(columns) != COLUMNS:
            raise BadInput(f"{place}: {len(columns)} columns, expected {COLUMNS}")
        identifier, form, _, tag = columns[:4]
        if NO_WORD.fullmatch(identifier):
            continue
        if identifier != str(length + 1):
            raise BadInput(f"{place}: the word is numbered {identifier!r}, expected {length + 1}")
        if not form:
            raise BadInput(f"{place}: the word is empty")
        if tag not in TAGS:
            raise BadInput(f"{place}: the part of speech {tag!r} is none of {', '.join(TAGS)}")
        sentences.forms.append(form.encode())
        sentences.tags.append(TAGS.index(tag))
        length += 1
    if length:
        sentences.lengths.append(length)


# Preparing.


class Offsets:
    """An array of where things begin and, in the end, of where the last one ends."""

    def __init__(self, append, name: str):
        self.append = append
        self.name = name
        self.end = 0
        append(name, np.zeros(1, np.int64))

    def add(self, lengths: list[int]) -> None:
        ends = self.end + np.cumsum(lengths, dtype=np.int64)
        self.append(self.name, ends)
        self.end = int(ends[-1])


def prepare(source: Path, folder: Path, archive: dict | None = None) -> dict:
    """Writes the sentences of all treebanks in a folder of folders UD_NAME.

    Args:
        source: the folder of folders.
        folder: where the arrays go, as `files.locked` gives it; those that are there are replaced.
        archive: what about.json will say of the file that was fetched.

    Returns:
        What about.json says.

    Raises:
        BadInput: a file is wrong, two are in one role, or no treebank is to be used.
    """
    folders = find_folders(source)
    treebanks = []
    left_out = []
    of_code = {}
    about = {
        "format": FORMAT,
        "source": SOURCE,
        "licence": LICENCE,
        "archive": archive,
        "tags": TAGS,
    }
    with (
        files.progress("reading", "treebanks") as advance,
        files.prepared_folder(folder, about) as append,
    ):
        words = Offsets(append, "form_offsets")
        sentence_ends = Offsets(append, "sentence_offsets")
        for done, place in enumerate(folders, 1):
            try:
                treebank = open_treebank(place)
                if treebank.code in of_code:
                    raise two_files(f"the code {treebank.code}", of_code[treebank.code], place)
                of_code[treebank.code] = place
                sentences = read_treebank(treebank)
            except NotUsed as error:
                left_out.append(f"{place.name}: {error}")
                continue
            finally:
                advance(done, len(folders))
            append("forms", np.frombuffer(b"".join(sentences.forms), np.uint8))
            words.add([len(form) for form in sentences.forms])
            append("tags", np.array(sentences.tags, np.uint8))
            sentence_ends.add(sentences.lengths)
            append("treebank", np.full(len(sentences.lengths), len(treebanks), np.int32))
            treebanks.append(describe(treebank, sentences))
        if not treebanks:
            raise BadInput(f"{source} holds no treebank that can be used; the first: {left_out[0]}")
        about["treebanks"] = treebanks
        about["left_out"] = left_out
    return about


def describe(treebank: Treebank, sentences: Sentences) -> dict:
    """What about.json says of a treebank."""
    return {
        "name": treebank.name,
        "language": treebank.language,
        "code": treebank.code,
        "licence": treebank.licence,
        "sentences": len(sentences.lengths),
        "words": len(sentences.forms),
        "files": {path.name: files.digest(path) for path in treebank.parts.values()},
    }


def unpack(archive: Path, folder: Path) -> None:
    """Takes the treebanks out of a release: their CoNLL-U files, READMEs and LICENSEs.

    Nothing of it is written outside of `folder`.

    Raises:
        BadInput: it is no whole archive, or holds a file twice.
    """
    try:
        with tarfile.open(archive) as content:
            for member in content:
                steps = PurePosixPath(member.name).parts
                if len(steps) < 2 or not member.isfile():
                    continue
                treebank, name = steps[-2:]
                wanted = CONLLU.fullmatch(name) or is_prose(Path(name))
                if not FOLDER.fullmatch(treebank) or not wanted:
                    continue
                path = folder / treebank / name
                if path.exists():
                    raise BadInput(f"{archive} holds two files {treebank}/{name}")
                path.parent.mkdir(parents=True, exist_ok=True)
                files.enough_space(path, member.size)
                with content.extractfile(member) as packed, path.open("xb", 0) as file:
                    for piece in iter(lambda packed=packed: packed.read(files.PIECE), b""):
                        files.write(file, piece, path, member.size - file.tell())
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        reason = "is not a whole archive that can be read, delete it to fetch it anew"
        raise BadInput(f"{archive} {reason}: {error}") from None


def fetch_release(release: str, url: str | None, folder: Path) -> tuple[Path, str]:
    """A release's .tgz in `folder`, and where it came from: a mirror's address, if one is given."""
    if not re.fullmatch(r"\d+\.\d+", release):
        raise BadInput(f"--release is {release!r}, expected a number such as {NEWEST}")
    if url is None and release not in RELEASES:
        known = ", ".join(RELEASES)
        raise BadInput(f"the address of release {release} is not known, but that of {known}: --url")
    name = f"ud-treebanks-v{release}.tgz"
    location = files.address(url or f"{HANDLES}/{RELEASES[release]}", name)
    with files.progress(name) as advance:
        files.fetch(location, folder / name, None, advance, files.session())
    return folder / name, location


def prepare_archive(archive: Path, folder: Path, url: str | None) -> dict:
    """Like `prepare`, of a release's .tgz."""
    facts = {"file": archive.name, "url": url, "sha256": files.digest(archive)}
    with files.scratch(folder) as work:
        unpacked = work / "unpacked"
        unpacked.mkdir()
        unpack(archive, unpacked)
        try:
            return prepare(unpacked, folder, facts)
        except BadInput as error:
            raise BadInput(str(error).replace(str(unpacked), str(archive))) from None


Release = Annotated[
    str | None,
    typer.Option(help=f"Which to fetch: {', '.join(RELEASES)}", show_default=NEWEST),
]


def ud(
    data: Data = Path("data"),
    url: Url = None,
    from_: From = None,
    release: Release = None,
    check: Check = False,
):
    """Fetch Universal Dependencies' treebanks, or take them from a folder or a release's .tgz.

    Of each treebank it is said what licence it has; some licences leave it out.
    """
    files.one_of(url=url, from_=from_, check=check)
    files.one_of(release=release, from_=from_, check=check)
    prepared = data / "ud" / "prepared"
    if check:
        files.check(prepared, FORMAT)
        return
    with files.locked(prepared, FORMAT) as folder:
        if from_ is None:
            archive, location = fetch_release(release or NEWEST, url, data / "ud")
            about = prepare_archive(archive, folder, location)
        elif from_.is_file():
            about = prepare_archive(from_, folder, None)
        else:
            about = prepare(from_, folder)
    for problem in about["left_out"]:
        print(f"left out: {problem}")
    words = sum(treebank["words"] for treebank in about["treebanks"])
    sentences = sum(treebank["sentences"] for treebank in about["treebanks"])
    counts = f"{len(about['treebanks'])} treebanks, {sentences} sentences, {words} words"
    print(f"{counts} in {folder}, {len(about['left_out'])} treebanks left out")


if __name__ == "__main__":
    files.run(ud)
