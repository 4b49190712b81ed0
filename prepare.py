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
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

# ------------------------------------------------------------------------------- 1. Decisions

VERSION = 3  # raise it with every change that makes the same text give other bytes
SPECIAL_TOKENS = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]  # ids 0..4; cram.py relies on them
SEP = SPECIAL_TOKENS.index("<sep>")

HUB = {  # repository, configuration; all are plain parquet or json, no loading scripts
    "c4": ("allenai/c4", "en"),
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "default"),
}

MAX_DENSITY = 0.30  # paper's t: keep a document iff tokens < t * characters; noise compresses badly
TOKENIZER_CHARS = 200_000_000  # the tokenizer is trained on at most this much text
DUPLICATE_SLOTS = 2**25  # of 8 bytes: 268 MB, see `Packer`
VAL_EVERY = 100  # one document in 100 is held out for validation ...
VAL_MAX_ROWS = 16_384  # ... of which val.bin gets this many rows (2 M tokens at length 128)

# With DUPLICATE_SLOTS, these two bound the memory
PIECE = 100_000  # characters tokenized at once; .txt files are cut into documents of this size
BLOCK_TOKENS = 25_600_000  # read or shuffled at once (51 MB; counting them takes 200 MB more)

UNFINISHED = "unfinished"  # the folder inside --out that holds what a run needs to resume
SAVE_SECONDS = 5  # a killed run loses about this much work
OUTAGE_SECONDS = 1800  # the run stops when the hub has not answered for this long
RETRY_SECONDS = 30  # between attempts; in each the hub's client tries for 20 s to 10 minutes
RESUME = "Start the same command again to resume."
REASONS_SHOWN = 20  # skipped documents that are named; the others are only counted


# ------------------------------------------------------------------------------- 2. Tokenizer

# Text becomes lower-case ASCII without accents, with single spaces (paper section 4.4). The paper
# drops every character outside ASCII. We deviate: these tables (Oniguruma patterns) spell what
# they can as GLUE does, and make the rest (other scripts, emoji, controls) a space. None may glue
# words together or change a number.

BEFORE_DECOMPOSING = [  # NFKD would lose or change these
    # Quotes, primes, accents and letters used as apostrophes; \x91 to \x97 are Windows-1252 read
    # as Latin-1
    ("[‘’‚‛‹›′´ʹ-ʿ\x91\x92]", "'"),
    ("[“”„‟«»″\x93\x94]", '"'),
    ("[™℠]", " "),
    ("º", "°"),  # commonly typed for degrees
    ("≠", "!="),
    # These three match the empty string, so they insert. Each looks back at a character, as the
    # library panics on an empty match at the start of a text
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
    ("``|''", '"'),
    (r"[^\x21-\x7e]{2,}|[^\x20-\x7e]", " "),  # leaves single spaces alone: twice as fast
]
NORMALIZER = normalizers.Sequence([
    *(normalizers.Replace(Regex(pattern), by) for pattern, by in BEFORE_DECOMPOSING),
    normalizers.NFKD(), normalizers.Lowercase(),
    *(normalizers.Replace(Regex(pattern), by) for pattern, by in AFTER_DECOMPOSING),
    normalizers.Strip()])


def normalize(text):
    if text.isascii():  # the same result, ten times as fast
        return re.sub(r"[^\x21-\x7e]+", " ", re.sub("``|''", '"', text.lower())).strip()
    # Broken JSON escapes give halves of surrogate pairs, which the library refuses
    return NORMALIZER.normalize_str(text.encode("utf-8", "ignore").decode())


