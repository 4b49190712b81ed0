"""Turn raw text into rows of token ids that cram.py trains on.

    python prepare.py                                          # C4 from the hub, 8.9 G tokens
    python prepare.py --source "texts/*.jsonl.xz" --out data   # your own text
    python prepare.py --source python-docs --vocab-size 4096   # no network, half a minute

What happens to the text, in the order of this file: documents are read one at a time, normalised to
lower-case ASCII, used to train a WordPiece tokenizer, tokenized in parallel, filtered, deduplicated,
packed without padding into rows of 128, and sorted so that short sentences come first. It streams:
memory does not grow with the corpus, and a run that was stopped goes on when started again.

Writes train.bin and val.bin (uint16 rows), tokenizer.json and meta.json into --out. The recipe is
that of "Cramming" (Geiping & Goldstein, arXiv 2212.14034), sections 4.4 and 5 and its released code.
"""

import argparse
import ast
import glob
import gzip
import hashlib
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

# ------------------------------------------------------------------------------- 1. Decisions

SPECIAL_TOKENS = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]  # ids 0..4; cram.py relies on it
SEP = SPECIAL_TOKENS.index("<sep>")

HUB = {  # repository, configuration; all are plain parquet or json, no loading scripts
    "c4": ("allenai/c4", "en"),
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "default"),
}

TOKENS_A6000_DAY = 8_900_000_000  # 24 h at the 103 k tokens/s of the paper's A6000
MAX_DENSITY = 0.30  # paper: keep a document iff tokens < t * characters; noise compresses badly
TOKENIZER_CHARS = 200_000_000  # the tokenizer sees at most this much text (its memory is bounded)
LONG_PARAGRAPH = 200  # characters: a shorter line may repeat ("Chapter 1"), a longer one is a copy
SEEN_SLOTS = 2**25  # 8-byte slots of the duplicate table: 268 MB, see `Seen`
VAL_SHARE = 100  # one document in so many is held out for validation ...
VAL_MAX_ROWS = 16_384  # ... up to this many rows (2 M tokens at length 128)

MAX_DOCUMENT = 50_000_000  # bytes on one line; what is longer is no document, and is skipped
MAX_LIST = 100_000_000  # bytes of a .json file that is one list, parsed at once
PIECE = 100_000  # characters handed to the tokenizer at once; also the pieces of a .txt file
PILE_ROWS = 200_000  # rows shuffled at once in memory when ordering (51 MB at length 128)
READ_ROWS = 65_536  # rows read at once when ordering (17 MB at length 128)
SAVE_SECONDS = 5  # between the places from which a killed run goes on
NETWORK_RETRIES = 8  # in a row, waiting 1, 2, 4 ... seconds: about four minutes of outage


# ------------------------------------------------------------------------------- 2. Tokenizer

def build_normalizer():
    """Lower-case ASCII, single spaces (paper section 4.4).

    Our deviation: curly quotes and dashes become ASCII first. Dropping them, as every other
    non-ASCII character, would turn don’t into dont and 1990–1995 into 19901995, while GLUE has
    the ASCII forms.
    """
    n = normalizers
    return n.Sequence([
        n.Replace(Regex("[“”]|’’|``|''"), '"'),
        n.Replace(Regex("[‘’]"), "'"),
        n.Replace(Regex("[–—]"), "-"),
        n.NFD(),
        n.Lowercase(),
        n.StripAccents(),
        n.Replace(Regex(r"[^\s\x21-\x7e]+"), ""),
        n.Replace(Regex(r"\s+"), " "),
        n.Strip(),
    ])


