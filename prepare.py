"""Turn raw text into rows of token ids that cram.py trains on.

    python prepare.py                                             # C4 from the hub, 8.9 G tokens
    python prepare.py --source "texts/*.jsonl.xz" --out data/own  # your own text
    python prepare.py --source python-docs --vocab-size 4096 --out data/docs  # no network, 30 s

Each document is normalised to lower-case ASCII, tokenized, filtered and deduplicated. The tokens
are packed without padding into rows of 128, sorted so that short sentences come first. Memory does
not grow with the corpus, and a stopped run resumes when the same command is started again.

Writes train.bin and val.bin (uint16 rows), tokenizer.json and meta.json into --out. The recipe is
that of "Cramming" (Geiping & Goldstein, arXiv 2212.14034), section 4.4, and its released code.
"""

import argparse
import ast
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import multiprocessing
import os
import re
import shutil
import sys
import sysconfig
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------- 1. Decisions

VERSION = 2  # raise it with every change after which the same text gives other bytes
SPECIAL_TOKENS = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]  # ids 0..4; cram.py relies on them
SEP = SPECIAL_TOKENS.index("<sep>")

HUB = {  # repository, configuration; all are plain parquet or json, no loading scripts
    "c4": ("allenai/c4", "en"),
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "default"),
}

TOKENS_A6000_DAY = 8_900_000_000  # 24 h at the 103 k tokens/s of the paper's A6000
MAX_DENSITY = 0.30  # paper: keep a document iff tokens < t * characters; noise compresses badly
DENSITY_HINT = ". With a small --vocab-size ordinary text is too dense as well: try a larger one"
TOKENIZER_CHARS = 200_000_000  # the tokenizer sees at most this much text (its memory is bounded)
DUPLICATE_SLOTS = 2**25  # of 8 bytes: 268 MB, see `DuplicateTable`
VAL_EVERY = 100  # one document in so many is held out for validation ...
VAL_MAX_ROWS = 16_384  # ... up to this many rows (2 M tokens at length 128); later ones are unused

MAX_DOCUMENT = 50_000_000  # bytes on one line; a longer line is skipped
MAX_LIST = 100_000_000  # bytes of a .json file that is one list, parsed at once
PIECE = 100_000  # characters: at most this much is tokenized at once; a document of a .txt file
BUCKET_TOKENS = 25_600_000  # shuffled at once in memory when ordering (51 MB)
READ_TOKENS = 8_388_608  # read at once when ordering (17 MB)
SAVE_SECONDS = 5  # a killed run loses about this much work
BAR_SECONDS = 0.1 if sys.stderr.isatty() else 60  # between updates of a progress bar
OUTAGE_SECONDS = 1800  # without an answer from the hub, then the run stops
RETRY_SECONDS = 30  # between attempts, each of which takes the client 20 to 90 s
REASONS_SHOWN = 20  # why documents and files were skipped; the rest are only counted


# ------------------------------------------------------------------------------- 2. Tokenizer

# What becomes of characters outside ASCII (Oniguruma patterns). GLUE is nearly all ASCII, so its
# forms are the ones to learn. No loss may glue words together or change a number.

BEFORE_DECOMPOSING = [  # NFKD would lose these or confuse them with something else
    ("[‘’‚‛‹›′´ʹ-ʿ\x91\x92]", "'"),  # quotes, primes, accents and letters used as apostrophes;
    ("[“”„‟«»″\x93\x94]", '"'),  # \x91 to \x97: Windows-1252, read as Latin-1
    ("[™℠]", " "),
    ("º", "°"),  # commonly typed for degrees
    ("≠", "!="),
    # Insertions: never before the first character, where the library would panic
    (r"(?=[¹²³⁰-ⁿ])(?<=[^¹²³⁰-ⁿ])", "^"),  # 10⁻² is 10^-2, m² is m^2
    (r"(?=[₀-₉])(?<=\p{Nd})", "_"),  # 1₂ is 1_2, but H₂O is h2o
    (r"(?=[\p{No}&&[^¹²³⁰-₉]])(?<=\S)|(?<=[\p{No}&&[^¹²³⁰-₉]])(?=\S)", " "),  # 1½ is 1 1/2
]
AFTER_DECOMPOSING = [  # in lower case
    ("[\\p{Pd}−\x96\x97]", "-"),  # hyphens, dashes, minus
    ("[⁄∕÷]", "/"), ("×", "x"), ("±", "+/-"), ("≤", "<="), ("≥", ">="), ("≈", "~"), ("√", " sqrt "),
    ("μ(?=[a-z])", "u"),  # 5 μg is not 5 g
    ("°", " degrees "), ("£", " pounds "), ("€", " euro "), ("¥", " yen "),
    ("ß", "ss"), ("æ", "ae"), ("œ", "oe"), ("þ", "th"),  # letters that do not decompose
    ("[đð]", "d"), ("ø", "o"), ("ł", "l"), ("ı", "i"), ("ħ", "h"),
    (r"[\p{M}\p{Cf}]+", ""),  # accents, now set apart; soft hyphens, zero-width characters
]