def train_tokenizer(texts, vocab_size):
    """WordPiece from an iterator of strings; the same text gives the same file everywhere.

    The library numbers its alphabet in hash order, which differs between processes, and breaks ties
    between merges by that number. Only special tokens keep their order, so the trainer gets the
    alphabet (all that NORMALIZER leaves) as special tokens. The returned tokenizer has only
    SPECIAL_TOKENS as special: ids 0..4. Its other entries are sorted.
    """
    characters = [c for c in map(chr, range(0x21, 0x7F)) if not c.isupper()]
    alphabet = characters + ["##" + c for c in characters]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + alphabet, show_progress=False)
    words = pre_tokenizers.Whitespace()  # splits at \w+|[^\w\s]+
    learned = Tokenizer(models.WordPiece(unk_token="<unk>"))
    learned.pre_tokenizer = words
    learned.train_from_iterator(map(normalize, texts), trainer)

    entries = sorted(set(learned.get_vocab()) - set(SPECIAL_TOKENS))
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + entries)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = words
    tokenizer.normalizer = NORMALIZER
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


# ------------------------------------------------------------------------------- 3. Sources
# A reader yields (text, None) for each document and (None, reason) for what it cannot read.
# A file always gives the same documents in the same order, so that a run can resume by number.


def text_of(row, where):
    text = row.get("text") if isinstance(row, dict) else None
    if isinstance(text, str):
        return text, None
    return None, f'{where}: no text in a column "text", but {row!a:.120}'


def read_json(stream, path):
    """One row per line, or one list of rows, which is held in memory."""
    is_list = stream.read(1000).decode("utf-8-sig", "ignore").lstrip().startswith("[")
    stream.seek(0)
    for number, row in enumerate(json.load(stream) if is_list else stream, 1):
        where = f"{path} row {number}"
        try:
            if is_list:
                yield text_of(row, where)
            elif not row.isspace():
                yield text_of(json.loads(row), where)
        except (ValueError, RecursionError) as error:  # the latter: nested too deeply
            yield None, f"{where}: not UTF-8 JSON ({error})"


def read_txt(stream, path):
    """Documents of about PIECE characters, cut at line ends (or inside a longer line)."""
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="replace")
    replaced = 0
    while piece := text.read(PIECE):
        piece += text.readline(PIECE)
        replaced += piece.count("\ufffd")  # becomes a space in `normalize`
        yield piece, None
    if replaced:
        yield None, f"{path}: {replaced:,} bytes that are not UTF-8 (or U+FFFD) became spaces"


def read_parquet(_, path):
    import datasets  # only here and for the hub: it takes seconds

    # One file at a time: other columns may differ from file to file, and are not read
    rows = datasets.load_dataset("parquet", data_files=glob.escape(path), columns=["text"],
                                 split="train", streaming=True)
    for number, row in enumerate(rows, 1):
        yield text_of(row, f"{path} row {number}")


READERS = {".txt": read_txt, ".jsonl": read_json, ".json": read_json, ".parquet": read_parquet}
UNPACK = {".gz": gzip.open, ".xz": lzma.open}


def kind(path):
    """The ending, in lower case and before .gz or .xz: ".jsonl" for a.JSONL.gz."""
    return os.path.splitext(re.sub(r"\.(gz|xz)$", "", path.lower()))[1]


def read_file(path):
    """Documents of one file, local or hf://. A damaged local file gives those before the damage."""
    open_file = open
    if path.startswith("hf://"):
        from datasets.utils.file_utils import xopen as open_file
    unpack = UNPACK.get(os.path.splitext(path.lower())[1])
    try:
        with open_file(path, "rb") as raw:
            yield from READERS[kind(path)](unpack(raw) if unpack else raw, path)
    except Exception as error:  # each library has its own types for damage; none sets errno
        if (path.startswith("hf://") or getattr(error, "errno", None)
                or isinstance(error, (ImportError, MemoryError))):
            raise  # a fault of the network, the disk or the machine
        yield None, f"{path}: nothing can be read from here on ({error!r:.120})"


def read_python_docs(_):
    """The documentation inside every CPython: the language reference and all docstrings."""
    from pydoc_data.topics import topics

    yield from ((text, None) for _, text in sorted(topics.items()))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):  # the parser's own test cases
            continue
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        yield "\n".join(filter(None, docs)), None


