"""Turn raw text into rows of token ids that cram.py trains on.

    python prepare.py                                             # C4 from the hub, 8.9 G tokens
    python prepare.py --source "texts/*.jsonl.xz" --out data/own  # your own text
    python prepare.py --source python-docs --vocab-size 4096 --out data/docs  # no network, 30 s

What happens to the text: it is read a document at a time, normalised to lower-case ASCII, used to
train a WordPiece tokenizer, tokenized in parallel, filtered, deduplicated, packed without padding
into rows of 128, and sorted so that short sentences come first. It streams: memory does not grow
with the corpus, and a run that was stopped goes on when the same command is started again.

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
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

# ------------------------------------------------------------------------------- 1. Decisions

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
SEEN_SLOTS = 2**25  # 8-byte slots of the duplicate table: 268 MB, see `Seen`
VAL_EVERY = 100  # one document in so many is held out for validation ...
VAL_MAX_ROWS = 16_384  # ... up to this many rows (2 M tokens at length 128); later ones are unused

MAX_DOCUMENT = 50_000_000  # bytes on one line; what is longer is no document, and is skipped
MAX_LIST = 100_000_000  # bytes of a .json file that is one list, parsed at once
PIECE = 100_000  # characters handed to the tokenizer at once; bytes of a piece of a .txt file
PILE_TOKENS = 25_600_000  # shuffled at once in memory when ordering (51 MB)
READ_TOKENS = 8_388_608  # read at once when ordering (17 MB)
SAVE_SECONDS = 5  # between the places from which a killed run goes on
BAR_S = 0.1 if sys.stderr.isatty() else 60  # seconds between updates of a progress bar
NETWORK_RETRIES = 8  # in a row, waiting 1, 2, 4 ... seconds: about four minutes of outage


# ------------------------------------------------------------------------------- 2. Tokenizer


# What becomes of characters outside ASCII (patterns are Oniguruma's). GLUE is nearly all ASCII, so
# its forms are the ones to learn. Nothing may glue words together or change a number: "10²" must
# not become 102, nor "1½" 11/2, nor "don´t" don t.

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

    Our deviation: the paper drops what is not ASCII. Here characters that stand for something in
    English are replaced as above, the rest (other scripts, emoji, controls) becomes a space.

    `ascii_only` leaves out what ASCII text does not need. It gives the same and takes a quarter of
    the time.
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


def untrained(model):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = build_normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # \w+|[^\w\s]+: what a "." token is
    return tokenizer


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
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + alphabet, show_progress=False
    )
    learned = untrained(models.WordPiece(unk_token="<unk>"))
    learned.train_from_iterator(texts, trainer)

    words = sorted(set(learned.get_vocab()) - set(SPECIAL_TOKENS))
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + words)}
    tokenizer = untrained(
        models.WordPiece(vocab, unk_token="<unk>", max_input_chars_per_word=100))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


# ------------------------------------------------------------------------------- 3. Sources
# A source yields (text, None) for each document and (None, reason) for one that cannot be read,
# always in the same order, so that a number of documents is a position to go on from.

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


def kind(path):
    return Path(re.sub(r"\.(gz|xz)$", "", path.name)).suffix


def local_files(pattern, out):
    """The files that a path, folder or glob names, sorted; an error if there is none to read."""
    path = Path(pattern)
    if path.is_dir():
        found = [f for f in path.rglob("*") if kind(f) in SUFFIXES]
    else:
        found = [path] if path.is_file() else map(Path, glob.glob(pattern, recursive=True))
    out = out.resolve()
    ours = (out / "meta.json", out / "tokenizer.json")  # and what is in work
    files = sorted(f for f in found if f.is_file() and f.resolve() not in ours
                   and f.resolve().parent != out / "work")
    if not files:
        raise SystemExit(f"--source {pattern}: nothing to read there. Give one of "
                         f"{', '.join([*HUB, *BUILT_IN])}, or a path or glob of "
                         f"{', '.join(SUFFIXES)} files (also .gz, .xz)")
    for f in files:
        if kind(f) not in SUFFIXES or (kind(f) == ".parquet" and f.suffix != ".parquet"):
            raise SystemExit(f"{f}: cannot read this kind of file, only {', '.join(SUFFIXES)}, all "
                             "but parquet also .gz or .xz")
    return files


def text_of(row, where):
    """The document in one row of a table, checked."""
    if not isinstance(row, dict) or "text" not in row:
        columns = ascii(list(row)[:9])[:200] if isinstance(row, dict) else "no columns"
        return None, f'{where}: no column "text", but {columns}'
    if not isinstance(row["text"], str):
        return None, f'{where}: column "text" holds {type(row["text"]).__name__}, not a string'
    if len(row["text"]) > MAX_DOCUMENT:
        return None, f"{where}: over {MAX_DOCUMENT:,} characters"
    return without_surrogates(row["text"]), None


def without_surrogates(text):
    """Half a character pair, as a broken JSON escape gives it, cannot be passed to the library."""
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
    """A .json file: lines as in .jsonl, or one list of rows, which has to be held in memory."""
    start = stream.read(1000).decode("utf-8-sig", "ignore").lstrip()
    stream.seek(0)
    if not start.startswith("["):
        yield from read_jsonl(stream, path)
        return
    content = stream.read(MAX_LIST + 1)
    if len(content) > MAX_LIST:
        raise SystemExit(f"{path}: a JSON list of over {MAX_LIST:,} bytes. Make it one row a line "
                         f"(jq -c '.[]' FILE > FILE.jsonl), which is read at any size")
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        yield None, f"{path}: not JSON ({error})"
        return
    for number, row in enumerate(rows, 1):
        yield text_of(row, f"{path} row {number}")


def read_txt(stream, path):
    """The file in pieces of some PIECE characters, each a document to the end of a line; a longer
    line is cut."""
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")
    replaced = 0
    while piece := text.read(PIECE):
        piece, bad_bytes = re.subn("[\udc80-\udcff]", "\ufffd", piece + text.readline(PIECE))
        replaced += bad_bytes
        yield piece, None
    if replaced:
        yield None, f"{path}: {replaced:,} bytes that are not UTF-8, replaced"


def read_parquet(stream, path):
    import datasets  # only here: it takes seconds, and most sources work without it

    # A file by itself, the one column: the others may differ from file to file. batch_size: a
    # file without rows would set it to 0.
    rows = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train",
                                 columns=["text"], batch_size=1000, streaming=True)
    for number, row in enumerate(rows, 1):
        yield text_of(row, f"{path} row {number}")


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}


def read_file(path):
    """Documents of one local file. One that breaks off (a cut download) keeps what came before, of
    a .txt the whole pieces."""
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opened(path, "rb") as stream:
            yield from READERS[kind(path)](stream, path)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        yield None, f"{path}: the compressed file is damaged or cut off ({error})"
    except Exception as error:  # of pyarrow, which has many
        if kind(path) != ".parquet":
            raise
        yield None, f"{path}: not a good parquet file with a column text ({error})"


def python_docs():
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


# A source of your own: a function that yields documents, as above, under the name for --source
BUILT_IN = {"python-docs": python_docs}


class Source:
    """Documents of --source, from any position on.

    A position is JSON: {"documents": how many were read, "stream": the state of the `datasets`
    stream, where there is one}. `bookmark` gives that behind the last document yielded.
    """

    def __init__(self, name, out):
        self.name = name
        self.files = [] if name in HUB or name in BUILT_IN else local_files(name, out)
        self.begin = {"documents": 0, "stream": None}

    def documents(self, position):
        self.count, self.stream = position["documents"], None
        if self.name in HUB:
            documents = self.streamed(position["stream"])
        else:
            documents = BUILT_IN[self.name]() if self.name in BUILT_IN else (
                itertools.chain.from_iterable(map(read_file, self.files)))
            documents = itertools.islice(documents, self.count, None)
        for document in documents:
            self.count += 1
            yield document

    def bookmark(self):
        return {"documents": self.count,
                "stream": self.stream.state_dict() if self.stream else None}

    def streamed(self, state):
        """Rows through `datasets`, across a network that comes and goes."""
        import datasets  # only here: it takes seconds, and most sources work without it

        datasets.disable_progress_bars()
        failures = 0
        while True:
            try:
                if self.stream is None:
                    repository, configuration = HUB[self.name]
                    self.stream = datasets.load_dataset(
                        repository, configuration, split="train", streaming=True)
                if state:
                    self.stream.load_state_dict(state)
                for row in self.stream:
                    yield text_of(row, f"{self.name} row {self.count + 1}")
                    failures = 0
                return
            except Exception as error:  # of any of four HTTP libraries; shown, raised in the end
                what = f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]
                if self.stream is None:
                    raise SystemExit(
                        f"--source {self.name}: cannot open {repository} on the Hugging Face hub "
                        f"({what}). Without a network, use --source python-docs or a path to text "
                        "files of your own.")
                if failures == NETWORK_RETRIES:
                    raise SystemExit(f"--source {self.name}: {what}. Start the same command again "
                                     "to go on from here.")
                tqdm.write(f"{what}; trying again in {2**failures} s")
                time.sleep(2**failures)
                failures += 1
                state = self.stream.state_dict()

    def sample(self, limit):
        """About `limit` characters for the tokenizer: of files a share of each, by size; of others
        the beginning."""
        used, due, total = 0, 0, sum(f.stat().st_size for f in self.files)
        if self.files:
            sources = ((limit * f.stat().st_size / max(1, total), read_file(f))
                       for f in self.files)
        else:
            sources = [(limit, self.documents(self.begin))]
        with tqdm(desc="tokenizer", unit="char", unit_scale=True, mininterval=BAR_S) as bar:
            for share, documents in sources:
                due += share
                for text, _ in documents if used < due else ():
                    if text:
                        yield from pieces(text)
                        bar.update(len(text))
                        used += len(text)
                        if used >= due:
                            break


def pieces(text):
    """A text cut at line ends, and a line longer than PIECE at spaces: normalising takes some 20
    bytes a character, tokenizing more."""
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
    """Runs once in each process. The watch ends it when the parent is gone, even if killed."""
    global tokenizer, normalizer, ascii_normalizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True  # a literal "<mask>" in the text is text
    normalizer, ascii_normalizer = tokenizer.normalizer, build_normalizer(ascii_only=True)
    tokenizer.normalizer = normalizers.Sequence([])  # what it gets here is normalised already

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def tokenize(texts):
    return [tokenize_document(text) for text in texts]


def tokenize_document(text):
    """What `pack` needs of a document: its token ids (uint16), characters, and a 64-bit hash of
    the normalised text."""
    digest, ids, characters = hashlib.blake2b(digest_size=8), [], 0
    for piece in pieces(text):
        normal = (ascii_normalizer if piece.isascii() else normalizer).normalize_str(piece)
        if normal:
            [encoding] = tokenizer.encode_batch_fast([normal], add_special_tokens=False)
            ids.append(np.array(encoding.ids, np.uint16))
            digest.update(normal.encode() + b" ")
            characters += len(normal) + 1  # with the spaces between pieces
    return (np.concatenate(ids) if ids else np.zeros(0, np.uint16), max(0, characters - 1),
            int.from_bytes(digest.digest(), "little"))


def chunks(source, position):
    """Work for one call: some documents, the reasons of the invalid ones, the place behind them."""
    texts, reasons, size = [], [], 0
    for text, reason in source.documents(position):
        if text is None:
            reasons.append(reason)
        else:
            texts.append(text)
            size += len(text)
        if size >= 500_000 or len(texts) + len(reasons) >= 2_000:
            yield texts, reasons, source.bookmark()
            texts, reasons, size = [], [], 0
    if texts or reasons:
        yield texts, reasons, source.bookmark()


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


def write_whole(path, content):
    """Bytes, or anything for JSON; the file is there whole or not at all."""
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        f.write(content if isinstance(content, bytes) else json.dumps(content, indent=1).encode())
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def open_at(path, size):
    """A file to append to, cut back to the size it had when the progress was written."""
    f = open(path, "r+b" if path.exists() else "w+b")
    if f.seek(0, os.SEEK_END) < size:
        raise SystemExit(f"{path} is damaged: delete {path.parent} to start over")
    f.truncate(size)
    f.seek(size)
    return f


class Seen:
    """Which 64-bit hashes came before, in bounded memory and exact as far as it goes.

    Each hash has one slot and overwrites what is in it. So nothing is called a duplicate that is
    none (but for one hash in 2**64), while a copy is missed if its slot was taken in between: with
    n newer entries the chance is 1 - exp(-n / 2**25): 3 % after a million, 63 % after 34 million.
    """

    def __init__(self, path, entries):
        table = np.zeros(SEEN_SLOTS, np.uint64)
        self.log = open_at(path, 8 * entries)
        self.log.seek(0)
        for start in range(0, entries, 2**20):  # the last of two entries in a slot stays
            hashes = np.fromfile(self.log, np.uint64, min(2**20, entries - start))
            table[hashes % np.uint64(SEEN_SLOTS)] = hashes
        self.log.seek(8 * entries)
        self.slots = memoryview(table)
        self.entries = entries

    def add(self, digest):
        """Whether it was there already; it is afterwards."""
        slot = digest % SEEN_SLOTS
        if self.slots[slot] == digest:
            return True
        self.slots[slot] = digest
        self.log.write(digest.to_bytes(8, "little"))
        self.entries += 1
        return False


class TooLittleText(Exception):
    """What the source gives is not worth keeping anything of."""


COUNTS = ("documents_read", "documents_kept", "empty", "invalid", "dropped_density",
          "dropped_duplicate", "train_tokens", "val_tokens",
          "val_documents", "characters_written")


def pack(source, tokenizer_json, work, seq_len, target):
    """Stream the source into work/train.tokens and work/val.tokens, each document ending in <sep>.

    Every few seconds the files are flushed, and work/progress.json says how far they are good: a
    killed run cuts off what lies behind and makes it again. That gives the same bytes because a
    position is always the end of a chunk, and whether to end is asked only there.

    Returns what is in progress.json: the counts, and the reason of the first invalid document.
    """
    progress = {"position": source.begin, "counts": dict.fromkeys(COUNTS, 0), "seen": 0,
                "first_invalid": None}
    if (work / "progress.json").exists():
        progress = json.loads((work / "progress.json").read_text())
        print(f"going on after {progress['position']['documents']:,} documents")
    counts = progress["counts"]
    train = open_at(work / "train.tokens", 2 * counts["train_tokens"])
    val = open_at(work / "val.tokens", 2 * counts["val_tokens"])
    seen = Seen(work / "seen.hashes", progress["seen"])

    def save():
        for f in (train, val, seen.log):
            f.flush()
            os.fsync(f.fileno())
        progress["seen"] = seen.entries
        write_whole(work / "progress.json", progress)

    def take(ids, characters, digest):
        """Write a document if it is wanted. Returns what became of it, a key of the counts."""
        if not characters:
            return "empty"
        if len(ids) >= MAX_DENSITY * characters:
            return "dropped_density"
        if seen.add(digest):
            return "dropped_duplicate"
        ids = np.append(ids, np.uint16(SEP))
        if counts["val_tokens"] < seq_len:  # the first tokens fill one row, so that there is one
            n_val = seq_len - counts["val_tokens"]
        elif digest % VAL_EVERY:  # by what it says, not by its place: the same text, the same side
            n_val = 0
        elif counts["val_tokens"] < VAL_MAX_ROWS * seq_len:
            n_val = len(ids)
        else:
            return "documents_kept"  # val.bin is full, and training must not see it either
        val.write(ids[:n_val].tobytes())
        train.write(ids[n_val:].tobytes())
        counts["val_tokens"] += len(ids[:n_val])
        counts["train_tokens"] += len(ids[n_val:])
        counts["val_documents"] += n_val > 0
        counts["characters_written"] += characters + 1
        return "documents_kept"

    enough = counts["train_tokens"] >= target
    to_do = () if enough else chunks(source, progress["position"])
    saved_at = time.monotonic()
    with tqdm(desc="tokens", unit="tok", unit_scale=True, initial=counts["train_tokens"],
              total=target if source.name in HUB else None, mininterval=BAR_S) as bar:
        for (_, reasons, position), documents in in_parallel(to_do, tokenizer_json):
            counts["documents_read"] += len(documents) + len(reasons)
            counts["invalid"] += len(reasons)
            if reasons and not progress["first_invalid"]:
                progress["first_invalid"] = reasons[0]
                tqdm.write(f"skipping what cannot be read, first: {ascii(reasons[0])}")
            for document in documents:
                counts[take(*document)] += 1
            progress["position"] = position
            bar.update(counts["train_tokens"] - bar.n)
            if counts["train_tokens"] >= target:
                break
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
                saved_at = time.monotonic()
    save()
    for f in (train, val, seen.log):
        f.close()
    if not counts["documents_kept"]:
        why = progress["first_invalid"]
        raise TooLittleText(
            f"no document that can be used, of {counts['documents_read']:,} read: "
            f"{counts['empty']:,} empty, {counts['invalid']:,} invalid, "
            f"{counts['dropped_density']:,} too dense" + (f". {why}" if why else "")
            + DENSITY_HINT * (counts["dropped_density"] > 0))
    return progress


# ------------------------------------------------------------------------------- 6. Order


def row_blocks(path, n_rows, seq_len):
    with open(path, "rb") as f:
        at_once = max(1, READ_TOKENS // seq_len)
        for start in range(0, n_rows, at_once):
            count = min(at_once, n_rows - start)
            yield np.fromfile(f, np.uint16, count * seq_len).reshape(count, seq_len)


def order_rows(tokens_path, out_path, seq_len, dot, vocab_size):
    """Rows with the most "." first (paper v2: short sentences first); ties in random order.

    Two passes, memory of one pile. The rows with d dots are dealt to n_piles[d] piles that fit into
    memory, each with its place in the output file: the i-th row goes to pile i mod n_piles[d], at
    place i // n_piles[d] in it. Then every pile is shuffled where it lies. Otherwise rows with the
    same key would stay in the order of the source, and training would see one file after another.

    Returns (rows, sha256 of the file, unigram entropy in nats).
    """
    def key(rows):  # for another order change this: 0 to seq_len, the largest come first
        return (rows == dot).sum(1)

    n_rows = os.path.getsize(tokens_path) // (2 * seq_len)
    per_dots, per_token = np.zeros(seq_len + 1, np.int64), np.zeros(vocab_size, np.int64)
    for rows in row_blocks(tokens_path, n_rows, seq_len):
        per_dots += np.bincount(key(rows), minlength=seq_len + 1)
        per_token += np.bincount(rows.ravel(), minlength=vocab_size)

    first_pile = np.zeros(seq_len + 1, np.int64)  # of each count, the largest count first
    n_piles = -(-per_dots * seq_len // PILE_TOKENS)
    sizes = []
    for dots in reversed(range(seq_len + 1)):
        first_pile[dots] = len(sizes)
        sizes += [(per_dots[dots] - k - 1) // n_piles[dots] + 1 for k in range(n_piles[dots])]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    out_path.unlink(missing_ok=True)  # of a run killed just before its end: no third copy
    part = out_path.with_suffix(".part")
    digest = hashlib.sha256()
    dealt = np.zeros(seq_len + 1, np.int64)
    with open(part, "w+b") as f, tqdm(desc="ordering", unit="row", unit_scale=True,
                                      total=2 * n_rows, mininterval=BAR_S) as bar:
        for rows in row_blocks(tokens_path, n_rows, seq_len):
            dots = key(rows)
            for d in np.unique(dots):
                mine = rows[dots == d]
                for k in range(n_piles[d]):
                    first = (k - dealt[d]) % n_piles[d]
                    if first < len(mine):
                        place = starts[first_pile[d] + k] + (dealt[d] + first) // n_piles[d]
                        f.seek(int(place) * 2 * seq_len)
                        f.write(mine[first :: n_piles[d]].tobytes())
                dealt[d] += len(mine)
            bar.update(len(rows))
        for pile, size in enumerate(sizes):
            f.seek(int(starts[pile]) * 2 * seq_len)
            rows = np.fromfile(f, np.uint16, int(size) * seq_len).reshape(-1, seq_len)
            shuffled = rows[np.random.default_rng(pile).permutation(len(rows))].tobytes()
            f.seek(int(starts[pile]) * 2 * seq_len)
            f.write(shuffled)
            digest.update(shuffled)
            bar.update(len(rows))
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, out_path)

    p = per_token[per_token > 0] / per_token.sum()
    return n_rows, digest.hexdigest(), float(-(p * np.log(p)).sum())


# ------------------------------------------------------------------------------- 7. All together


def check_space(out, source, target):
    """The packed tokens and their ordered copy must fit: 2 bytes a token each, a little more."""
    tokens = target
    if source.files:  # 3 characters a token, to be safe; text compressed at most 6 times
        tokens = min(target, sum(f.stat().st_size * (1 if f.suffix in (".txt", ".jsonl", ".json")
                                                     else 6) for f in source.files) / 3)
    elif source.name in BUILT_IN:
        tokens = min(target, 10**7)
    files = (out / "train.bin", out / "train.part", *out.glob("work/*"))  # of a run to go on with
    held = sum(f.stat().st_size for f in files if f.is_file())
    need, free = 4.4 * tokens / 1e9, (shutil.disk_usage(out).free + held) / 1e9
    print(f"disk: needs up to {need:.1f} GB while ordering, half of it afterwards; {free:.1f} free")
    if need > free:
        raise SystemExit(f"{out} has {free:.1f} GB free, and {need:.1f} GB may be needed: make "
                         "room, choose another --out, or a smaller --tokens")


def report(meta):
    read = meta["documents_read"]
    print(f"documents: {meta['documents_read']:,} read, {meta['documents_kept']:,} kept; dropped: "
          + ", ".join(f"{meta[key]:,} {what} ({meta[key] / read:.2%})" for key, what in (
              ("invalid", "invalid"), ("empty", "empty"), ("dropped_density", "too dense"),
              ("dropped_duplicate", "duplicate"))))
    print(f"tokens: {meta['train_tokens']:,} in {meta['train_rows']:,} rows to train on, "
          f"{meta['val_rows']:,} rows to validate on\n"
          f"{meta['characters_per_token']:.2f} characters a token, unigram entropy "
          f"{meta['unigram_entropy']:.3f} nats"
          + DENSITY_HINT * (meta["dropped_density"] > 0.1 * read))


def token_count(text):
    """200M, 1.5G and 1e9 are understood."""
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1)
    try:
        return int(float(text if scale == 1 else text[:-1]) * scale)
    except OverflowError:  # "inf"
        raise ValueError from None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="c4", help=(
        "c4, wikipedia, fineweb-edu (from the hub), python-docs (no network), or a path, folder or "
        "glob of .txt, .jsonl, .json, .parquet files, also .gz, .xz, text in the column "
        '"text" (default: %(default)s)'))
    parser.add_argument("--tokens", type=token_count, default=TOKENS_A6000_DAY, help=(
        "stop after about so many training tokens (default: %(default)s, what the paper's A6000 "
        "reads in 24 h; 18 GB on disk)"))
    parser.add_argument("--out", default="data", help="folder to write (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32_768,
                        help="WordPiece entries (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=128,
                        help="tokens in a row (default: %(default)s)")
    args = parser.parse_args()
    if not 256 <= args.vocab_size <= 65_536:
        parser.error("--vocab-size must be from 256 to 65536: ids are stored as uint16")
    if not 8 <= args.seq_len <= 8192:
        parser.error("--seq-len must be from 8 to 8192")
    if args.tokens < args.seq_len:
        parser.error("--tokens must be at least one row")

    out, work = Path(args.out), Path(args.out) / "work"
    source = Source(args.source, out)
    arguments = {"source": args.source, "tokens": args.tokens, "vocab_size": args.vocab_size,
                 "seq_len": args.seq_len,
                 "files": [[str(f), f.stat().st_size] for f in source.files]}
    start_over = f"delete {out / 'meta.json'} and {work} to start over"
    for earlier in (out / "meta.json", work / "arguments.json"):
        if earlier.exists():
            try:
                found = json.loads(earlier.read_text())
                found = found.get("arguments", found)
            except (ValueError, AttributeError):
                raise SystemExit(f"{earlier} is damaged: {start_over}") from None
            differs = [key for key in arguments if found.get(key) != arguments[key]]
            if differs:
                raise SystemExit(f"{out} holds data made with other {', '.join(differs)}: give "
                                 f"another --out, or {start_over}")
    if (out / "meta.json").exists():
        if (work / "arguments.json").exists():  # a run was killed just before it did this
            shutil.rmtree(work, ignore_errors=True)
        print(f"{out} is complete already (after a change to prepare.py give another --out)")
        return
    if args.source == "fineweb-edu":
        print("note: fineweb-edu was filtered by a classifier trained on a language model's "
              "judgements, which is outside the rules of cramming")

    if work.exists() and any(work.iterdir()) and not any(work.glob("arguments.*")):
        raise SystemExit(f"{work} is not of prepare.py, which would delete it: give another --out")
    work.mkdir(parents=True, exist_ok=True)
    check_space(out, source, args.tokens)
    tokenizer_path = work / "tokenizer.json"
    if not tokenizer_path.exists():
        tokenizer = train_tokenizer(source.sample(TOKENIZER_CHARS), args.vocab_size)
        write_whole(work / "arguments.json", arguments)
        write_whole(tokenizer_path, tokenizer.to_str().encode())
    tokenizer_json = tokenizer_path.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    vocab_size = tokenizer.get_vocab_size()

    try:
        progress = pack(source, tokenizer_json, work, args.seq_len, args.tokens)
        counts = progress["counts"]
        if counts["train_tokens"] < args.tokens:
            print(f"the source ended after {counts['train_tokens']:,} training tokens")
        if counts["train_tokens"] < args.seq_len:
            raise TooLittleText(
                f"too little text: {counts['train_tokens'] + counts['val_tokens']:,} tokens are "
                f"left of {counts['documents_read']:,} documents, not enough for a row of "
                f"{args.seq_len} to train on and another to validate on")
    except TooLittleText as error:
        shutil.rmtree(work)
        if not any(out.iterdir()):
            out.rmdir()
        raise SystemExit(f"--source {args.source}: {error}") from None

    n_rows, sha256, entropy = order_rows(work / "train.tokens", out / "train.bin", args.seq_len,
                                         tokenizer.token_to_id("."), vocab_size)
    val = np.fromfile(work / "val.tokens", np.uint16)
    val_rows = min(len(val) // args.seq_len, VAL_MAX_ROWS)
    write_whole(out / "val.bin", val[: val_rows * args.seq_len].tobytes())
    write_whole(out / "tokenizer.json", tokenizer_json.encode())

    meta = {
        "source": args.source,
        "seq_len": args.seq_len,
        "vocab_size": vocab_size,
        "train_rows": n_rows,
        "val_rows": val_rows,
        **counts,
        "train_tokens": n_rows * args.seq_len,
        "val_tokens": val_rows * args.seq_len,
        "characters_per_token": counts["characters_written"]
        / (counts["train_tokens"] + counts["val_tokens"]),
        "unigram_entropy": entropy,
        "max_density": MAX_DENSITY,
        "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
        "train_sha256": sha256,
        "first_invalid": progress["first_invalid"],
        "arguments": arguments,
    }
    write_whole(out / "meta.json", meta)
    shutil.rmtree(work)
    report(meta)


if __name__ == "__main__":
    try:
        main()
    except (OSError, BrokenExecutor) as error:  # the latter: a worker ran out of memory
        raise SystemExit(f"prepare.py stopped: {error}. That mended, the same command goes on.")
    except KeyboardInterrupt:
        sys.exit("\nstopped; start the same command again to go on")