def train_tokenizer(texts, vocab_size):
    """WordPiece over an iterator of strings; the same text gives the same file everywhere.

    The library numbers "##" letters in hash order, which differs between processes and decides
    between merges that are equally frequent. So the alphabet is given to it in a fixed order, and
    the result is renumbered: special tokens first, then sorted.
    """
    letters = [c for c in map(chr, range(0x21, 0x7F)) if not c.isupper()]
    alphabet = letters + ["##" + c for c in letters]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + alphabet, show_progress=False
    )
    learned = Tokenizer(models.WordPiece(unk_token="<unk>"))
    learned.normalizer = build_normalizer()
    learned.pre_tokenizer = pre_tokenizers.Whitespace()  # \w+|[^\w\s]+ decides what a "." token is
    learned.train_from_iterator(texts, trainer)

    words = sorted(set(learned.get_vocab()) - set(SPECIAL_TOKENS))
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + words)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", max_input_chars_per_word=100))
    tokenizer.normalizer = build_normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def pieces(text):
    """The lines of a text, the longest cut at a space: normalising takes 20 bytes a character."""
    for line in text.split("\n"):
        start = 0
        while len(line) - start > PIECE:
            end = line.rfind(" ", start + 1, start + PIECE)
            end = end if end > 0 else start + PIECE
            yield line[start:end]
            start = end
        yield line[start:]


# ------------------------------------------------------------------------------- 3. Sources
# A source yields (text, None) for each document and (None, reason) for one that cannot be read,
# always in the same order, so that a number of documents is a position to go on from.

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


def local_files(pattern):
    """The files that a path, folder or glob names, sorted; an error if there is none to read."""
    def kind(path):
        return Path(re.sub(r"\.(gz|xz)$", "", str(path))).suffix

    path = Path(pattern)
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    files = sorted(f for f in found if f.is_file())
    if path.is_dir():
        files = [f for f in files if kind(f) in SUFFIXES]
    if not files:
        raise SystemExit(f"--source {pattern}: no such file. Give {', '.join(HUB)}, python-docs, "
                         f"or a path or glob of {', '.join(SUFFIXES)} files (also .gz, .xz)")
    for f in files:
        if kind(f) not in SUFFIXES:
            raise SystemExit(f"{f}: cannot read this kind of file, only {', '.join(SUFFIXES)} "
                             "(also .gz, .xz)")
        if kind(f) == ".parquet" and f.suffix != ".parquet":
            raise SystemExit(f"{f}: parquet is compressed inside; unpack the outer {f.suffix}")
    return files


def open_bytes(path):
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb")


def byte_lines(stream):
    """Lines of a binary stream; None for one over MAX_DOCUMENT, which is never held in memory."""
    while line := stream.readline(MAX_DOCUMENT):
        if len(line) < MAX_DOCUMENT or line.endswith(b"\n"):
            yield line
        else:
            while (rest := stream.readline(2**20)) and not rest.endswith(b"\n"):
                pass
            yield None


def text_of(row, where):
    """The document in one row of a table, checked."""
    if not isinstance(row, dict) or "text" not in row:
        columns = ", ".join(map(str, list(row)[:9])) if isinstance(row, dict) else "no columns"
        return None, f'{where}: no column "text" ({columns})'
    if not isinstance(row["text"], str):
        return None, f'{where}: column "text" holds {type(row["text"]).__name__}, not a string'
    if len(row["text"]) > MAX_DOCUMENT:
        return None, f"{where}: over {MAX_DOCUMENT:,} characters"
    return row["text"], None


def parse_line(line, where):
    try:
        return text_of(json.loads(line.decode("utf-8-sig")), where)
    except UnicodeDecodeError:
        return None, f"{where}: not UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"{where}: not JSON ({error})"


def read_jsonl(stream, path):
    for number, line in enumerate(byte_lines(stream), 1):
        where = f"{path} line {number}"
        if line is None:
            yield None, f"{where}: over {MAX_DOCUMENT:,} bytes"
        elif not line.isspace():
            yield parse_line(line, where)


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
    """One document, in pieces cut at line ends so that its size is free; a piece is a document."""
    part, size = [], 0
    for line in itertools.chain(byte_lines(stream), [b""]):
        if line is None:
            yield None, f"{path}: a line over {MAX_DOCUMENT:,} bytes"
            continue
        part.append(line)
        size += len(line)
        if size >= PIECE or (line == b"" and size):
            try:
                yield b"".join(part).decode("utf-8"), None
            except UnicodeDecodeError as error:
                yield None, f"{path}: not UTF-8 ({error.reason} at byte {error.start} of a piece)"
            part, size = [], 0


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".json": read_json}