def local_files(pattern, out):
    """Files to read in a path, folder or glob, sorted. Links to folders are not followed."""
    path = Path(pattern)
    if path.is_dir():
        found = path.rglob("*")
    else:
        found = [path] if path.is_file() else map(Path, glob.glob(pattern, recursive=True))
    # --out may be inside
    ours = {out / name for name in ("meta.json", "tokenizer.json", UNFINISHED)}
    found = [f for f in sorted(found)
             if f.is_file() and not ours & {f.resolve(), *f.resolve().parents}]
    files = [str(f) for f in found if kind(str(f)) in READERS]
    if not files:
        raise SystemExit(f"--source {pattern}: nothing to read there; --help says what can be read")
    print(f"files to read: {len(files):,}; of other kinds, left out: {len(found) - len(files):,}")
    return files


def hub_files(name):
    """The files of a repository on the hub: hf://datasets/NAME@REVISION/PATH."""
    import datasets

    try:
        return list(datasets.load_dataset_builder(*HUB[name]).config.data_files["train"])
    except Exception as error:  # its type depends on the HTTP library
        raise SystemExit(f"cannot open {HUB[name][0]} on the hub ({error!r:.120}). Without a "
                         "network, use --source python-docs or text files of your own.") from None


def documents(files, file=0, row=0):
    """Yields (text, reason, cursor), from `file` and `row` on. The first two are a reader's pair;
    documents(files, *cursor) would go on after it. If the hub does not answer, tries again for
    OUTAGE_SECONDS."""
    answered_at = time.monotonic()
    while file < len(files):
        path = files[file]
        read = read_python_docs if path == "python-docs" else read_file
        try:
            for text, reason in itertools.islice(read(path), row, None):
                row += 1
                answered_at = time.monotonic()
                yield text, reason, (file, row)
            file, row = file + 1, 0
        except Exception as error:
            if not path.startswith("hf://"):
                raise
            if time.monotonic() - answered_at > OUTAGE_SECONDS:
                raise SystemExit(f"no answer from the hub for {OUTAGE_SECONDS // 60} minutes "
                                 f"({error!r:.120}). {RESUME}") from None
            tqdm.write(f"the hub does not answer ({error!r:.120}); trying again")
            time.sleep(RETRY_SECONDS)


def progress_bar(*args, **kwargs):
    """tqdm, but once a minute if it goes to a log file, which would keep every update."""
    return tqdm(*args, **kwargs, unit_scale=True, mininterval=0.1 if sys.stderr.isatty() else 60)


def pieces(text):
    """Split a text into lines, because `normalize` is faster on ASCII and most lines are. Split
    lines longer than PIECE at a space, because tokenizing takes over 20 bytes per character."""
    start = 0
    while start < len(text):
        limit = start + PIECE
        end = text.find("\n", start + 1, limit)
        if end < 0 and limit < len(text):
            end = text.rfind(" ", start + 1, limit)
        if end < 0:
            end = limit
        yield text[start:end]
        start = end


def tokenizer_texts(files):
    """About TOKENIZER_CHARS characters, in lines: the beginning of the source, or of each local
    file by its size. A file that falls short leaves its share to the next."""
    parts, used = [(files, TOKENIZER_CHARS)], 0
    if os.path.exists(files[0]):
        ends = [*itertools.accumulate(map(os.path.getsize, files))]
        parts = [([f], TOKENIZER_CHARS * end / max(1, ends[-1])) for f, end in zip(files, ends)]
    for part, end in parts:
        for text, *_ in documents(part):
            if used >= end:
                break
            if text:
                yield from pieces(text)
                used += len(text)


# ------------------------------------------------------------------------------- 4. Workers
# One process per core normalises, tokenizes and hashes; the parent reads, decides and writes.