def build_normalizer(ascii_only=False):
    """Lower-case ASCII without accents, single spaces (paper section 4.4).

    Our deviation: the paper drops all that is not ASCII. Here the tables above come first, and what
    is left (other scripts, emoji, controls) becomes a space. `ascii_only` leaves out what cannot
    occur in ASCII text: the same result in a quarter of the time.
    """
    def replace(pattern, by):
        return normalizers.Replace(Regex(pattern), by)

    before, after = ([], []) if ascii_only else (BEFORE_DECOMPOSING, AFTER_DECOMPOSING)
    return normalizers.Sequence([
        *(replace(*pair) for pair in before),
        *([] if ascii_only else [normalizers.NFKD()]),
        normalizers.Lowercase(),
        *(replace(*pair) for pair in after),
        replace("``|''", '"'),
        replace(r"[^\x21-\x7e]{2,}|[^\x20-\x7e]", " "),  # not at single spaces: twice as fast
        normalizers.Strip(),
    ])


NORMALIZER, ASCII_NORMALIZER = build_normalizer(), build_normalizer(ascii_only=True)


def normalize(text):
    return (ASCII_NORMALIZER if text.isascii() else NORMALIZER).normalize_str(text)


def train_tokenizer(texts, vocab_size):
    """WordPiece over an iterator of strings; the same text gives the same file everywhere.

    The library numbers "##" letters in hash order, which differs between processes and decides
    between merges that are equally frequent. So the alphabet, all that build_normalizer leaves, is
    given to it as special tokens, the only ones whose order it keeps, and the result is renumbered:
    SPECIAL_TOKENS first, then sorted.
    """
    characters = [c for c in map(chr, range(0x21, 0x7F)) if not c.isupper()]
    alphabet = characters + ["##" + c for c in characters]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + alphabet, show_progress=False)
    words = pre_tokenizers.Whitespace()  # \w+|[^\w\s]+: what a "." token is
    learned = Tokenizer(models.WordPiece(unk_token="<unk>"))
    learned.pre_tokenizer = words
    learned.train_from_iterator(map(normalize, texts), trainer)

    entries = sorted(set(learned.get_vocab()) - set(SPECIAL_TOKENS))
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + entries)}
    tokenizer = Tokenizer(
        models.WordPiece(vocab, unk_token="<unk>", max_input_chars_per_word=100))
    tokenizer.pre_tokenizer = words
    tokenizer.normalizer = NORMALIZER
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


# ------------------------------------------------------------------------------- 3. Sources
# A reader yields (text, None) for each document and (None, reason) for one that cannot be read.
# The order is always the same, so that a number of documents is a place to resume from.


def text_of(row, where):
    """(text, None) of one row of a table, or (None, reason)."""
    if not isinstance(row, dict) or "text" not in row:
        columns = ascii(list(row)[:9])[:200] if isinstance(row, dict) else "no columns"
        return None, f'{where}: no column "text", but {columns}'
    if not isinstance(row["text"], str):
        return None, f'{where}: column "text" holds {type(row["text"]).__name__}, not a string'
    if len(row["text"]) > MAX_DOCUMENT:
        return None, f"{where}: over {MAX_DOCUMENT:,} characters"
    return without_surrogates(row["text"]), None


def without_surrogates(text):
    """Without the halves of character pairs that broken JSON escapes give: tokenizers refuses them.
    """
    return text.encode("utf-8", "ignore").decode("utf-8")


def read_jsonl(stream, path):
    number = 0
    while line := stream.readline(MAX_DOCUMENT):
        number += 1
        where = f"{path} line {number}"
        if len(line) == MAX_DOCUMENT and not line.endswith(b"\n"):
            while (rest := stream.readline(2**20)) and not rest.endswith(b"\n"):
                pass  # to the end of the line, without holding it
            yield None, f"{where}: over {MAX_DOCUMENT:,} bytes"
        elif not line.isspace():
            try:
                yield text_of(json.loads(line.decode("utf-8-sig")), where)
            except UnicodeDecodeError:
                yield None, f"{where}: not UTF-8"
            except (ValueError, RecursionError) as error:
                yield None, f"{where}: not JSON ({error})"