def read_file(path):
    """Documents of one local file. One that breaks off (a cut download) keeps what came before."""
    name = re.sub(r"\.(gz|xz)$", "", path.name)
    try:
        with open_bytes(path) as stream:
            yield from READERS[Path(name).suffix](stream, path)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        yield None, f"{path}: the compressed file is damaged or cut off ({error})"


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
        yield "\n".join(filter(None, docs)), None


def hub_stream(source):
    """The `datasets` stream of a hub source or of local parquet files."""
    import datasets  # only here: everything else works without it, and it takes seconds to import

    datasets.disable_progress_bars()
    if isinstance(source, list):
        return datasets.load_dataset(
            "parquet", data_files=[str(f) for f in source], split="train", streaming=True
        )
    repository, configuration = HUB[source]
    try:
        return datasets.load_dataset(repository, configuration, split="train", streaming=True)
    except Exception as error:  # the hub's client raises whatever its HTTP library does
        raise SystemExit(
            f"--source {source}: cannot open {repository} on the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}). Without a network, use "
            "--source python-docs or a path to text files of your own."
        ) from None


class Source:
    """Documents of --source, from any position on.

    `position` is JSON: how many documents were read and, for `datasets` streams, their state.
    """

    def __init__(self, name):
        self.name = name
        self.files = [] if name in HUB or name == "python-docs" else local_files(name)
        self.parquet = [f for f in self.files if f.suffix == ".parquet"]
        if self.parquet and len(self.parquet) < len(self.files):
            raise SystemExit(f"--source {name}: mixes .parquet with other files; prepare one kind")
        self.position = {"documents": 0, "stream": None}

    def fingerprint(self):
        """What must be the same for a stopped run to go on."""
        return [[str(f), f.stat().st_size] for f in self.files]

    def documents(self, position):
        """Yield (text, None) or (None, reason); `self.position` is always behind the last one."""
        self.position = dict(position)
        if self.name in HUB or self.parquet:
            documents = self.streamed()
        else:
            local = map(read_file, self.files)
            documents = python_docs() if self.name == "python-docs" else itertools.chain(*local)
            documents = itertools.islice(documents, position["documents"], None)
        for text, reason in documents:
            self.position["documents"] += 1
            yield text, reason

    def streamed(self):
        """A `datasets` stream that survives a network that comes and goes."""
        self.stream = hub_stream(self.parquet or self.name)
        state, failures = self.position["stream"], 0
        while True:
            if state:
                self.stream.load_state_dict(state)
            try:
                for row in self.stream:
                    yield text_of(row, f"{self.name} row {self.position['documents'] + 1}")
                    failures = 0
                return
            except Exception as error:  # any of four HTTP libraries; shown, and raised in the end
                failures += 1
                if self.parquet or failures > NETWORK_RETRIES:
                    raise SystemExit(
                        f"--source {self.name}: reading failed ({type(error).__name__}: {error}). "
                        "Start the same command again to go on from here."
                    ) from None
                state = self.stream.state_dict()
                tqdm.write(f"{type(error).__name__}: {error}; trying again in {2**failures} s")
                time.sleep(2**failures)

    def bookmark(self):
        """`position` including the stream's state, which is too slow to take for every document."""
        if self.name in HUB or self.parquet:
            self.position["stream"] = self.stream.state_dict()
        return dict(self.position)

    def sample(self, limit):
        """About `limit` characters for the tokenizer: a share of each local file by its size."""
        total = sum(f.stat().st_size for f in self.files) or 1
        quotas = [(read_file(f), limit * f.stat().st_size / total) for f in self.files]
        if not self.files or self.parquet:
            quotas = [(self.documents({"documents": 0, "stream": None}), limit)]
        with tqdm(desc="tokenizer", unit="char", unit_scale=True) as bar:
            for documents, quota in quotas:
                for text, _ in documents:
                    if text:
                        text = without_surrogates(text)
                        yield from pieces(text)
                        bar.update(len(text))
                        quota -= len(text)
                        if quota <= 0:
                            break


def without_surrogates(text):
    """Half of a character pair, as broken JSON escapes give it, cannot be passed to the library."""
    return text.encode("utf-8", "ignore").decode("utf-8")


# ------------------------------------------------------------------------------- 4. Workers
# One process a core normalises, tokenizes and hashes; the parent reads, decides and writes.