def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker(tokenizer_json):
    """Runs once in each process."""
    global tokenizer  # of this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True  # a literal "<mask>" in the text is text
    tokenizer.normalizer = normalizers.Sequence([])  # `normalize` is faster
    threading.Thread(target=exit_with_parent, daemon=True).start()  # also if the parent is killed


def tokenize(texts):
    """For each text: ids and SEP as uint16, characters of the normalised text, its 64-bit hash."""
    results = []
    for text in texts:
        ids, normal = [], [*filter(None, map(normalize, pieces(text)))]
        for piece in normal:  # one at a time, to bound memory; encode() takes 1.7 times as long
            [encoding] = tokenizer.encode_batch_fast([piece], add_special_tokens=False)
            ids.append(np.array(encoding.ids, np.uint16))  # as ints in a list, 20 times the memory
        ids.append(np.array([SEP], np.uint16))
        normal = " ".join(normal)
        # The space is an earlier version's; without it other documents would be held out
        digest = hashlib.blake2b(f"{normal} ".encode(), digest_size=8).digest()
        results.append((np.concatenate(ids), len(normal), int.from_bytes(digest, "little")))
    return results


def chunks(files, start):
    """Yields (texts, reasons, cursor): documents for one call of `tokenize`, and the place after
    them. One that cannot be read has the text "" and a reason, the others None."""
    texts, reasons, size, cursor = [], [], 0, start
    for text, reason, cursor in documents(files, *start):
        texts.append(text or "")
        reasons.append(reason)
        size += len(texts[-1])
        if size >= 500_000 or len(texts) >= 2_000:
            yield texts, reasons, cursor
            texts, reasons, size = [], [], 0
    yield texts, reasons, cursor