def read_json(stream, path):
    """Lines as in .jsonl, or one list of rows, which is held in memory."""
    start = stream.read(1000).decode("utf-8-sig", "ignore").lstrip()
    stream.seek(0)
    if not start.startswith("["):
        yield from read_jsonl(stream, path)
        return
    content = stream.read(MAX_LIST + 1)
    try:
        if len(content) > MAX_LIST:
            raise ValueError(f"a list of over {MAX_LIST:,} bytes; make it lines: jq -c '.[]'")
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        yield None, f"{path}: cannot be read as JSON ({error})"
        return
    for number, row in enumerate(rows, 1):
        yield text_of(row, f"{path} row {number}")


def read_txt(stream, path):
    """Pieces of about PIECE characters, each a document, cut at line ends (or inside a line that
    is longer than a piece)."""
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")
    replaced = 0
    while piece := text.read(PIECE):
        piece, bad_bytes = re.subn("[\udc80-\udcff]", "\ufffd", piece + text.readline(PIECE))
        replaced += bad_bytes
        yield piece, None
    if replaced:
        yield None, f"{path}: {replaced:,} bytes that are not UTF-8 became spaces"


def read_parquet(stream, path):
    import datasets  # only here and for the hub: it takes seconds

    # One file and one column at a time: other columns may differ from file to file. Without
    # batch_size a file that has no rows would be an error.
    rows = datasets.load_dataset("parquet", data_files=glob.escape(path), columns=["text"],
                                 batch_size=1000, split="train", streaming=True)
    for number, row in enumerate(rows, 1):
        yield text_of(row, f"{path} row {number}")


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}
UNPACK = {".gz": gzip.open, ".xz": lzma.open}
KINDS = ", ".join(READERS)


def kind(path):
    """".jsonl" of a.JSONL.gz"""
    return os.path.splitext(re.sub(r"\.(gz|xz)$", "", path.lower()))[1]


def open_file(path):
    if not path.startswith("hf://"):
        return open(path, "rb")
    from datasets.utils.file_utils import xopen  # of the hub

    return xopen(path, "rb")


def is_damage(error):
    """Whether the file is bad, rather than the disk or the network."""
    if type(error) is OSError:
        return error.errno is None  # then it is pyarrow's: a page that cannot be decoded
    return isinstance(error, (EOFError, ValueError, lzma.LZMAError, gzip.BadGzipFile, zlib.error))


def one_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def read_file(path):
    """Documents of one file, local or hf://. A damaged file, such as a download that broke off,
    gives those before the damage."""
    unpack = UNPACK.get(os.path.splitext(path.lower())[1])
    try:
        with open_file(path) as raw:
            yield from READERS[kind(path)](unpack(raw) if unpack else raw, path)
    except Exception as error:
        if not is_damage(error):
            raise
        yield None, f"{path}: the file is damaged or cut off ({one_line(error)})"