def start_worker(tokenizer_json):
    """Runs once in each process. The watch ends it if the parent is killed, which tells nobody."""
    global tokenizer, normalizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True  # a literal "<mask>" in the text is text
    normalizer = tokenizer.normalizer
    tokenizer.normalizer = normalizers.Sequence([])  # the text is normalised already when it comes

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def hash64(text, kind):
    """64 bits that tell texts of a kind apart. A document of one paragraph is not its own copy."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=kind).digest()
    return int.from_bytes(digest, "little")


def tokenize(texts):
    """All ids of some documents as one uint16 array, and a table of what they belong to.

    Returns (ids, [(hash of the document, [(tokens, characters, hash), ...]), ...]), with a triple
    for each paragraph, its hash 0 if it is too short to count as a copy. Paragraphs are lines; they are tokenized apart, which gives the same tokens as the joined text.
    """
    table, flat = [], []
    for text in texts:
        text = without_surrogates(text)
        parts = [p for p in map(normalizer.normalize_str, pieces(text)) if p]
        table.append((hash64(" ".join(parts), b"document"), parts))
        flat.extend(parts)
    encodings = tokenizer.encode_batch_fast(flat, add_special_tokens=False)
    lengths = iter([len(e) for e in encodings])
    table = [
        (digest, [(next(lengths), len(p),
                   hash64(p, b"paragraph") if len(p) >= LONG_PARAGRAPH else 0) for p in parts])
        for digest, parts in table
    ]
    ids = np.fromiter(itertools.chain.from_iterable(e.ids for e in encodings), np.uint16)
    return ids, table


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


def in_parallel(work, tokenizer_json):
    """Tokenize chunks on all cores, in order, with never more than a few in memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    context = multiprocessing.get_context("spawn")  # fork and the tokenizer's threads do not mix
    with ProcessPoolExecutor(cores, context, start_worker, (tokenizer_json,)) as pool:
        waiting = deque()
        try:
            for chunk in work:
                waiting.append((chunk, pool.submit(tokenize, chunk[0])))
                if len(waiting) > 2 * cores:
                    chunk, future = waiting.popleft()
                    yield chunk, *future.result()
            while waiting:
                chunk, future = waiting.popleft()
                yield chunk, *future.result()
        finally:
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------- 5. Filter and pack

class Seen:
    """Which 64-bit hashes came before, in bounded memory and exact as far as it goes.

    Each hash has one slot and overwrites what is in it. So nothing is called a duplicate that is
    none (but for one hash in 2**64), while a copy is missed if its slot was taken in between: with
    n newer entries that is 1 - exp(-n / 2**25), 3 % after a million and 63 % after 34 million.
    """

    def __init__(self, path, entries):
        table = np.zeros(SEEN_SLOTS, np.uint64)
        self.log = open(path, "r+b" if entries else "w+b")
        self.log.truncate(8 * entries)
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


COUNTS = ("documents_read", "documents_kept", "empty", "invalid", "dropped_density",
          "dropped_duplicate", "paragraphs_dropped_duplicate", "train_tokens", "val_tokens",
          "val_documents", "characters_kept")