def tokenize_chunks(files, start, tokenizer_json):
    """Yields (future of `tokenize`, reasons, cursor) per chunk, in order, a few chunks ahead.
    pool.map would read ahead without end."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    context = multiprocessing.get_context("spawn")  # fork and the tokenizer's threads do not mix
    with ProcessPoolExecutor(cores, context, start_worker, (tokenizer_json,)) as pool:
        waiting = deque()
        for texts, reasons, cursor in chunks(files, start):
            waiting.append((pool.submit(tokenize, texts), reasons, cursor))
            if len(waiting) > 2 * cores:
                yield waiting.popleft()
        yield from waiting


# ------------------------------------------------------------------------------- 5. Filter and pack


def write_atomic(path, content):
    """Write bytes, or an object as JSON, atomically: temporary file, fsync, rename."""
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        f.write(content if isinstance(content, bytes) else json.dumps(content, indent=1).encode())
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def open_at(path, size):
    """Open a file to append to, truncated to its size at the last save."""
    f = open(path, "ab")
    if f.tell() < size:
        raise SystemExit(f"{path} is damaged: delete {path.parent} to start over")
    f.truncate(size)
    return f


class Packer:
    """Appends documents to train.tokens and val.tokens in `work`. A resumed run cuts off what was
    written after the last save()."""

    def __init__(self, work, seq_len):
        self.path, self.seq_len, self.saved_at = work / "progress.json", seq_len, time.monotonic()
        self.cursor, self.counts = (0, 0), dict.fromkeys((
            "documents_read", "documents_kept", "empty", "invalid", "dropped_density",
            "dropped_duplicate", "train_tokens", "val_tokens", "characters_written"), 0)
        if self.path.exists():
            progress = json.loads(self.path.read_text())
            self.cursor, self.counts = progress["cursor"], progress["counts"]
            print(f"resuming after {self.counts['documents_read']:,} documents; the file of the "
                  "last one is read again up to there")
        self.train = open_at(work / "train.tokens", 2 * self.counts["train_tokens"])
        self.val = open_at(work / "val.tokens", 2 * self.counts["val_tokens"])
        self.hashes = open_at(work / "document.hashes", 8 * self.counts["documents_kept"])
        # A set would grow with the corpus. A hash overwrites what is in its slot, so a copy is
        # missed if another hash took the slot in between: 3 % of copies a million documents apart
        self.slots = np.zeros(DUPLICATE_SLOTS, np.uint64)
        hashes = np.fromfile(self.hashes.name, np.uint64)
        self.slots[hashes % np.uint64(DUPLICATE_SLOTS)] = hashes  # the last one in a slot stays

    def save(self):
        for f in (self.train, self.val, self.hashes):
            f.flush()
            os.fsync(f.fileno())
        write_atomic(self.path, {"cursor": self.cursor, "counts": self.counts})
        self.saved_at = time.monotonic()

    def add_document(self, ids, characters, digest):
        """Write a document unless it is filtered out. Returns the key of its count."""
        counts, slot = self.counts, digest % DUPLICATE_SLOTS
        if not characters:
            return "empty"
        if len(ids) - 1 >= MAX_DENSITY * characters:  # without its SEP
            return "dropped_density"
        if self.slots[slot] == digest:
            return "dropped_duplicate"
        self.slots[slot] = digest
        self.hashes.write(digest.to_bytes(8, "little"))

        if counts["val_tokens"] < self.seq_len:  # val.bin gets a row first, however small the text
            n_val = self.seq_len - counts["val_tokens"]
        else:  # by hash, so that undetected copies go to the same side
            n_val = 0 if digest % VAL_EVERY else len(ids)
        self.val.write(ids[:n_val].tobytes())
        self.train.write(ids[n_val:].tobytes())
        counts["val_tokens"] += len(ids[:n_val])
        counts["train_tokens"] += len(ids[n_val:])
        counts["characters_written"] += characters + 1
        return "documents_kept"


def pack(files, tokenizer_json, work, seq_len, target):
    """Read, tokenize and pack documents until there are `target` training tokens.

    Interruptions do not change the bytes: chunks are always the same, and only between them is
    progress saved and the target checked. Returns the counts.
    """
    packer = Packer(work, seq_len)
    counts, tokenized = packer.counts, tokenize_chunks(files, packer.cursor, tokenizer_json)
    total = target if files[0].startswith("hf://") else None  # your own text may end before it
    with progress_bar(None, "tokens", total, unit="tok", initial=counts["train_tokens"]) as bar:
        # A run that was stopped after it had reached the target reads no chunk
        while counts["train_tokens"] < target and (chunk := next(tokenized, None)):
            future, reasons, packer.cursor = chunk
            for reason, document in zip(reasons, future.result()):
                key = "invalid" if reason else packer.add_document(*document)
                counts[key] += 1
                if reason and counts[key] <= REASONS_SHOWN:
                    tqdm.write(f"note: {reason}")
            counts["documents_read"] += len(reasons)
            bar.update(counts["train_tokens"] - bar.n)
            if time.monotonic() - packer.saved_at > SAVE_SECONDS:
                packer.save()
    packer.save()
    return counts


# ------------------------------------------------------------------------------- 6. Order


def order_rows(work, out_path, seq_len, tokenizer):
    """Sort rows by their number of ".", most first: short sentences first (paper v2).

    Rows with the same number are shuffled: training must not see one source file after another.
    They are first collected in a file. If that may not fit in memory, it is shuffled in n blocks,
    block i being every n-th row from row i on.

    Returns (sha256 of the ordered file, unigram entropy in nats).
    """
    dot, vocab_size = tokenizer.token_to_id("."), tokenizer.get_vocab_size()
    per_token = np.zeros(vocab_size, np.int64)
    folder = work / "rows"
    shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left some
    folder.mkdir()
    with open(work / "train.tokens", "rb") as tokens:
        while len(rows := np.fromfile(tokens, (np.uint16, seq_len), BLOCK_TOKENS // seq_len)):
            per_token += np.bincount(rows.ravel(), minlength=vocab_size)
            dots = (rows == dot).sum(1)
            for number in np.unique(dots):
                with open(folder / str(number), "ab") as f:
                    f.write(rows[dots == number].tobytes())

    part, digest, seeds = out_path.with_suffix(".part"), hashlib.sha256(), itertools.count()
    with open(part, "wb") as f:
        for path in sorted(folder.iterdir(), key=lambda path: int(path.name), reverse=True):
            rows = np.memmap(path, np.uint16, "r").reshape(-1, seq_len)
            n = -(-rows.size // BLOCK_TOKENS)  # rounded up
            for i in range(n):
                shuffled = np.random.default_rng(next(seeds)).permutation(np.array(rows[i::n]))
                f.write(shuffled)
                digest.update(shuffled)
            del rows  # Windows deletes no file that is mapped
            path.unlink()
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, out_path)

    p = per_token[per_token > 0] / per_token.sum()
    return digest.hexdigest(), float(-(p * np.log(p)).sum())


# ------------------------------------------------------------------------------- 7. All together


def lock_folder(work):
    """Stop if another prepare.py is writing here. A lock ends with its process, even if killed."""
    f = open(work / "lock", "w")
    try:
        import fcntl
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise SystemExit(f"another prepare.py is writing to {work.parent}: wait for it, or give "
                         "another --out") from None
    except (ImportError, OSError) as error:  # Windows, or a file system without locks
        print(f"cannot lock {work.parent} ({error}): do not start a second prepare.py on it")
    return f


def token_count(text):
    """A number, also as 500k, 200M or 1.5G."""
    return float(text.upper().replace("K", "e3").replace("M", "e6").replace("G", "e9"))


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--source", default="c4", help="c4, wikipedia or fineweb-edu from the hub, python-docs (no "
        f"network), or a path, folder or glob of {', '.join(READERS)} files, all but .parquet also "
        '.gz or .xz, with a column "text"' + default)
    add("--tokens", type=token_count, default="8.9G", help="stop after about this many training "
        "tokens, such as 200M or 1.5G (default: %(default)s, 24 h at the 103 k tokens/s of the "
        "paper's A6000; 18 GB on disk, 39 GB while it is made)")
    add("--out", default="data", help="folder to write" + default)
    add("--vocab-size", type=int, default=32_768, help="WordPiece entries" + default)
    add("--seq-len", type=int, default=128, help="tokens in a row" + default)
    args = parser.parse_args()
    if not 256 <= args.vocab_size <= 65_536:
        parser.error("--vocab-size must be from 256 to 65536: ids are stored as uint16")
    if not 8 <= args.seq_len <= 8192 or not args.seq_len <= args.tokens < 1e14:
        parser.error("--seq-len must be from 8 to 8192, --tokens at least one row, and finite")
    args.tokens = int(args.tokens)
    return args


def read_earlier(out, work, arguments):
    """The record of an earlier run in this folder, or {}. Stops if its arguments differ."""
    finished = out / "meta.json"
    path = finished if finished.exists() else work / "arguments.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    earlier = record.get("arguments", {})
    if differs := [key for key in arguments if earlier.get(key) != arguments[key]]:
        raise SystemExit(f"{out} holds data made with other {', '.join(differs)}: give another "
                         f"--out, or delete {finished} and {work} to start over")
    return record


def prepare(files, args, out, work):
    """Make the files in `out`, resuming from `work`. Returns what meta.json says about them."""
    tokenizer_path = work / "tokenizer.json"
    if not tokenizer_path.exists():
        texts = progress_bar(tokenizer_texts(files), "tokenizer", unit=" lines")
        # While the library trains, Python sees no Ctrl-C, so it has to end the process directly
        usual = signal.signal(signal.SIGINT, signal.SIG_DFL)
        write_atomic(tokenizer_path, train_tokenizer(texts, args.vocab_size).to_str().encode())
        signal.signal(signal.SIGINT, usual)
    tokenizer_json = tokenizer_path.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(tokenizer_json)

    counts = pack(files, tokenizer_json, work, args.seq_len, args.tokens)
    print(", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items()))
    if counts["dropped_density"] > 0.1 * counts["documents_read"]:
        print("With a small --vocab-size even ordinary text is too dense: try a larger one")
    if counts["train_tokens"] < args.seq_len:
        shutil.rmtree(work, ignore_errors=True)  # so that another --source may be given
        raise SystemExit(f"--source {args.source}: too little text. Training and validation need a "
                         f"row of {args.seq_len} tokens each")
    if counts["train_tokens"] < args.tokens:
        print(f"the source ended after {counts['train_tokens']:,} training tokens")

    n_rows = counts["train_tokens"] // args.seq_len
    print(f"ordering {n_rows:,} rows")
    sha256, entropy = order_rows(work, out / "train.bin", args.seq_len, tokenizer)
    val = np.memmap(work / "val.tokens", np.uint16, "r",
                    shape=(counts["val_tokens"] // args.seq_len, args.seq_len))
    # A sample of all files, in random order, as cram.py takes the first 4,096
    val = val[np.random.default_rng(0).permutation(len(val))[:VAL_MAX_ROWS]]
    write_atomic(out / "val.bin", val.tobytes())
    write_atomic(out / "tokenizer.json", tokenizer_json.encode())
    return {
        "seq_len": args.seq_len, "vocab_size": tokenizer.get_vocab_size(), "train_rows": n_rows,
        "val_rows": len(val), **counts,
        "train_tokens": n_rows * args.seq_len, "val_tokens": val.size,  # of whole rows
        "characters_per_token":
            counts["characters_written"] / (counts["train_tokens"] + counts["val_tokens"]),
        "unigram_entropy": entropy, "max_density": MAX_DENSITY,
        "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
        "train_sha256": sha256,
    }


def main():
    args = parse_arguments()
    if hasattr(sys.stdout, "reconfigure"):  # an ASCII terminal shows é as \xe9
        sys.stdout.reconfigure(errors="backslashreplace")
    out, work = Path(args.out), Path(args.out) / UNFINISHED
    files, sizes = [args.source], []
    if args.source not in (*HUB, "python-docs"):
        files = local_files(args.source, out.resolve())
        sizes = [[f, os.path.getsize(f)] for f in files]
    arguments = {"version": VERSION, "source": args.source, "tokens": args.tokens,
                 "vocab_size": args.vocab_size, "seq_len": args.seq_len, "files": sizes}
    earlier = read_earlier(out, work, arguments)
    if (out / "meta.json").exists():
        shutil.rmtree(work, ignore_errors=True)  # left by a run that was killed at its very end
        print(f"{out} is complete already")
        return

    record = {"source": args.source, "arguments": arguments}
    if args.source in HUB:  # a resumed run keeps to its revision: the hub's may have changed
        record["hub_files"] = files = earlier.get("hub_files") or hub_files(args.source)
        record["revision"] = re.search("@([0-9a-f]+)/", files[0])[1]
    work.mkdir(parents=True, exist_ok=True)
    with lock_folder(work):
        write_atomic(work / "arguments.json", record)
        meta = {**prepare(files, args, out, work), **record}
        write_atomic(out / "meta.json", meta)
    shutil.rmtree(work)
    print(f"{out}: {meta['train_tokens']:,} tokens in {meta['train_rows']:,} rows to train on, "
          f"{meta['val_rows']:,} rows to validate on\n{meta['characters_per_token']:.2f} "
          f"characters per token, unigram entropy {meta['unigram_entropy']:.3f} nats")


if __name__ == "__main__":
    try:
        main()
    except (OSError, BrokenExecutor) as error:  # the latter: a worker ran out of memory
        sys.exit(f"prepare.py stopped: {error}. {RESUME}")
    except KeyboardInterrupt:
        print(f"\nstopped. {RESUME}", flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # end by it, so that a shell's loop ends, too
        signal.raise_signal(signal.SIGINT)