def python_docs(_):
    """What ships inside every CPython: the language reference's topics, and each module's docs."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some Linux distributions put it into a package of its own
        topics = {}
    for _, text in sorted(topics.items()):
        yield text, None

    library = Path(sysconfig.get_path("stdlib"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):  # the parser's own test cases
            continue
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        yield without_surrogates("\n".join(filter(None, docs))), None


# A source of your own: a function that yields documents as a reader does, under its --source name
BUILT_IN = {"python-docs": python_docs}


def local_files(pattern, out):
    """The readable files of a path, folder or glob, sorted. Prints how many files of which kind
    are read, and how many are not."""
    path, out = Path(pattern), out.resolve()
    found = path.rglob("*") if path.is_dir() else (
        [path] if path.is_file() else map(Path, glob.glob(pattern, recursive=True)))
    ours = (out / "meta.json", out / "tokenizer.json")
    files, read, others = [], Counter(), Counter()
    for f in sorted(found):
        if f.resolve() in ours or out / "work" in f.resolve().parents:
            continue
        if f.is_file() and kind(str(f)) in READERS:
            files.append(str(f))
            read[kind(str(f))] += 1
        elif f.is_file() or f.is_symlink():
            others["linked folders" if f.is_dir() else kind(str(f)) or "without ending"] += 1
    skipped = ", ".join(f"{n:,} {what}" for what, n in sorted(others.items()))
    if not files:
        raise SystemExit(
            f"--source {pattern}: nothing to read there" + f" (only {skipped})" * bool(others)
            + f". Give one of {', '.join([*HUB, *BUILT_IN])}, or a path, folder or glob of {KINDS} "
            "files; all but .parquet may end in .gz or .xz")
    print("files: " + ", ".join(f"{n:,} {what}" for what, n in sorted(read.items()))
          + f"; not read: {skipped}" * bool(others))
    return files


class UnusableSource(Exception):
    """Too little text, or none: nothing of this run is worth keeping."""


class Source:
    """The documents of --source, from the start or from where an earlier run stopped.

    That place is the cursor: the number of the file, how many rows of it have been read, and how
    many documents in all.
    """

    START = {"documents": 0, "file": 0, "row": 0}

    def __init__(self, name, out):
        self.name, self.revision, self.outage_began = name, None, None
        self.files, self.sizes = [], []  # those of the hub: see connect
        if name in BUILT_IN:
            self.files = [name]
        elif name not in HUB:
            self.files = local_files(name, out)
            self.sizes = [*map(os.path.getsize, self.files)]

    def connect(self, revision):
        """List the files of the repository on the hub. A run that resumes gives the revision that
        it began with, since the cursor may mean another document after a change."""
        import datasets

        datasets.disable_progress_bars()
        for library in ("datasets", "huggingface_hub"):  # they log each of their own retries
            logging.getLogger(library).setLevel(logging.CRITICAL)
        datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
        repository, configuration = HUB[self.name]
        while not self.files:
            try:
                builder = datasets.load_dataset_builder(
                    repository, configuration, revision=revision)
                self.files = list(builder.config.data_files["train"])
            except Exception as error:  # of any of four HTTP libraries
                if revision is None:
                    raise UnusableSource(
                        f"cannot open {repository} on the Hugging Face hub ({one_line(error)}). "
                        "Without a network, use --source python-docs or a path to text files of "
                        "your own.") from None
                self.wait(error)
        self.revision = re.search("@([0-9a-f]+)/", self.files[0])[1]  # hf://datasets/R@SHA/...

    def documents(self, cursor):
        """Yields (text, reason) as the readers do; self.cursor is then the place behind it."""
        self.cursor = dict(cursor)
        while self.cursor["file"] < len(self.files):
            file = self.files[self.cursor["file"]]
            if self.cursor["row"] and self.name in HUB:
                tqdm.write(f"reading {file} again from its start, up to document "
                           f"{self.cursor['row']:,}")
            try:
                read = BUILT_IN.get(file, read_file)
                for document in itertools.islice(read(file), self.cursor["row"], None):
                    self.outage_began = None
                    self.cursor["documents"] += 1
                    self.cursor["row"] += 1
                    yield document
            except Exception as error:
                if self.name not in HUB:
                    raise
                self.wait(error)
            else:
                self.cursor.update(file=self.cursor["file"] + 1, row=0)

    def wait(self, error):
        """Sleep until the next attempt to reach the hub, or stop after a long outage."""
        now = time.monotonic()
        self.outage_began = self.outage_began or now
        if now - self.outage_began > OUTAGE_SECONDS:
            raise SystemExit(f"--source {self.name}: no answer from the hub for "
                             f"{OUTAGE_SECONDS // 60} minutes ({one_line(error)}). Start the same "
                             "command again to resume from here.")
        tqdm.write(f"the hub does not answer ({one_line(error)}); trying again in "
                   f"{RETRY_SECONDS} s, for {OUTAGE_SECONDS // 60} minutes in all")
        time.sleep(RETRY_SECONDS)

    def sample(self, limit):
        """Text to train the tokenizer on, about `limit` characters: a share of each local file by
        size, or the beginning of any other source."""
        used, due, total = 0, 0, sum(self.sizes)
        parts = [(limit * size / max(1, total), read_file(file))
                 for file, size in zip(self.files, self.sizes, strict=False)]
        with tqdm(desc="tokenizer", unit="char", unit_scale=True, mininterval=BAR_SECONDS,
                  total=limit if self.name in HUB or total > limit else None) as bar:
            for share, documents in parts or [(limit, self.documents(self.START))]:
                due += share
                for text, _ in documents if used < due else ():
                    if text:
                        yield from pieces(text)
                        bar.update(len(text))
                        used += len(text)
                        if used >= due:
                            break


def printable(path):
    """A file name in which bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def pieces(text):
    """Lines of a text, cut at spaces where longer than PIECE. Normalising takes 20 bytes of memory
    a character, tokenizing more, and most lines are ASCII, which is faster."""
    start = 0
    while start < len(text):
        limit = start + PIECE
        end = text.find("\n", start + 1, limit)
        if end < 0 and limit < len(text):
            end = text.rfind(" ", start + 1, limit)
        end = end if end > 0 else limit
        yield text[start:end]
        start = end


# ------------------------------------------------------------------------------- 4. Workers
# One process a core normalises, tokenizes and hashes; the parent reads, decides and writes.


def start_worker(tokenizer_json):
    """Runs once in each process. The thread ends it when the parent is gone, even if killed."""
    global tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True  # a literal "<mask>" in the text is text
    tokenizer.normalizer = normalizers.Sequence([])  # what it gets here is normalised already
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)),
                     daemon=True).start()