def write_json(path, data):
    """Whole or not at all."""
    part = path.with_suffix(".part")
    with open(part, "w") as f:
        json.dump(data, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def open_at(path, size):
    """A file to append to, cut back to the size it had when the progress was written."""
    f = open(path, "r+b" if path.exists() else "w+b")
    f.truncate(size)
    f.seek(size)
    return f


def pack(source, tokenizer_json, work, arguments, seq_len, target):
    """Stream the source into work/train.tokens and work/val.tokens; returns the counts.

    Every few seconds the files are flushed and work/progress.json says how far they are good, so
    that a killed run goes on from there: what lies behind is cut off and made again.
    """
    progress_path = work / "progress.json"
    progress = {"position": {"documents": 0, "stream": None}, "counts": dict.fromkeys(COUNTS, 0),
                "seen": 0, "first_invalid": None, "arguments": arguments}
    if progress_path.exists():
        progress = json.loads(progress_path.read_text())
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
        write_json(progress_path, progress)

    def keep(digest, ids, parts):
        """Write what is new of a document; False if nothing is."""
        if seen.add(digest):
            return False
        fresh, start = [], 0
        for length, chars, paragraph in parts:
            if paragraph and seen.add(paragraph):
                counts["paragraphs_dropped_duplicate"] += 1
            else:
                fresh.append(ids[start : start + length])
                counts["characters_kept"] += chars + 1
            start += length
        if not fresh:
            return False
        fresh.append(np.array([SEP], np.uint16))
        out = np.concatenate(fresh)
        if digest % VAL_SHARE:
            train.write(out.tobytes())
            counts["train_tokens"] += len(out)
        elif counts["val_tokens"] < VAL_MAX_ROWS * seq_len:  # a full val.bin takes no more, and
            val.write(out.tobytes())  # its documents stay out of train.bin all the same
            counts["val_tokens"] += len(out)
            counts["val_documents"] += 1
        return True

    last_save = time.monotonic()
    bar = tqdm(desc="tokens", unit="tok", unit_scale=True, initial=counts["train_tokens"],
               total=None if source.files else target)
    work_list = chunks(source, progress["position"])
    if counts["train_tokens"] >= target:
        work_list = ()
    for (texts, reasons, position), ids, table in in_parallel(work_list, tokenizer_json):
        before, start = counts["train_tokens"], 0
        counts["documents_read"] += len(texts) + len(reasons)
        counts["invalid"] += len(reasons)
        if reasons and progress["first_invalid"] is None:
            progress["first_invalid"] = reasons[0]
            tqdm.write(f"skipping what cannot be read, first: {reasons[0]}")
        for digest, parts in table:
            end = start + sum(length for length, _, _ in parts)
            chars = sum(chars + 1 for _, chars, _ in parts) - 1  # with the spaces between them
            if not parts:
                counts["empty"] += 1
            elif end - start >= MAX_DENSITY * chars:
                counts["dropped_density"] += 1
            elif not keep(digest, ids[start:end], parts):
                counts["dropped_duplicate"] += 1
            else:
                counts["documents_kept"] += 1
            start = end
        progress["position"] = position
        bar.update(counts["train_tokens"] - before)
        if counts["train_tokens"] >= target:
            break
        if time.monotonic() - last_save > SAVE_SECONDS:
            save()
            last_save = time.monotonic()
    save()
    bar.close()
    for f in (train, val, seen.log):
        f.close()
    if not counts["documents_kept"]:
        why = progress["first_invalid"]
        raise TooLittleText(f"no document that can be used, of {counts['documents_read']:,} read: "
                            f"{counts['empty']:,} empty, {counts['invalid']:,} invalid, "
                            f"{counts['dropped_density']:,} too dense" + (f". {why}" if why else ""))
    return progress


class TooLittleText(Exception):
    """What the source gives is not worth keeping anything of."""


def hold_out_the_end(work, seq_len, counts):
    """A corpus so small that no row of validation came together gives its last documents to it."""
    train = np.fromfile(work / "train.tokens", np.uint16)
    ends = np.flatnonzero(train == SEP) + 1
    enough = ends[(len(train) - ends + counts["val_tokens"] >= seq_len) & (ends >= seq_len)]
    if not len(enough):
        raise TooLittleText(
            f"too little text: {len(train) + counts['val_tokens']:,} tokens are left of "
            f"{counts['documents_read']:,} documents, not enough for one row of {seq_len} to "
            "train on and another, from other documents, to validate on")
    cut = int(enough[-1])
    with open(work / "val.tokens", "ab") as f:
        f.write(train[cut:].tobytes())
    os.truncate(work / "train.tokens", 2 * cut)
    moved = len(train) - cut
    counts.update(train_tokens=cut, val_tokens=counts["val_tokens"] + moved,
                  val_documents=counts["val_documents"] + int((ends > cut).sum()))


# ------------------------------------------------------------------------------- 6. Order

def row_blocks(path, n_rows, seq_len):
    with open(path, "rb") as f:
        for start in range(0, n_rows, READ_ROWS):
            count = min(READ_ROWS, n_rows - start)
            yield np.fromfile(f, np.uint16, count * seq_len).reshape(count, seq_len)


def order_rows(tokens_path, out_path, seq_len, dot, vocab_size):
    """Rows with the most "." first (paper v2: short sentences first); ties in random order.

    Two passes, memory of one pile. The rows of each count of "." are dealt to piles that fit into
    memory, each at its place in the output file; then every pile is shuffled where it lies. Ties
    would otherwise keep the order of the source, and training see one file of it after the other.

    Returns (rows, sha256 of the file, unigram entropy in nats).
    """
    n_rows = os.path.getsize(tokens_path) // (2 * seq_len)
    per_dots, per_token = np.zeros(seq_len + 1, np.int64), np.zeros(vocab_size, np.int64)
    for rows in row_blocks(tokens_path, n_rows, seq_len):
        per_dots += np.bincount((rows == dot).sum(1), minlength=seq_len + 1)
        per_token += np.bincount(rows.ravel(), minlength=vocab_size)

    first_pile = np.zeros(seq_len + 2, np.int64)  # of each count, the largest count first
    n_piles = -(-per_dots // PILE_ROWS)
    sizes = []
    for dots in reversed(range(seq_len + 1)):
        first_pile[dots] = len(sizes)
        sizes += [(per_dots[dots] - k - 1) // n_piles[dots] + 1 for k in range(n_piles[dots])]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    part = out_path.with_suffix(".part")
    digest = hashlib.sha256()
    dealt = np.zeros(seq_len + 1, np.int64)
    with open(part, "w+b") as f, tqdm(desc="ordering", unit="row", unit_scale=True,
                                      total=2 * n_rows) as bar:
        for rows in row_blocks(tokens_path, n_rows, seq_len):
            dots = (rows == dot).sum(1)
            for d in np.unique(dots):
                mine = rows[dots == d]
                turn = dealt[d] + np.arange(len(mine))
                for k in range(n_piles[d]):
                    hand = turn % n_piles[d] == k
                    if hand.any():
                        place = starts[first_pile[d] + k] + turn[hand][0] // n_piles[d]
                        f.seek(int(place) * 2 * seq_len)
                        f.write(mine[hand].tobytes())
                dealt[d] += len(mine)
            bar.update(len(rows))
        for pile, size in enumerate(sizes):
            f.seek(int(starts[pile]) * 2 * seq_len)
            rows = np.fromfile(f, np.uint16, int(size) * seq_len).reshape(-1, seq_len)
            rows = rows[np.random.default_rng(pile).permutation(len(rows))]
            f.seek(int(starts[pile]) * 2 * seq_len)
            f.write(rows.tobytes())
            digest.update(rows.tobytes())
            bar.update(len(rows))
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, out_path)

    p = per_token[per_token > 0] / per_token.sum()
    return n_rows, digest.hexdigest(), float(-(p * np.log(p)).sum())


# ------------------------------------------------------------------------------- 7. All together

def check_space(out, source, target):
    """The packed tokens and their ordered copy must fit, 2 bytes a token each, and a little more."""
    tokens = target
    if source.files:  # about 3.5 characters a token, text compressed at most 6 times
        tokens = min(target, sum(f.stat().st_size * (1 if f.suffix in (".txt", ".jsonl", ".json")
                                                     else 6) for f in source.files) / 3)
    elif source.name == "python-docs":
        tokens = min(target, 10**7)
    need, free = 4.4 * tokens / 1e9, shutil.disk_usage(out).free / 1e9
    print(f"disk: needs up to {need:.1f} GB while ordering, half of it afterwards; {free:.1f} free")
    if need > free:
        raise SystemExit(f"{out} has {free:.1f} GB free, and {need:.1f} GB may be needed: make "
                         "room, choose another --out, or a smaller --tokens")


def report(meta):
    read = meta["documents_read"] or 1
    print(f"documents: {meta['documents_read']:,} read, {meta['documents_kept']:,} kept; dropped: "
          + ", ".join(f"{meta[key]:,} {what} ({meta[key] / read:.2%})" for key, what in (
              ("invalid", "invalid"), ("empty", "empty"), ("dropped_density", "too dense"),
              ("dropped_duplicate", "duplicate"))))
    print(f"tokens: {meta['train_tokens']:,} in {meta['train_rows']:,} rows to train on, "
          f"{meta['val_rows']:,} rows to validate on; {meta['characters_per_token']:.2f} characters "
          f"a token, unigram entropy {meta['unigram_entropy']:.3f} nats")


def main():
    parser = argparse.ArgumentParser(
        description="Tokenize and pack text for cram.py.",
        epilog='Examples: prepare.py;  prepare.py --source "texts/*.jsonl.xz" --out data/mine;  '
               "prepare.py --source python-docs --vocab-size 4096 --out data/docs",
    )
    parser.add_argument("--source", default="c4", help=(
        "c4, wikipedia, fineweb-edu (from the hub), python-docs (no network), or a path, folder or "
        "glob of .txt, .jsonl, .json, .parquet files, also .gz, .xz, text in the column "
        '"text" (default: %(default)s)'))
    parser.add_argument("--tokens", type=int, default=TOKENS_A6000_DAY, help=(
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

    source, out, work = Source(args.source), Path(args.out), Path(args.out) / "work"
    arguments = {"source": args.source, "tokens": args.tokens, "vocab_size": args.vocab_size,
                 "seq_len": args.seq_len, "files": source.fingerprint()}
    for earlier in (out / "meta.json", work / "progress.json", work / "arguments.json"):
        if earlier.exists():
            found = json.loads(earlier.read_text())
            found = found.get("arguments", found)
            differs = [key for key in arguments if found.get(key) != arguments[key]]
            if differs:
                raise SystemExit(f"{out} holds data made with other {', '.join(differs)}: give "
                                 f"another --out, or delete that folder to start over")
    if (out / "meta.json").exists():
        print(f"{out} is complete already")
        return
    if args.source == "fineweb-edu":
        print("note: fineweb-edu was filtered by a classifier trained on a language model's "
              "judgements, which is outside the rules of cramming")

    out.mkdir(parents=True, exist_ok=True)
    check_space(out, source, args.tokens)
    work.mkdir(exist_ok=True)
    write_json(work / "arguments.json", arguments)

    tokenizer_path = work / "tokenizer.json"
    if not tokenizer_path.exists():
        tokenizer = train_tokenizer(source.sample(TOKENIZER_CHARS), args.vocab_size)
        write_json(tokenizer_path, json.loads(tokenizer.to_str()))
    tokenizer_json = tokenizer_path.read_text()
    tokenizer = Tokenizer.from_str(tokenizer_json)
    vocab_size = tokenizer.get_vocab_size()

    try:
        progress = pack(source, tokenizer_json, work, arguments, args.seq_len, args.tokens)
        counts = progress["counts"]
        if counts["train_tokens"] < args.tokens:
            print(f"the source ended after {counts['train_tokens']:,} training tokens")
        if min(counts["val_tokens"], counts["train_tokens"]) < args.seq_len:
            hold_out_the_end(work, args.seq_len, counts)
    except TooLittleText as error:
        shutil.rmtree(work)
        if not any(out.iterdir()):
            out.rmdir()
        raise SystemExit(f"--source {args.source}: {error}") from None

    n_rows, sha256, entropy = order_rows(work / "train.tokens", out / "train.bin", args.seq_len,
                                         tokenizer.token_to_id("."), vocab_size)
    val = np.fromfile(work / "val.tokens", np.uint16)
    val_rows = min(len(val) // args.seq_len, VAL_MAX_ROWS)
    val[: val_rows * args.seq_len].tofile(work / "val.bin")
    os.replace(work / "val.bin", out / "val.bin")
    os.replace(tokenizer_path, out / "tokenizer.json")

    meta = {
        "source": args.source,
        "seq_len": args.seq_len,
        "vocab_size": vocab_size,
        "train_rows": n_rows,
        "val_rows": val_rows,
        **counts,
        "train_tokens": n_rows * args.seq_len,
        "val_tokens": val_rows * args.seq_len,
        "characters_per_token": counts["characters_kept"]
        / max(1, counts["train_tokens"] + counts["val_tokens"]),
        "unigram_entropy": entropy,
        "max_density": MAX_DENSITY,
        "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
        "train_sha256": sha256,
        "first_invalid": progress["first_invalid"],
        "arguments": arguments,
    }
    write_json(out / "meta.json", meta)
    shutil.rmtree(work)
    report(meta)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"prepare.py stopped: {error}. Start the same command again to go on.")
    except KeyboardInterrupt:
        sys.exit("\nstopped; start the same command again to go on")