def tokenize(texts):
    return [tokenize_document(text) for text in texts]


def tokenize_document(text):
    """(token ids as uint16, characters of the normalised text, its 64-bit hash)"""
    digest, ids, characters = hashlib.blake2b(digest_size=8), [np.zeros(0, np.uint16)], 0
    for normal in filter(None, map(normalize, pieces(text))):
        [encoding] = tokenizer.encode_batch_fast([normal], add_special_tokens=False)
        ids.append(np.array(encoding.ids, np.uint16))
        digest.update(normal.encode() + b" ")
        characters += len(normal) + 1  # with the spaces between pieces
    return np.concatenate(ids), max(0, characters - 1), int.from_bytes(digest.digest(), "little")


def chunks(source, cursor):
    """Yields work for one call: (texts, reasons of invalid ones, the cursor behind them)."""
    texts, reasons, size = [], [], 0
    for text, reason in source.documents(cursor):
        if text is None:
            reasons.append(reason)
        else:
            texts.append(text)
            size += len(text)
        if size >= 500_000 or len(texts) + len(reasons) >= 2_000:
            yield texts, reasons, dict(source.cursor)
            texts, reasons, size = [], [], 0
    if texts or reasons:
        yield texts, reasons, dict(source.cursor)


def in_parallel(jobs, tokenizer_json):
    """Tokenize chunks on all cores, in order, with never more than a few in memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(cores or 1, 61)  # Windows waits for no more
    context = multiprocessing.get_context("spawn")  # fork and the tokenizer's threads do not mix
    with ProcessPoolExecutor(cores, context, start_worker, (tokenizer_json,)) as pool:
        waiting = deque()
        try:
            for chunk in itertools.chain(jobs, [None]):
                if chunk:
                    waiting.append((chunk, pool.submit(tokenize, chunk[0])))
                while waiting and (chunk is None or len(waiting) > 2 * cores):
                    done, future = waiting.popleft()
                    yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------- 5. Filter and pack


def write_atomic(path, content):
    """Write bytes, or anything for JSON, to a temporary file, then rename it."""
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        f.write(content if isinstance(content, bytes) else json.dumps(content, indent=1).encode())
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def open_at(path, size):
    """A file to append to, cut back to the size it had when the progress was saved."""
    f = open(path, "r+b" if path.exists() else "w+b")
    if f.seek(0, os.SEEK_END) < size:
        raise SystemExit(f"{path} is damaged: delete {path.parent} to start over")
    f.truncate(size)
    f.seek(size)
    return f


class DuplicateTable:
    """The 64-bit hashes of earlier documents, in bounded memory.

    Each hash has one slot and overwrites what is in it, so a copy is missed if its slot was taken
    in between: after n other documents with probability 1 - exp(-n / 2**25), 3 % after a million.
    The log restores the table when a run resumes.
    """

    def __init__(self, path, entries):
        table = np.zeros(DUPLICATE_SLOTS, np.uint64)
        self.log = open_at(path, 8 * entries)
        self.log.seek(0)
        for start in range(0, entries, 2**20):  # the last of two entries in a slot stays
            hashes = np.fromfile(self.log, np.uint64, min(2**20, entries - start))
            table[hashes % np.uint64(DUPLICATE_SLOTS)] = hashes
        self.log.seek(8 * entries)
        self.slots = memoryview(table)
        self.entries = entries

    def add(self, digest):
        """Add a hash; returns whether it was there already."""
        slot = digest % DUPLICATE_SLOTS
        if self.slots[slot] == digest:
            return True
        self.slots[slot] = digest
        self.log.write(digest.to_bytes(8, "little"))
        self.entries += 1
        return False


COUNTS = ("documents_read", "documents_kept", "empty", "invalid", "dropped_density",
          "dropped_duplicate", "train_tokens", "val_tokens", "characters_written")


class Packer:
    """Appends documents to work/train.tokens and work/val.tokens.

    save() flushes them and records their sizes in work/progress.json. A run that resumes cuts off
    what was written after the last save.
    """

    def __init__(self, work, seq_len):
        self.path, self.seq_len = work / "progress.json", seq_len
        self.progress = {"cursor": Source.START, "counts": dict.fromkeys(COUNTS, 0), "hashes": 0}
        if self.path.exists():
            self.progress = json.loads(self.path.read_text())
            print(f"resuming after {self.progress['cursor']['documents']:,} documents")
        self.counts = self.progress["counts"]
        self.train = open_at(work / "train.tokens", 2 * self.counts["train_tokens"])
        self.val = open_at(work / "val.tokens", 2 * self.counts["val_tokens"])
        self.duplicates = DuplicateTable(work / "document.hashes", self.progress["hashes"])
        self.saved_at = time.monotonic()

    def save(self):
        for f in (self.train, self.val, self.duplicates.log):
            f.flush()
            os.fsync(f.fileno())
        self.progress["hashes"] = self.duplicates.entries
        write_atomic(self.path, self.progress)
        self.saved_at = time.monotonic()

    def add_document(self, ids, characters, digest):
        """Write a document unless it is filtered out. Returns the count that it belongs to."""
        counts = self.counts
        if not characters:
            return "empty"
        if len(ids) >= MAX_DENSITY * characters:
            return "dropped_density"
        if self.duplicates.add(digest):
            return "dropped_duplicate"
        ids = np.append(ids, np.uint16(SEP))
        if counts["val_tokens"] < self.seq_len:  # the first tokens: any corpus has one row
            n_val = self.seq_len - counts["val_tokens"]
        elif digest % VAL_EVERY:  # by hash: a copy in another place goes to the same side
            n_val = 0
        elif counts["val_tokens"] < VAL_MAX_ROWS * self.seq_len:
            n_val = len(ids)
        else:
            return "documents_kept"  # val.bin is full, and training must not see it either
        self.val.write(ids[:n_val].tobytes())
        self.train.write(ids[n_val:].tobytes())
        counts["val_tokens"] += len(ids[:n_val])
        counts["train_tokens"] += len(ids[n_val:])
        counts["characters_written"] += characters + 1
        return "documents_kept"


def pack(source, tokenizer_json, work, seq_len, target):
    """Read, tokenize and pack documents until there are `target` training tokens.

    The bytes do not depend on interruptions: progress is saved and the target checked only between
    chunks, and the chunks are always the same. Returns the counts.
    """
    packer = Packer(work, seq_len)
    counts = packer.counts
    enough = counts["train_tokens"] >= target
    todo = () if enough else chunks(source, packer.progress["cursor"])
    with tqdm(desc="tokens", unit="tok", unit_scale=True, initial=counts["train_tokens"],
              total=target if source.name in HUB else None, mininterval=BAR_SECONDS) as bar:
        for (_, reasons, cursor), documents in in_parallel(todo, tokenizer_json):
            counts["documents_read"] += len(documents) + len(reasons)
            for reason in reasons:
                counts["invalid"] += 1
                if counts["invalid"] <= REASONS_SHOWN:
                    tqdm.write(f"skipped: {reason}")
            for document in documents:
                counts[packer.add_document(*document)] += 1
            packer.progress["cursor"] = cursor
            bar.update(counts["train_tokens"] - bar.n)
            if counts["train_tokens"] >= target:
                break
            if time.monotonic() - packer.saved_at > SAVE_SECONDS:
                packer.save()
    packer.save()
    return counts


def check_enough(counts, seq_len):
    if counts["train_tokens"] < seq_len:
        tokens = counts["train_tokens"] + counts["val_tokens"]
        raise UnusableSource(
            f"too little text: {tokens:,} tokens of {counts['documents_read']:,} documents "
            f"({counts['empty']:,} are empty, {counts['invalid']:,} invalid, "
            f"{counts['dropped_density']:,} too dense). It takes two rows of {seq_len}, to train "
            "on and to validate on" + DENSITY_HINT * (counts["dropped_density"] > 0))


# ------------------------------------------------------------------------------- 6. Order


def row_blocks(path, n_rows, seq_len):
    with open(path, "rb") as f:
        at_once = max(1, READ_TOKENS // seq_len)
        for start in range(0, n_rows, at_once):
            count = min(at_once, n_rows - start)
            yield np.fromfile(f, np.uint16, count * seq_len).reshape(count, seq_len)


def row_key(rows, dot):
    """From 0 to seq_len for each row; the largest come first. Another order goes here."""
    return (rows == dot).sum(1)


def order_rows(tokens_path, out_path, seq_len, dot, vocab_size):
    """Sort rows by their number of ".", most first: short sentences first (paper v2).

    Ties are shuffled, since in the order of the source training would see one file after another.
    To do so in little memory, the rows with one key are dealt in turn to n buckets, which are
    adjacent parts of the output: row r of them becomes row r // n of bucket r mod n. Then each
    bucket is shuffled in place.

    Returns (rows, sha256 of the file, unigram entropy in nats).
    """
    n_rows, row_bytes = os.path.getsize(tokens_path) // (2 * seq_len), 2 * seq_len
    per_key, per_token = np.zeros(seq_len + 1, np.int64), np.zeros(vocab_size, np.int64)
    for rows in row_blocks(tokens_path, n_rows, seq_len):
        per_key += np.bincount(row_key(rows, dot), minlength=seq_len + 1)
        per_token += np.bincount(rows.ravel(), minlength=vocab_size)

    first_bucket, sizes = {}, []
    n_buckets = -(-per_key * seq_len // BUCKET_TOKENS)
    for key in reversed(range(seq_len + 1)):
        first_bucket[key] = len(sizes)
        sizes += [len(range(k, per_key[key], n_buckets[key])) for k in range(n_buckets[key])]
    starts = [0, *itertools.accumulate(sizes)]

    out_path.unlink(missing_ok=True)  # of a run killed just before its end; saves disk space
    part = out_path.with_suffix(".part")
    digest, rows_placed = hashlib.sha256(), np.zeros(seq_len + 1, np.int64)
    with open(part, "w+b") as f, tqdm(desc="ordering", unit="row", unit_scale=True,
                                      total=2 * n_rows, mininterval=BAR_SECONDS) as bar:
        for rows in row_blocks(tokens_path, n_rows, seq_len):
            keys = row_key(rows, dot)
            for key in np.unique(keys):
                n, group = n_buckets[key], rows[keys == key]
                rank = rows_placed[key] + np.arange(len(group))
                for k in range(n):
                    mine = np.flatnonzero(rank % n == k)  # neighbours in the bucket
                    if len(mine):
                        place = starts[first_bucket[key] + k] + int(rank[mine[0]] // n)
                        f.seek(place * row_bytes)
                        f.write(group[mine].tobytes())
                rows_placed[key] += len(group)
            bar.update(len(rows))
        for bucket, size in enumerate(sizes):
            f.seek(starts[bucket] * row_bytes)
            rows = np.fromfile(f, np.uint16, size * seq_len).reshape(-1, seq_len)
            shuffled = rows[np.random.default_rng(bucket).permutation(size)].tobytes()
            f.seek(starts[bucket] * row_bytes)
            f.write(shuffled)
            digest.update(shuffled)
            bar.update(size)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, out_path)

    p = per_token[per_token > 0] / per_token.sum()
    return n_rows, digest.hexdigest(), float(-(p * np.log(p)).sum())


# ------------------------------------------------------------------------------- 7. All together


def lock_folder(work):
    """Stop if another prepare.py is writing here. The lock ends with the process, even a killed
    one."""
    f = open(work / "arguments.lock", "w")
    try:
        if fcntl:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise SystemExit(f"another prepare.py is writing to {work.parent}: wait for it, or give "
                         "another --out") from None
    except OSError as error:  # a file system without locks
        print(f"cannot lock {work.parent} ({error}): start no second prepare.py on it")
    return f


def token_count(text):
    """Also 500k, 200M and 1.5G."""
    return float(text.upper().replace("K", "e3").replace("M", "e6").replace("G", "e9"))


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="c4", help=(
        "c4, wikipedia, fineweb-edu (from the hub; the last was filtered with a language model's "
        "judgements, outside the rules of cramming), python-docs (no network), or a path, folder "
        f"or glob of {KINDS} files, all but .parquet also .gz or .xz, with a column \"text\" "
        "(default: %(default)s)"))
    parser.add_argument("--tokens", type=token_count, default=TOKENS_A6000_DAY, help=(
        "stop after about so many training tokens, such as 200M or 1.5G (default: %(default)s, "
        "what the paper's A6000 reads in 24 h; 18 GB on disk, 39 GB while it is made)"))
    parser.add_argument("--out", default="data", help="folder to write (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32_768,
                        help="WordPiece entries (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=128,
                        help="tokens in a row (default: %(default)s)")
    args = parser.parse_args()
    if not args.source.strip():
        parser.error("--source is empty")
    if not 256 <= args.vocab_size <= 65_536:
        parser.error("--vocab-size must be from 256 to 65536: ids are stored as uint16")
    if not 8 <= args.seq_len <= 8192:
        parser.error("--seq-len must be from 8 to 8192")
    if not args.seq_len <= args.tokens < 1e14:
        parser.error("--tokens must be at least one row, and finite")
    args.tokens = int(args.tokens)
    return args


def read_earlier(out, work, arguments):
    """What an earlier run recorded here. Stops if it had other arguments."""
    start_over = f"delete {out / 'meta.json'} and {work} to start over"
    earlier = {}
    for path in (work / "arguments.json", out / "meta.json"):
        if path.exists():
            try:
                earlier = json.loads(path.read_text())
                differs = [key for key in arguments
                           if earlier["arguments"].get(key) != arguments[key]]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise SystemExit(f"{path} is damaged: {start_over}") from None
            if differs:
                raise SystemExit(f"{out} holds data made with other {', '.join(differs)}: give "
                                 f"another --out, or {start_over}")
    if work.exists() and any(work.iterdir()) and not any(work.glob("arguments.*")):
        raise SystemExit(f"{work} is not of prepare.py, which would delete it: give another --out")
    return earlier


def report(meta):
    read = meta["documents_read"]
    dropped = (f"{meta[key]:,} {key.replace('dropped_', '')} ({meta[key] / read:.2%})" for key in
               ("invalid", "empty", "dropped_density", "dropped_duplicate"))
    print(f"documents: {read:,} read, {meta['documents_kept']:,} kept; dropped: "
          f"{', '.join(dropped)}\ntokens: {meta['train_tokens']:,} in {meta['train_rows']:,} rows "
          f"to train on, {meta['val_rows']:,} rows to validate on\n"
          f"{meta['characters_per_token']:.2f} characters a token, unigram entropy "
          f"{meta['unigram_entropy']:.3f} nats"
          + DENSITY_HINT * (meta["dropped_density"] > 0.1 * read))


def prepare(source, args, out, work):
    """Make the files in `out`, resuming from `work`. Returns what meta.json says about them."""
    tokenizer_path = work / "tokenizer.json"
    if not tokenizer_path.exists():
        tokenizer = train_tokenizer(source.sample(TOKENIZER_CHARS), args.vocab_size)
        write_atomic(tokenizer_path, tokenizer.to_str().encode())
    tokenizer_json = tokenizer_path.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    vocab_size = tokenizer.get_vocab_size()

    counts = pack(source, tokenizer_json, work, args.seq_len, args.tokens)
    tokens = counts["train_tokens"] + counts["val_tokens"]
    if counts["train_tokens"] < args.tokens:
        print(f"the source ended after {counts['train_tokens']:,} training tokens")
    if counts["train_tokens"] < args.seq_len:
        raise UnusableSource(
            f"too little text: {tokens:,} tokens of {counts['documents_read']:,} documents "
            f"({counts['empty']:,} are empty, {counts['invalid']:,} invalid, "
            f"{counts['dropped_density']:,} too dense). It takes two rows of {args.seq_len}, to "
            "train on and to validate on" + DENSITY_HINT * (counts["dropped_density"] > 0))

    n_rows, sha256, entropy = order_rows(work / "train.tokens", out / "train.bin", args.seq_len,
                                         tokenizer.token_to_id("."), vocab_size)
    val = np.fromfile(work / "val.tokens", np.uint16)
    val_rows = min(len(val) // args.seq_len, VAL_MAX_ROWS)
    write_atomic(out / "val.bin", val[: val_rows * args.seq_len].tobytes())
    write_atomic(out / "tokenizer.json", tokenizer_json.encode())
    return {
        "seq_len": args.seq_len, "vocab_size": vocab_size, "train_rows": n_rows,
        "val_rows": val_rows, **counts, "train_tokens": n_rows * args.seq_len,
        "val_tokens": val_rows * args.seq_len,
        "characters_per_token": counts["characters_written"] / tokens,
        "unigram_entropy": entropy, "max_density": MAX_DENSITY,
        "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
        "train_sha256": sha256,
    }


def main():
    args = parse_arguments()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold anything
    out, work = Path(args.out), Path(args.out) / "work"
    source = Source(args.source, out)
    arguments = {"version": VERSION, "source": printable(args.source), "tokens": args.tokens,
                 "vocab_size": args.vocab_size, "seq_len": args.seq_len, "files": [
                     [printable(f), os.path.getsize(f)] for f in source.files if source.sizes]}
    earlier = read_earlier(out, work, arguments)
    if (out / "meta.json").exists():
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed just before it did this
        print(f"{out} is complete already")
        return

    work.mkdir(parents=True, exist_ok=True)
    try:
        with lock_folder(work):
            if args.source in HUB:
                source.connect(earlier.get("revision"))
            record = {"source": arguments["source"], "revision": source.revision,
                      "arguments": arguments}
            write_atomic(work / "arguments.json", record)
            meta = {**record, **prepare(source, args, out, work)}
            write_atomic(out / "meta.json", meta)
    except UnusableSource as error:
        shutil.rmtree(work)
        if not any(out.iterdir()):
            out.rmdir()
        raise SystemExit(f"--source {args.source}: {error}") from None
    shutil.rmtree(work)
    report(meta)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # `| head` has gone, perhaps in the middle of drawing a progress bar:
        os._exit(1)  # an orderly exit could wait for the lock of that bar for ever
    except (OSError, BrokenExecutor) as error:  # the latter: a worker ran out of memory
        sys.exit(f"prepare.py stopped: {error}. Fix that, then start the same command to resume.")
    except KeyboardInterrupt:
        sys.exit("\nstopped; start the same command again to resume")
