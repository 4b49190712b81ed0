"""What the three scripts promise, as tests. No network; all text is made here.

    pytest -q                 all, under three minutes on two cores
    pytest -q -m "not slow"   the quick ones, half a minute
    pytest -q -m cuda         those that need a card

| promise, a section each | tests (test_...) |
|---|---|
| 1 text becomes lower-case ASCII, no words glued; special tokens | normalizer*, special_tokens* |
| 2 rows lose nothing and are sorted; every document is counted | packing*, counts* |
| 3 every kind of source, an unreliable hub; damage is skipped | a_folder* to the_default* |
| 4 prepare.py: killed, stopped, two at once: the same bytes | killed*, stopped_before* |
| 5 the models and their losses are the papers' | parameters* to sampled_tokens* |
| 6 schedules, masks, order, optimizer; no result has moved | learning_rate* to the_final_loss* |
| 7 a run learns; its log, checkpoint and guesses are right | a_run_learns* to fill* |
| 8 it ends before its deadline; a slow start skips no rows | the_clock*, a_first_step* |
| 9 microbatch and processes change no result | the_microbatch* to a_process* |
| 10 a resume is exact, also after kill -9; one run a folder | interrupted* to stopped_or_killed* |
| 11 no model is lost: steps that are not finite, a full disk | a_step* to a_full_disk |
| 12 an exported model is the same in transformers | an_exported* |
| 13 fine-tuning is the paper's: metrics, examples, training | metrics* to dropout* |
| 14 GLUE: tasks, server files; a score depends on nothing else | all_of_glue* to a_task* |
| 15 bad input: one sentence that says what to do | *_is_refused* |
| 16 on a card: compilation, 16 bits, CUDA graphs | on_a_card* |
"""

import argparse
import contextlib
import copy
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models so small are faster on one thread

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import cram
import finetune_glue
import prepare

slow = pytest.mark.slow

# ------------------------------------------------------------------------------ Running the scripts

STARTED = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:  # if torchrun were killed, its processes would go on
            process.send_signal(signal.SIGTERM if TORCHRUN[1] in process.args else signal.SIGKILL)


def start(*command, **popen):
    """Start python in the folder of the scripts: start("cram.py", "--resume")."""
    STARTED.append(subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=Path(__file__).parent,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **popen}))
    return STARTED[-1]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python")


def start_two(*command):
    """Start the two processes of one run as torchrun does, which itself takes seconds to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2",
               "MASTER_PORT": str(free.getsockname()[1])}
    return [start(*command, env={**env, "RANK": rank}) for rank in "01"]


def hurried_prepare(**constants):
    """prepare.py with other constants and short pauses; the hub's client would wait for minutes."""
    return "-c", """
import json, sys, time, prepare
sleep, constants = time.sleep, json.loads(sys.argv.pop(1))
time.sleep = lambda seconds: sleep(min(seconds, 0.001))
vars(prepare).update(constants)
prepare.main()
""", json.dumps(constants)


def finish(process, code=0):
    """Wait for a process: what it printed. It must exit with this code, and without a traceback."""
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in printed, printed
    return printed


def flags_of(settings):
    return [word for name, value in settings.items()
            for word in (f"--{name}".replace("_", "-"), str(value))]


def command(module, *args, refused=None, largest_file=None, **flags):
    """Run a script's main() in this process, as to start one takes seconds: what it prints.
    With refused="words" it must stop and say them. A largest_file in bytes plays a full disk."""
    argv = [f"{module.__name__}.py", *map(str, args), *flags_of(flags)]
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    screen, errors = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True), io.StringIO()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    stops = contextlib.nullcontext() if refused is None else pytest.raises(
        (cram.CramError, OSError, SystemExit))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file or limits[0], limits[1]))
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(errors):
            with mock.patch("sys.argv", argv), stops as error:
                module.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        printed = screen.buffer.getvalue().decode()
        print(printed, errors.getvalue())  # for pytest, which shows it if the test fails
    assert refused is None or refused in f"{error.value} {errors.getvalue()}"
    return printed


# ------------------------------------------------------------------------------------ Text and rows

RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghijklmnop", k=RNG.randint(3, 8))) for _ in range(100)]


def sentences(seed, n):
    """Text of a small language with something to learn in it: its words follow each other."""
    rng, text = random.Random(seed), []
    for _ in range(n):
        start, length = rng.randrange(100), rng.randint(3, 20)
        text.append(" ".join(WORDS[(start + i) % 100] for i in range(length)) + ".")
    return " ".join(text)


TEXTS = [sentences(i, 30) for i in range(399)]
SMALL_ROWS = ("--vocab-size", 700, "--seq-len", 32)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare_rows(out, source, *args, refused=None, **constants):
    """Run prepare.py in this process, with these of its constants changed: what it prints."""
    with mock.patch.dict(vars(prepare), constants):
        return command(
            prepare, "--source", source, "--out", out, *SMALL_ROWS, *args, refused=refused)


def meta_of(out):
    return json.loads((out / "meta.json").read_text())


def rows_of(out, split="train"):
    return np.fromfile(out / f"{split}.bin", "<u2").reshape(-1, meta_of(out)["seq_len"])


def tokenizer_of(out):
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def files_of(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder: rows of 32, 700 tokens, one document in a hundred to validate on."""
    folder = tmp_path_factory.mktemp("data")
    texts = [sentences(i, 8 + i % 5) + " <mask> <sep>" * (i == 0) for i in range(400)]
    prepare_rows(folder / "rows", write_jsonl(folder / "text.jsonl", texts))
    return folder / "rows"


# ------------------------------------------------------------------------------------ Training runs

TINY = {"layers": 2, "width": 32, "heads": 4, "batch": 32, "lr": 3e-3, "device": "cpu"}
ELECTRA = {"recipe": "electra", "generator_layers": 1, "generator_width": 16}


@pytest.fixture
def train(data, tmp_path):
    """Train in this process: train(out, flag=value, ...) -> (last.pt, lines of the log). With
    stop_after=n SIGTERM comes in the n-th step. With step_s, a function, the n-th
    step takes step_s(n) seconds, and nothing else takes time."""
    def run(out="out", *args, resume=False, step_s=None, stop_after=None, **flags):
        real, steps = cram.mask_tokens, itertools.count(1)
        clock = mock.Mock(return_value=1000.0) if step_s else time.monotonic

        def begin_step(*masking):
            n = next(steps)
            if step_s:
                clock.return_value += step_s(n)
            if n == stop_after:
                signal.raise_signal(signal.SIGTERM)
            return real(*masking)

        args = [*args, "--resume"] if resume else [*args, "--data", data, *flags_of(TINY)]
        with mock.patch("cram.mask_tokens", begin_step), mock.patch("time.monotonic", clock):
            run.printed = command(cram, *args, **flags, out=tmp_path / out)
        return None if flags.get("refused") else read_run(tmp_path / out)

    run.folder = tmp_path
    return run


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """finished(recipe) -> the folder of a finished run, made once and not to be changed, where
    screen.txt is what it printed. Its path has an é, which the screen of these tests lacks."""
    folder = tmp_path_factory.mktemp("finishéd")

    @functools.cache
    def run(recipe):
        flags = {**TINY, **ELECTRA, "recipe": recipe, "lr": 1e-2, "steps": 40}
        printed = command(cram, **flags, data=data, out=folder / recipe)
        (folder / recipe / "screen.txt").write_text(printed)
        return folder / recipe

    return run


def read_run(out):
    saved = torch.load(out / "last.pt", weights_only=True)
    return saved, [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def wait_for_log(process, out, lines=1):
    """Until a run that was just started has added lines to its log and there is a last.pt."""
    log, last = out / "log.jsonl", out / "last.pt"
    before = log.read_text().count("\n") if log.exists() else 0
    while not last.exists() or log.read_text().count("\n") < before + lines:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


# Bit for bit the same, through dictionaries and lists of tensors
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
TIMES = ("elapsed_s", "seconds", "tokens_per_s", "mfu", "log_bytes")  # the log has times in it


def untimed(entry):
    return {key: value for key, value in entry.items() if key not in TIMES}


def assert_same_run(one, other):
    (a, a_log), (b, b_log) = one, other
    assert_same([a["model"], a["optimizers"]], [b["model"], b["optimizers"]])
    assert_same(untimed(a["state"]), untimed(b["state"]))
    assert_same([*map(untimed, a_log)], [*map(untimed, b_log)])
    assert a["data"] == b["data"]


# -------------------------------------------------------------------------------------- Fine-tuning


def write_glue(folder, name, train=16, validation=16):
    """A task in the columns of nyu-mll/glue whose answer can be read off its first word."""
    task, rng = finetune_glue.TASKS[name], random.Random(0)
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split in ("train", *task.validation, *task.test):
        rows = []
        for i in range(train if split == "train" else validation):
            label = i % len(task.labels) if task.labels else rng.uniform(0, 5)
            row = {c: f"{'abc'[int(label) % 3]} " * 8 + sentences(i, 1) for c in task.columns}
            row[task.columns[0]] += "\ud800"  # half a surrogate pair, as broken JSON has it
            rows.append({**row, "label": -1 if split in task.test else label, "idx": i})
        (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


ONE = ("--trials", 1, "--epochs", 1)


@pytest.fixture
def glue(finished, tmp_path):
    """Run finetune_glue.py in this process on what glue.write(task) wrote to glue.data, with a
    finished run in glue.out: glue(flags) -> its output. glue.other is another checkpoint, of an
    earlier version, which had one setting less."""
    def run(*args, refused=None):
        return command(finetune_glue, "--ckpt", run.out / "ckpt.pt", "--device", "cpu",
                       "--data", run.data, *args, refused=refused)

    run.out, run.data, run.other = tmp_path / "out", tmp_path / "glue", tmp_path / "other.pt"
    run.out.mkdir()
    shutil.copy(finished("crammed") / "ckpt.pt", run.out)
    content = torch.load(run.out / "ckpt.pt", weights_only=True)
    content["model"]["blocks.0.ffn.up.weight"] *= 2
    del content["settings"]["objective"]
    torch.save(content, run.other)
    run.write = functools.partial(write_glue, run.data)
    return run


def scores_in(folder):
    """Scores of glue.json: {(task, seed): {split: score}}; each trial once."""
    results = json.loads((folder / "glue.json").read_text())
    scores = {(result["task"], result["seed"]): result["scores"] for result in results}
    assert len(scores) == len(results)
    return scores


# ----------------------------------------------------------------- 1. Text becomes lower-case ASCII


@pytest.mark.parametrize("text, expected", [
    ("don’t say “so” or «so», don´t, Hawaiʻi, 5′10″",
     'don\'t say "so" or "so", don\'t, hawai\'i, 5\'10"'),
    ("``quoted'' and ’’so’’", '"quoted" and "so"'),
    ("1990–1995 — ever, non‑breaking, −5", "1990-1995 - ever, non-breaking, -5"),
    ("don\x92t \x93so\x94 1990\x961995", 'don\'t "so" 1990-1995'),  # Windows-1252 read as Latin-1
    ("Café ÀÉÎÕÜ naïve Ångström É\u0301 Việt", "cafe aeiou naive angstrom e viet"),
    ("Straße Łódź Æther Ærø Đorđe ısı", "strasse lodz aether aero dorde isi"),
    ("soft\u00adhyphen, zero\u200bwidth, \ufeffmark", "softhyphen, zerowidth, mark"),
    ("wait…what ﬁle １２ ㎏", "wait...what file 12 kg"),
    ("10² 10⁻⁶ m²/s xⁿ H₂O 1₂", "10^2 10^-6 m^2/s x^n h2o 1_2"),
    ("² ³m", "2 ^3m"),
    ("1½ cups, ½cup, 6①", "1 1/2 cups, 1/2 cup, 6 1"),
    ("3×4 6÷2 1⁄2 5±2 x≤5 x≠5 √2", "3x4 6/2 1/2 5+/-2 x<=5 x!=5 sqrt 2"),
    ("£5m, 5€, 5 μg, 37° 20º 5℃", "pounds 5m, 5 euro , 5 ug, 37 degrees 20 degrees 5 degrees c"),
    ("Windows™ a→b•c 3·4 smile😀and漢字go x\ufffdy", "windows a b c 3 4 smile and go x y"),
    ("a\r\nb\tc\u00a0d   e \n10\u202f000 nul\x00nul", "a b c d e 10 000 nul nul"),
    ("漢字", ""),
])
def test_normalizer(text, expected):
    assert prepare.NORMALIZER.normalize_str(text) == expected == prepare.normalize(text)


def test_normalizer_glues_nothing_and_its_short_form_agrees_on_ascii():
    normalizer = prepare.NORMALIZER
    for c in map(chr, range(0x2000)):
        result = normalizer.normalize_str(f"1{c}1")
        assert re.fullmatch(r"[ -@\[-~]+", result)
        assert result != "11" or unicodedata.category(c) in ("Mn", "Me", "Mc", "Cf", "Cn"), ord(c)
    rng = random.Random(0)
    for alphabet in ("aB1 \n\t'`\x00\x1c\x7f.\"-", "a1 ½²³⁻₂①™º≠´“…é\u0301\u00ad–μß漢😀ﬁ\u0338İ"):
        for _ in range(2000):
            text = "".join(rng.choices(alphabet, k=rng.randint(0, 12)))
            assert normalizer.normalize_str(text) == prepare.normalize(text)  # and no panic


def test_special_tokens_come_first_and_are_not_read_from_text(data):
    tokenizer, rows = tokenizer_of(data), rows_of(data)
    assert [tokenizer.id_to_token(i) for i in range(5)] == [
        "<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]
    assert not (rows == cram.MASK).any() and (rows == cram.SEP).sum() <= 400  # one a document


# ----------------------------------------------------------------------------- 2. Rows lose nothing


def reference_rows(texts, tokenizer, max_density, val_every):
    """Rows of 32 to train and to validate on, as plainly as it can be said. A document is dropped
    if it is dense in tokens. The first row, then one document in val_every, by its hash, validates.
    """
    val, train = [], []
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        digest = hashlib.blake2b(f"{normal} ".encode(), digest_size=8).digest()
        ids = tokenizer.encode(text, add_special_tokens=False).ids + [cram.SEP]
        if len(ids) - 1 >= max_density * len(normal):
            continue
        to_val = max(0, 32 - len(val))
        if not to_val and int.from_bytes(digest, "little") % val_every == 0:
            to_val = len(ids)
        val += ids[:to_val]
        train += ids[to_val:]
    return [[tuple(stream[i : i + 32]) for i in range(0, len(stream) - 31, 32)]
            for stream in (train, val)]


def test_packing_loses_nothing_and_orders_by_full_stops(tmp_path):
    """Also of a line so long that it is tokenized in pieces."""
    texts = [sentences(i, 3 + i % 40).replace(". ", ".\n" if i % 2 else ". ") for i in range(300)]
    texts[4], out = sentences(4, 2000), tmp_path / "d"
    assert len(texts[4]) > 1.2 * prepare.PIECE
    prepare_rows(out, write_jsonl(tmp_path / "t.jsonl", texts), MAX_DENSITY=0.168, VAL_EVERY=3,
                 VAL_MAX_ROWS=20, BLOCK_TOKENS=3200, DUPLICATE_SLOTS=7)  # texts share a slot
    train, val, meta = rows_of(out), rows_of(out, "val"), meta_of(out)
    expected_train, expected_val = reference_rows(texts, tokenizer_of(out), 0.168, 3)
    assert Counter(map(tuple, train.tolist())) == Counter(expected_train)
    places = [expected_val.index(tuple(row)) for row in val.tolist()]  # a sample of all
    assert len(set(places)) == 20 and max(places) > 40 and places != sorted(places)
    p = np.unique(train, return_counts=True)[1] / train.size
    assert meta["unigram_entropy"] == pytest.approx(-(p * np.log(p)).sum())

    dots = (train == tokenizer_of(out).token_to_id(".")).sum(1)
    assert (np.diff(dots.astype(int)) <= 0).all() and dots[0] > dots[-1]
    place = {row: i for i, row in enumerate(expected_train)}
    ties = [place[tuple(row)] for row in train[dots == np.bincount(dots).argmax()].tolist()]
    # Rows with the same count are mixed, not in the order of the source, also across blocks
    assert 0.3 < (np.diff(ties) > 0).mean() < 0.7
    assert abs(np.corrcoef(ties, range(len(ties)))[0, 1]) < 0.2


def test_counts_of_what_is_dropped(tmp_path):
    rng = random.Random(0)
    noise = ["".join(rng.choices("!#$%&*+,-./:;<=>?@^_~0123456789", k=300)) for _ in range(7)]
    texts = [*TEXTS[:50], *noise, "", " \n ", "漢字", TEXTS[3], TEXTS[3].upper()]
    lines = [{"text": text} for text in texts]
    lines += [{"text": None}, {"text": 5}, {"no": "text"}, [1], {"text": "x\ud800y"}]
    source = tmp_path / os.fsdecode(b"caf\xe9.jsonl")  # a name that is not UTF-8
    source.write_bytes("\n".join([*map(json.dumps, lines), "{not json", ""]).encode()
                       + b'{"text": "\xff"}\n')
    printed = prepare_rows(tmp_path / "d", source)
    assert "caf\\udce9.jsonl row 63: no text in a column \"text\", but {'text': None}" in printed
    counts = meta_of(tmp_path / "d")
    assert counts["documents_read"] == len(lines) + 2
    assert (counts["invalid"], counts["empty"], counts["dropped_duplicate"]) == (6, 3, 2)
    assert counts["dropped_density"] in (7, 8)  # the noise, and perhaps the short "xy"
    assert counts["documents_kept"] + counts["dropped_density"] + 6 + 3 + 2 == len(lines) + 2


# -------------------------------------------------------------------------- 3. Every kind of source


def test_a_folder_is_read_also_if_it_is_the_output(tmp_path):
    """Beside other files and a linked folder; the tokenizer sees a share of every file. The long
    .txt file is read in pieces."""
    out, texts = tmp_path / "data", [sentences(i, 8) for i in range(99)]
    (out / "texts").mkdir(parents=True)
    for name in ("texts/c.csv", "tokenizer.json", "d.txt.zst"):
        (out / name).write_text("text")
    (out / "b.txt").write_text("\n".join(texts))
    write_jsonl(out / "texts/A.JSONL", [text[::-1] for text in texts])  # so of other words
    (out / "linked").symlink_to(tmp_path, target_is_directory=True)
    printed = prepare_rows(out, out, TOKENIZER_CHARS=8000, PIECE=2000, MAX_DENSITY=1)
    assert "to read: 2; of other kinds, left out: 2" in printed
    assert "complete already" in prepare_rows(out, out)  # its own files are no new text
    assert meta_of(out)["documents_read"] > 99 + 20
    assert meta_of(out)["characters_written"] == 2 * sum(len(text) + 1 for text in texts)
    vocab = tokenizer_of(out).get_vocab()
    assert sum(word in vocab for word in WORDS) > 50
    assert sum(word[::-1] in vocab for word in WORDS) > 50


@slow
def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import datasets

    texts = TEXTS[:40]
    lines = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"txt/{i:03}.txt").write_text(text)
    for name, columns in (  # other columns differ; one has no text, one is damaged below
            ("a[1]", {"id": [*range(20)], "text": texts[:20]}), ("b", {"body": ["x"]}),
            ("c", {"id": ["x"] * 20, "text": texts[20:]}), ("d", {"text": ["x"]})):
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"parquet/{name}.parquet")
    os.truncate(tmp_path / "parquet/d.parquet", 300)

    hashes = set()
    for source in ("a.jsonl", "*.xz", "a.json", "b.json.gz", "txt", "parquet"):
        out = tmp_path / f"rows of {source}"
        printed = prepare_rows(out, tmp_path / source)
        hashes.add(meta_of(out)["train_sha256"])
    assert len(hashes) == 1 and "b.parquet" in printed and "d.parquet" in printed


def test_a_damaged_file_loses_only_what_cannot_be_read(tmp_path):
    def read(name, content):
        (tmp_path / name).write_bytes(content)
        *documents, (text, reason) = prepare.read_file(str(tmp_path / name))
        assert text is None
        return documents, reason

    documents, reason = read("t.txt", b"caf\xe9 \xff" + b"w" * 9)
    assert documents == [("caf\ufffd \ufffd" + "w" * 9, None)]
    assert "2 bytes that are not UTF-8" in reason
    lines = b"".join(b'{"text": "%s"}\n' % sentences(i, 20).encode() for i in range(400))
    for ending, whole in (("xz", lzma.compress(lines)), ("gz", gzip.compress(lines, 0))):
        half = whole[: len(whole) // 2]
        for content in (half, half + b"\xff" * 100_000):
            documents, reason = read(f"t.jsonl.{ending}", content)
            assert sum(bool(text) for text, _ in documents) > 50 and "can be read" in reason


class HubRequest(http.server.BaseHTTPRequestHandler):
    """A request to the fixture `hub`."""

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        fault, content = hub.fault(path), hub.files.get(path)
        if isinstance(fault, int) or content is None:
            return self.send_error(fault or 404)
        self.send_response(200)
        self.send_header("Content-Length", len(content))
        self.send_header("ETag", f'"{path}"')
        self.send_header("X-Repo-Commit", hub.sha)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // (2 if fault == "cut" else 1)])

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """The hub as far as its client asks it for C4, here TEXTS in three gzipped files of lines.
    `hub.fault(path)` may give a status to fail with, "cut" to close the connection in the middle of
    the answer, or None. It has files of its first revision only."""
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubRequest)
    hub.sha, hub.fault = "a" * 40, lambda path: None
    hub.env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
               "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}

    shards = {f"c4-train.0000{i}.json.gz": gzip.compress(write_jsonl(
        tmp_path / "shard", TEXTS[133 * i : 133 * (i + 1)]).read_bytes()) for i in range(3)}
    about = {"id": "allenai/c4", "sha": hub.sha}
    tree = [{"type": "file", "path": name, "oid": "b" * 40, "size": len(content)}
            for name, content in shards.items()]
    api, files = "/api/datasets/allenai/c4", "/datasets/allenai/c4/resolve"
    hub.files = {f"{files}/{hub.sha}/{name}": content for name, content in shards.items()} | {
        f"{api}/revision/{hub.sha}": json.dumps(about).encode(),
        f"{api}/tree/{hub.sha}": json.dumps(tree).encode(),
        f"{files}/main/README.md": b"---\nconfigs:\n- config_name: en\n  data_files:\n"
                                   b"  - split: train\n    path: c4-train.*.json.gz\n---\n"}
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    return hub


def test_after_a_fault_in_the_middle_of_a_file_nothing_is_read_twice(monkeypatch):
    faults = [OSError("reset"), OSError("reset")]

    def read_file(path):
        yield from ((f"{path} {i}", None) for i in range(3))
        if path == "hf://b" and faults:
            raise faults.pop()
        yield f"{path} 3", None

    monkeypatch.setattr(prepare, "read_file", read_file)
    monkeypatch.setattr(prepare, "RETRY_SECONDS", 0)
    texts = [text for text, *_ in prepare.documents(["hf://a", "hf://b", "hf://c"])]
    assert texts == [f"hf://{file} {i}" for file in "abc" for i in range(4)] and not faults


@slow
def test_the_default_command_reads_c4_over_an_unreliable_network(hub, tmp_path):
    def prepare_c4(out, code=0, **constants):
        return finish(start(*hurried_prepare(**constants), "--out", tmp_path / out, *SMALL_ROWS,
                            env=hub.env), code)

    failures = [500, "cut", 429, 503] * 20  # longer than the client itself tries again
    hub.fault = lambda path: failures.pop() if "00001.json" in path and failures else None
    assert "does not answer" in prepare_c4("faults") and not failures
    meta = meta_of(tmp_path / "faults")
    assert (meta["revision"], meta["documents_read"]) == (hub.sha, len(TEXTS))
    prepare_rows(tmp_path / "local", write_jsonl(tmp_path / "t.jsonl", TEXTS))
    one, other = files_of(tmp_path / "faults"), files_of(tmp_path / "local")
    assert all(one[name] == other[name] for name in ("train.bin", "val.bin", "tokenizer.json"))

    passes = itertools.count()  # the tokenizer's, then that of packing: an outage begins
    hub.fault = lambda path: 500 if "00002.json" in path and next(passes) else None
    printed = prepare_c4("outage", code=1, OUTAGE_SECONDS=0.1, SAVE_SECONDS=0)
    assert "Start the same command again" in printed
    hub.sha, hub.fault = "d" * 40, lambda path: None
    prepare_c4("outage")
    assert files_of(tmp_path / "outage") == one  # of the revision that it began with

    hub.shutdown()
    hub.server_close()
    assert "--source python-docs" in prepare_c4("none", code=1)
    assert not (tmp_path / "none").exists()


# ------------------------------------------- 4. Killed or stopped, prepare.py writes the same bytes


@slow
def test_killed_and_restarted_gives_the_same_bytes_on_one_core_as_on_two(tmp_path):
    """Also after a full disk, here a largest size of file. While one writes, no other may: the lock
    ends with its process, however that ends."""
    texts = [sentences(i, 20 + i % 60) for i in range(1000)]
    source = write_jsonl(tmp_path / "t.jsonl", texts + texts[::2])  # the last third repeats
    once, out = tmp_path / "once", tmp_path / "killed"
    args = ("--source", source, *SMALL_ROWS, "--out")
    finish(start("prepare.py", *args, once, preexec_fn=lambda: (
        hasattr(os, "sched_setaffinity") and os.sched_setaffinity(0, {0}))))
    full = start("prepare.py", *args, out, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert "File too large. Start the same command again" in finish(full, code=1)

    progress, read = out / "unfinished/progress.json", [0]
    for target in (1, 1050, 10**9):  # documents read when the process is killed
        process = start(*hurried_prepare(SAVE_SECONDS=0.05), *args, out)
        while process.poll() is None and read[-1] < target:
            time.sleep(0.01)
            if progress.exists():
                read.append(json.loads(progress.read_text())["counts"]["documents_read"])
        if target == 1:
            prepare_rows(out, source, refused="another prepare.py is writing")
        process.kill()
        process.communicate(timeout=60)  # until the workers have ended too, which hold its output
    assert process.returncode == 0 and len({*read}) > 3
    assert meta_of(once)["dropped_duplicate"] == 500
    assert files_of(once) == files_of(out)  # meta.json's counts too
    prepare_rows(out, source, "--seq-len", 64, refused="other seq_len")


@slow
def test_stopped_before_any_of_its_files_it_goes_on(tmp_path, monkeypatch):
    """Also where --tokens ends it: after 2,000 documents, which are tokenized together."""
    source = write_jsonl(tmp_path / "t.jsonl", [sentences(i, 2) for i in range(2100)])
    prepare_rows(tmp_path / "once", source, "--tokens", 1000)
    assert meta_of(tmp_path / "once")["documents_read"] == 2000
    replace, stopped = os.replace, []

    def stop(old, new):
        if new in stopped:
            return replace(old, new)
        stopped.append(new)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", stop)
    for _ in range(7):
        prepare_rows(tmp_path / "d", source, "--tokens", 1000, refused="No space")
    prepare_rows(tmp_path / "d", source, "--tokens", 1000)
    assert files_of(tmp_path / "d") == files_of(tmp_path / "once")


# ------------------------------------------------------------------- 5. The models and their losses


def model_of(kind="crammed", vocab=50, seq_len=16, layers=2, **settings):
    torch.manual_seed(1)
    s = cram.Settings(model=kind, layers=layers, width=32, heads=4, **settings)
    model = cram.build_model(s, vocab, seq_len)
    for p in model.parameters():  # norms and scale away from 1 and 0, which would hide mistakes
        p.data = p.data + 0.1 * torch.randn_like(p)
    return model.double()


@slow
def test_parameters_and_operations_at_the_papers_size():
    with torch.device("meta"):
        model = cram.CrammedBERT(cram.Settings(), 32_768, 128)
    assert sum(p.numel() for p in model.parameters()) == 119_589_889
    assert round(model.flops_per_token(0.25) / 1e6) == 623


def test_forward_is_what_the_paper_says():
    """By plain formulas, in float64."""
    model, ids = model_of(), torch.randint(50, (3, 16))
    mask = torch.arange(16) < torch.tensor([[16], [10], [5]])
    w = {name.removesuffix(".weight"): p.detach() for name, p in model.named_parameters()}

    def norm(x, name):
        variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-12).sqrt() * w[name] + w[name + ".bias"]

    def heads(x):  # (3, 16, 32) -> (3, 4, 16, 8)
        return torch.stack(x.split(8, dim=-1), 1)

    positions = torch.tensor([[
        (math.sin, math.cos)[c % 2](t / 10_000 ** (c // 2 * 2 / 32)) for c in range(32)]
        for t in range(16)])
    x = norm(w["embed"][ids] + w["position_scale"] * positions, "embed_norm")
    for b in ("blocks.0.", "blocks.1."):
        q, k, v = (heads(norm(x, b + "norm1") @ w[f"{b}attention.{name}"].T) for name in "qkv")
        weights = (q @ k.mT / math.sqrt(8)).exp() * mask[:, None, None]
        mixed = weights / weights.sum(-1, keepdim=True) @ v
        x = x + torch.cat(mixed.unbind(1), -1) @ w[b + "attention.out"].T
        y = norm(x, b + "norm2")
        gate = y @ w[b + "ffn.gate"].T
        gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
        x = x + (y @ w[b + "ffn.up"].T * gelu) @ w[b + "ffn.down"].T
    hidden = norm(x, "final_norm")

    close = {"rtol": 1e-5, "atol": 1e-5}  # the table of positions is stored in float32
    torch.testing.assert_close(model.encode(ids, mask).detach(), hidden, **close)
    logits = hidden @ w["embed"].T
    torch.testing.assert_close(model.logits(ids, mask).detach(), logits, **close)
    [loss] = model(ids[:1], torch.tensor([[3, 9]]), torch.tensor([[7, 8]]))
    p = logits[0].softmax(-1)  # row 0 has no padding
    assert loss.item() == pytest.approx(-(p[3, 7] * p[9, 8]).log().item() / 2, abs=1e-5)


def test_electra_losses_and_gradients_by_slow_formulas():
    model = model_of("modernbert", vocab=12, objective="rtd", generator_layers=1,
                     generator_width=16)
    rows = torch.randint(5, 12, (16, 16))
    ids, positions, targets, uniform = cram.mask_tokens(
        rows, 0.25, 1.0, 12, torch.Generator().manual_seed(3))
    loss, generator_loss, rtd_loss, correction_loss, found, replaced = model(
        ids, positions, targets, uniform)

    each_row, close = torch.arange(16)[:, None], {"rtol": 1e-5, "atol": 0, "check_dtype": False}
    p = model.generator.logits(ids).softmax(-1)
    guessing = -p[each_row, positions, targets].log().mean()
    torch.testing.assert_close(generator_loss, guessing, **close)

    below = p[each_row, positions].cumsum(-1) <= uniform[:, :, None]
    shown = rows.scatter(1, positions, below.sum(-1))
    is_replaced = shown != rows  # a correct guess counts as original
    assert 0 < is_replaced.sum() < positions.numel()
    assert replaced.item() == pytest.approx(is_replaced.double().mean().item())
    d = model.discriminator
    p = d.replaced(shown)
    telling = -torch.where(is_replaced, p, 1 - p).log().mean()
    torch.testing.assert_close(rtd_loss, telling, **close)
    assert found.item() == pytest.approx(((p > 0.5) & is_replaced).double().mean().item())

    p = (d.head(d.encode(shown)) @ d.embed.weight.T).softmax(-1)
    correcting = -p[each_row, positions, targets].log().mean()
    torch.testing.assert_close(correction_loss, correcting, **close)
    torch.testing.assert_close(loss, guessing + 50 * telling + correcting, **close)

    ours, *parts = [torch.autograd.grad(x, d.embed.weight, retain_graph=True)[0]
                    for x in (loss, guessing, telling, correcting)]  # the embedding is shared
    assert all(part.abs().sum() > 0 for part in parts)
    torch.testing.assert_close(ours, parts[0] + 50 * parts[1] + parts[2], rtol=1e-3, atol=1e-5)


def test_sampled_tokens_follow_the_distribution():
    """Also where the logits are in 16 bits, in which their sum would be far too coarse."""
    logits = (3 * torch.randn(1, 1, 300)).bfloat16()
    uniform = (torch.arange(20_000)[:, None] + 0.5) / 20_000
    tokens = cram.sample_tokens(logits.expand(20_000, 1, 300), uniform)
    share = torch.bincount(tokens.flatten(), minlength=300) / 20_000
    assert (share - logits.float().softmax(-1)[0, 0]).abs().sum() / 2 < 5e-3
    last = cram.sample_tokens(torch.randn(300, 1, 30_000), torch.full((300, 1), 1 - 2**-24))
    assert last.max() < 30_000  # the sum of so many probabilities may stay below it


# ----------------------------------------------------------------------------------- 6. The recipes


@pytest.mark.parametrize("recipe, peak, shares", [
    ("crammed", 1e-3, {0: 0.25, 0.5: 0.75, 0.75: 1, 0.875: 0.5, 1: 0, 2: 0}),
    ("modern", 2e-3, {0: 0, 0.015: 0.5, 0.03: 1, 0.3: 1, 0.65: 0.5, 1: 0, 2: 0})])
def test_learning_rate(recipe, peak, shares):
    s = cram.Settings(**cram.RECIPES[recipe])
    assert {f: cram.lr_at(f, s) / peak for f in shares} == pytest.approx(shares)
    assert cram.lr_at(0.5, cram.Settings(warmup=0, decay=0, lr=1)) == 1


def test_batch_staircase():
    s = cram.Settings
    assert [cram.batch_at(f, s()) for f in (0, 0.0374, 0.0376, 0.3, 0.5624, 0.5626, 1)] == [
        512, 512, 1024, 4608, 7680, 8192, 8192]
    assert [cram.batch_at(f, s(batch=32)) for f in (0, 0.0376, 1)] == [2, 4, 32]
    assert cram.batch_at(0, s(batch=1)) == cram.batch_at(1, s(batch=1)) == 1
    assert cram.batch_at(0, s(batch=32, ramp=0)) == 32


def test_masks_are_exact_and_never_the_same():
    rows = torch.randint(5, 1000, (192, 128))
    inputs, positions, targets, uniform = cram.mask_tokens(
        rows, 0.25, 0.8, 1000, torch.Generator().manual_seed(0))
    assert positions.shape == uniform.shape == (192, 32)
    assert all(len(set(p)) == 32 for p in positions.tolist())
    assert len({tuple(sorted(p)) for p in positions.tolist()}) == 192
    everywhere = torch.bincount(positions.flatten(), minlength=128)
    assert everywhere.min() > 20 and everywhere.max() < 85  # of 48
    assert torch.equal(inputs.scatter(1, positions, targets), rows)
    at = inputs.gather(1, positions)
    assert (at[:, :26] == cram.MASK).all()
    assert (at[:, 29:] == targets[:, 29:]).all()  # 3 stay
    assert (at[:, 26:29] != targets[:, 26:29]).float().mean() > 0.95  # 3 are random
    assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02


@pytest.mark.parametrize("order", ["file", "random"])
def test_row_order(order):
    s = cram.Settings(order=order)
    passes = [cram.row_numbers(10 * n, 10, 10, s).tolist() for n in range(4)]
    assert (passes[0] == [*range(10)]) == (order == "file")
    assert all(sorted(p) == [*range(10)] for p in passes) and len({*map(tuple, passes)}) == 4
    other = cram.row_numbers(10, 10, 10, cram.Settings(order=order, seed=1)).tolist()
    assert other != passes[1]


@pytest.mark.parametrize("order, passes", [
    ("file", 0.3), ("file", 1.0), ("file", 1.5), ("random", 0.3), ("random", 1.5)])
def test_a_short_budget_reads_an_even_share_of_the_file_and_others_skip_nothing(order, passes):
    n_rows, s = 100_000, cram.Settings(order=order, batch=256)
    mean = np.mean([cram.batch_at(k / 1000, s) for k in range(1000)])
    steps = math.ceil(passes * n_rows / mean)
    batches, position, rows = [cram.batch_at(k / steps, s) for k in range(steps)], 0, []
    for k, batch in enumerate(batches):
        rows += cram.row_numbers(position, batch, n_rows, s).tolist()
        position = cram.next_position(position, batch, sum(batches[k:]), n_rows, s)
    if order == "file" and passes <= 1:
        assert len(set(rows)) == len(rows) and position >= n_rows
        shares = np.bincount(np.array(rows) * 5 // n_rows, minlength=5) / (n_rows / 5)
        assert shares == pytest.approx([passes] * 5, rel=0.05)
    else:
        assert rows == cram.row_numbers(0, position, n_rows, s).tolist()


def test_muon_is_torchs_muon():
    starts = [0.02 * torch.randn(shape) for shape in ((32, 32), (64, 32), (32, 64), (32, 32))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in starts] for _ in range(2))
    optimizers = cram.Muon(ours, 2e-3, 5.0), torch.optim.Muon(
        theirs, lr=2e-3, weight_decay=5.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, a, b in zip(starts, ours, theirs):  # theirs computes in bf16
        assert (a - b).norm() < 0.03 * (b - start).norm()


@pytest.mark.parametrize("recipe, loss, val_loss, tolerance", [
    ("crammed", 4.62322, 4.54408, 2e-4), ("modern", 4.54408, 4.48572, 2e-4),
    ("electra", 4.5348, 4.4825, 2e-3)])
def test_the_final_loss_of_each_recipe(finished, recipe, loss, val_loss, tolerance):
    """Numbers of this code, no results: what moves them changes what a recipe computes. (A second
    thread moves them by 5e-6, and electra's by 4e-4, as it draws another token.)"""
    _, [*_, line] = read_run(finished(recipe))
    assert line.get("loss_generator", line["loss"]) == pytest.approx(loss, abs=tolerance)
    assert line["val_loss"] == pytest.approx(val_loss, abs=tolerance)


# -------------------------------------------------------------- 7. A run learns and keeps its books


def test_a_run_learns_and_keeps_its_books(finished):
    out = finished("crammed")
    (saved, log), printed = read_run(out), (out / "screen.txt").read_text()
    s = cram.Settings(**saved["settings"])
    rows = [cram.batch_at(k / 40, s) for k in range(40)]
    for n, line in enumerate(log, 1):
        assert (line["step"], line["batch"], line["tokens"]) == (n, rows[n - 1], 32 * sum(rows[:n]))
        assert line["lr"] == cram.lr_at((n - 1) / 40, s)
        assert line["mfu"] is None and line["tokens_per_s"] > 0
        assert ("val_loss" in line) == (n % 2 == 0)  # every 5 %
    assert log[-1]["val_loss"] < log[1]["val_loss"] - 1
    assert_same(torch.load(out / "ckpt.pt", weights_only=True)["model"], saved["model"])

    assert len(re.findall(r"^ *\d+:\d\d:\d\d .*", printed, re.M)) == len(log)
    summary = printed[printed.index("\ntokens  "):]  # one block ends the run
    assert "40, of which 0 skipped" in summary
    assert f"validation loss  {log[-1]['val_loss']:.3f}" in summary
    assert re.search(r"wrote +.*finish\\xe9d.*/ckpt.pt", summary)


def test_validation_loss_as_the_contract_defines_it(data, finished):
    model, _ = cram.load_checkpoint(finished("crammed") / "ckpt.pt")
    rows = torch.from_numpy(rows_of(data, "val").astype(int))
    positions = np.random.default_rng(0).random(rows.shape).argsort(1)[:, : round(0.15 * 32)]
    at = torch.arange(len(rows))[:, None], torch.from_numpy(positions)
    masked = rows.clone()
    masked[at] = cram.MASK
    p = model.logits(masked).double().softmax(-1)
    _, [*_, line] = read_run(finished("crammed"))
    assert line["val_loss"] == pytest.approx(-p[(*at, rows[at])].log().mean().item(), abs=1e-5)


def test_the_loss_of_a_line_is_the_mean_since_the_one_before(train):
    """A line every 2 % and a validation every 5 %. With a rate so small that no weight moves, 50
    steps, a line for each, have the losses of the first 50 of 100, a line for one or two."""
    flags = {"lr": 1e-30, "ramp": 0, "order": "random", "layers": 1, "batch": 2}
    _, log = train("each", steps=50, **flags)
    assert [line["step"] for line in log] == [*range(1, 51)]  # in floating point 29 / 50 * 50 < 29
    losses = [line["loss"] for line in log]
    assert len(set(losses)) == 50

    _, log = train("several", steps=100, stop_after=50, **flags)
    steps = [line["step"] for line in log]
    assert steps == [n for n in range(1, 51) if n % 2 == 0 or n % 5 == 0]
    for line, before in zip(log, [0, *steps]):
        assert line["loss"] == pytest.approx(np.mean(losses[before : line["step"]]))


@pytest.mark.parametrize("recipe", ["modern", "electra"])
def test_fill_says_what_the_python_interface_says(finished, recipe):
    """With electra, the generator fills in masks and the discriminator judges words."""
    path = finished(recipe) / "ckpt.pt"
    fill = functools.partial(command, cram, "--out", path.parent, "--fill")
    model, tokenizer = cram.load_checkpoint(path, device="cpu", generator=True)
    ids = torch.tensor([[cram.CLS, *tokenizer.encode("a <mask> b <mask>.").ids, cram.SEP]])
    guesses = model.logits(ids)[ids == cram.MASK].softmax(-1)
    assert not model.training
    for line, p in zip(fill("a <mask> b <mask>.").splitlines(), guesses, strict=True):
        best = [f"{tokenizer.id_to_token(int(i))} {p[i]:.1%}" for i in p.argsort(descending=True)]
        assert line == "<mask>: " + ", ".join(best[:5])
    if recipe == "electra":
        lines = fill("Nothing masked").splitlines()
        assert [line.split()[1] for line in lines] == ["Nothing", "masked"]
        with pytest.raises(cram.CramError, match="no logits"):
            cram.load_checkpoint(path)[0].logits(ids)
    else:
        fill("nothing", refused="<mask>")


# ---------------------------------------------------------------------------------- 8. The deadline


def test_the_clock_ends_a_run_before_its_deadline(train):
    """54 steps of 1.1 s in a minute, as none is begun that would end later. Rate, batch, and a
    validation every 5 %, follow the clock, which a resume sets to where it stopped. If that was
    after 11 of 12 s, it begins no step."""
    train(minutes=1, step_s=lambda n: 1.1, stop_after=10)
    short = shutil.copytree(train.folder / "out", train.folder / "short")
    saved, log = train("short", resume=True, minutes=0.2, step_s=lambda n: 1.1)
    assert saved["state"]["step"] == 10 and log[-1]["elapsed_s"] == pytest.approx(11)
    assert (short / "ckpt.pt").exists() and "no step fits" in train.printed

    saved, log = train(resume=True, step_s=lambda n: 1.1)
    s = cram.Settings(**saved["settings"])
    for line in log:
        before, after = (line["step"] - 1) * 1.1 / 60, line["step"] * 1.1 / 60
        assert [line["progress"], line["elapsed_s"]] == pytest.approx([after, after * 60])
        assert line["lr"] == pytest.approx(cram.lr_at(before, s))
        assert line["batch"] == cram.batch_at(before, s)
    assert line["step"] == saved["state"]["step"] == 54
    assert sum("val_loss" in line for line in log) == 20


def test_a_first_step_that_compiles_skips_no_rows_and_ends_no_run(train, monkeypatch):
    """It takes 40 s of the minute; the others take 0.3 s and read more rows than there are."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    saved, _ = train("out", "--compile", minutes=1, ramp=0,  # n = 1 searches for the microbatch
                     step_s=lambda n: 40 if n == 2 else 0.3)
    assert saved["state"]["rows"] == saved["state"]["position"] > 60 * 32


def test_the_clock_is_not_misled_by_a_pause(train):
    """A step that takes 8 s, as after Ctrl-Z, neither ends a run nor makes it skip much."""
    saved, _ = train(minutes=0.5, ramp=0, step_s=lambda n: 8 if n == 20 else 0.3)
    assert saved["state"]["step"] >= 73
    assert saved["state"]["position"] - saved["state"]["rows"] < 100


# ----------------------------------------------------- 9. Microbatch and processes change no result


@pytest.mark.parametrize("recipe", ["crammed", pytest.param("electra", marks=slow)])
def test_the_microbatch_changes_nothing(train, recipe):
    flags = {**ELECTRA, "recipe": recipe, "optimizer": "adamw", "steps": 6}
    whole, log = train("whole", **flags)
    parts, parts_log = train("parts", **flags, microbatch=5)
    torch.testing.assert_close(parts["model"], whole["model"], rtol=1e-4, atol=2e-5)
    for a, b in zip(log, parts_log):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5 * a["loss"])


def test_the_microbatch_is_halved_until_a_step_fits(train, monkeypatch):
    """The compiler plays a card with little memory. The search moves no weight and leaves no
    momentum: the run is the one that was given that microbatch."""
    def small_card(model):
        def compiled(ids, *masked):
            if len(ids) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return model(ids, *masked)
        return compiled

    monkeypatch.setattr(torch, "compile", small_card)
    flags = {"recipe": "modern", "steps": 3, "layers": 1}
    expected = train("given", microbatch=8, **flags)
    found = train("found", "--compile", **flags)
    assert train.printed.count("trying half") == 2 and "; 8 rows per forward" in train.printed
    assert_same_run(found, expected)


@slow
def test_two_processes_end_where_one_ends_also_stopped_and_killed(train, data):
    """With electra, so also with Muon. If one is asked to stop, both save after the step; if one is
    killed, the other ends. One alone can go on, and two after it. (Two sum in another order, and
    Muon amplifies rounding.)"""
    flags = {**TINY, **ELECTRA, "data": data, "batch": 37, "microbatch": 8, "steps": 24}
    out, flags["save_minutes"] = train.folder / "two", 1e-6
    for number, codes, words in ((signal.SIGTERM, (0, 0), "; continue with --resume"),
                                 (signal.SIGKILL, (1, -9), "has lost another process of the run")):
        args = ["--resume"] if out.exists() else flags_of(flags)
        two = start_two("cram.py", "--out", out, *args)
        wait_for_log(two[0], out, lines=6)
        two[1].send_signal(number)
        printed = "".join(map(finish, two, codes))
        assert words in printed and not (out / "ckpt.pt").exists()  # or it came after the end
        train("two", resume=True, stop_after=1)
    train("two", resume=True)

    (a, a_log), (b, b_log) = train("one", **flags), read_run(out)
    torch.testing.assert_close(b["model"], a["model"], rtol=0, atol=5e-4)
    assert a["state"]["rows"] == b["state"]["rows"] and len(a_log) == len(b_log)
    for line, other in zip(a_log, b_log):
        for key in ("loss", "val_loss"):
            assert line.get(key) == pytest.approx(other.get(key), abs=0.05)


@slow
def test_a_process_of_torchrun_that_starts_late_validates_with_the_others(data, tmp_path):
    """Its clock is a sixth of the budget behind, so between the two a validation is always due."""
    late = "import time, cram; time.sleep(0.8 * (cram.RANK == 0)); cram.main()"
    flags = {**TINY, "minutes": 5 / 60, "data": data, "out": tmp_path}
    printed = finish(start(*TORCHRUN, sys.executable, "-c", late, *flags_of(flags)))
    assert printed.count("validation loss") == 1  # one process prints
    assert all(line.get("val_loss", 0) < 8 for line in read_run(tmp_path)[1])


# ---------------------------------------------------------------------------- 10. A resume is exact


@pytest.mark.parametrize("recipe, steps, passes", [
    ("crammed", 40, 0.58), ("modern", 40, 0.81), pytest.param("crammed", 80, 1.17, marks=slow),
    pytest.param("electra", 40, 0.81, marks=slow)])
def test_interrupted_twice_and_resumed_is_bit_for_bit_the_same(
        finished, train, data, recipe, steps, passes):
    """In the order of the file below and above a pass, and in random order."""
    flags = {**ELECTRA, "recipe": recipe, "lr": 1e-2, "steps": steps}
    whole = read_run(finished(recipe)) if steps == 40 else train("whole", **flags)
    assert whole[0]["state"]["rows"] / len(rows_of(data)) == pytest.approx(passes, abs=0.01)
    rng, n = random.Random(0), steps // 2 - 1
    train("parts", **flags, stop_after=rng.randint(1, n))
    train("parts", resume=True, stop_after=rng.randint(1, n))
    assert not (train.folder / "parts/ckpt.pt").exists()
    assert_same_run(train("parts", resume=True), whole)


def test_a_finished_run_resumed(train, finished):
    """It writes the same model again; with a larger budget it goes on, until that is spent."""
    out = shutil.copytree(finished("crammed"), train.folder / "out")
    saved, log = read_run(out)
    (out / "ckpt.pt").unlink()
    again = train(resume=True)
    assert_same_run(again, (saved, log))
    assert again[0]["state"]["seconds"] == saved["state"]["seconds"]  # its start is not counted
    result = torch.load(out / "ckpt.pt", weights_only=True)["result"]
    assert untimed(result) == untimed(log[-1])
    assert result["elapsed_s"] - log[-1]["elapsed_s"] < 5  # validation and saving are not counted

    train(resume=True, steps=60, stop_after=9)
    assert "another budget" in train.printed
    _, log = train(resume=True, minutes=1e-4)  # six milliseconds
    assert "no step fits" in train.printed
    steps = [line["step"] for line in log]
    assert steps == sorted(set(steps)) and steps[-1] == 49


@slow
def test_stopped_or_killed_at_any_moment_it_goes_on(train, data):
    """SIGTERM saves and leaves, kill -9 just leaves; last.pt is written after every step. No other
    run can use the folder of one that lives. (Not SIGINT, which a shell ignores for `pytest &`.)
    The whole run, to compare with, outlives its screen, as behind `| head -n 1`."""
    flags = {**TINY, "data": data, "width": 128, "steps": 50}
    whole = start("cram.py", "--out", train.folder / "whole", *flags_of(flags),
                  stderr=subprocess.PIPE)
    whole.stdout.readline()
    whole.stdout.close()
    out, rng, flags["save_minutes"] = train.folder / "out", random.Random(2), 1e-6
    for number in (signal.SIGKILL, signal.SIGTERM):
        resume = out.exists()
        process = start("cram.py", "--out", out, *(["--resume"] if resume else flags_of(flags)))
        wait_for_log(process, out)
        process.send_signal(signal.SIGSTOP)
        train(resume=resume, refused="another run is writing to")
        process.send_signal(signal.SIGCONT)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(number)
        assert ("continue with --resume" in finish(process, -number)) == (number == signal.SIGTERM)
        assert (out / "last.pt").exists() and not (out / "ckpt.pt").exists()
    assert whole.stderr.read() == "" and whole.wait() == 0
    assert_same_run(train(resume=True, save_minutes=5), read_run(train.folder / "whole"))


def test_interrupted_before_its_first_step_it_ends_by_the_signal(train, data):
    """So that a loop of the shell ends with it. (A shell ignores SIGINT for `pytest &`.)"""
    out = train.folder / "out"
    process = start("cram.py", "--out", out, *flags_of({**TINY, "data": data}),
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (out / "lock").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    finish(process, -signal.SIGINT)


# ----------------------------------------------------------------------------- 11. No model is lost


def test_a_step_that_is_not_finite_changes_nothing(train, monkeypatch):
    """In the middle and at the end: weights and moments are those of the steps before it, and the
    run ends with its model."""
    real, steps = torch.nn.utils.clip_grad_norm_, itertools.count(1)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: (
        real(*args) * (math.nan if next(steps) in (4, 8) else 1)))
    before, _ = train(steps=8, stop_after=7)
    saved, log = train(resume=True)
    for one, other in zip(before["optimizers"], saved["optimizers"]):
        assert_same([other["state"], saved["model"]], [one["state"], before["model"]])
    assert (saved["state"]["step"], saved["state"]["skipped"]) == (8, 2)
    assert (train.folder / "out/ckpt.pt").exists()
    assert all(math.isfinite(line["loss"]) for line in log)


@pytest.mark.parametrize("steps, lr, words", [
    (10, 1e39, "not finite: the run has diverged"), (2, 1e37, "validation loss is not finite"),
    (100, 1e37, "of 30 steps in a row are not finite")])
def test_a_model_that_is_not_finite_is_not_saved(train, steps, lr, words):
    """The first step has learning rate 0; the second makes the weights infinite, or so large that
    they give no loss."""
    train(steps=steps, lr=lr, lr_start=0, save_minutes=1e-9, refused=words)
    saved, _ = read_run(train.folder / "out")
    assert all(p.isfinite().all() for p in saved["model"].values())
    assert not (train.folder / "out/ckpt.pt").exists()


def test_a_full_disk(train, finished):
    """Too little room is said at the start. In mid-run training continues, and the older last.pt
    stays whole, as do the lines of the log. A disk that holds one more file gets the model."""
    with mock.patch("shutil.disk_usage", return_value=argparse.Namespace(free=1000)):
        train("other", steps=2, refused="has room for 0 MB")
    last, model = (finished("crammed") / name for name in ("last.pt", "ckpt.pt"))
    assert model.stat().st_mtime_ns < last.stat().st_mtime_ns  # it is written first

    before, _ = train(steps=12, stop_after=2)
    lines = train.folder / "out/log.jsonl"
    whole = lines.read_bytes()
    train(resume=True, largest_file=len(whole) + 100, refused="is the disk full?")
    assert "log.jsonl: no space left" in train.printed and lines.read_bytes() == whole
    train(resume=True, stop_after=1, largest_file=1000, refused="could not be saved")

    saved, log = train(
        resume=True, save_minutes=1e-9, largest_file=last.stat().st_size * 2 // 3)
    assert train.printed.count("full? last.pt stays as it was") == 11
    assert log[-1]["step"] == 12
    assert_same(saved["model"], before["model"])
    assert cram.load_checkpoint(train.folder / "out/ckpt.pt")
    assert not list(train.folder.glob("out/*.part"))


# --------------------------------------------------------------- 12. The same model in transformers


@slow
@pytest.mark.parametrize("recipe", ["modern", "electra"])
def test_an_exported_model_is_the_same_in_transformers(finished, tmp_path, recipe):
    transformers = pytest.importorskip("transformers")
    out, folder = finished(recipe), tmp_path / "exported"
    assert str(folder) in command(cram, "--out", out, "--export", folder)

    model, tokenizer = cram.load_checkpoint(out / "ckpt.pt")
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [f"{WORDS[3]} <mask> {WORDS[5]}.", f"{' '.join(WORDS[80:92])} <mask>"]
    batch = tokens(texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    assert mask.min() == 0
    for text, row, m in zip(texts, ids, mask):
        ours = tokenizer.encode(text, add_special_tokens=False).ids
        assert row[m].tolist() == [cram.CLS, *ours, cram.SEP]
    assert tokens.decode(ids[1], skip_special_tokens=True) == " ".join(WORDS[80:92])

    trunk = transformers.AutoModel.from_pretrained(folder).eval()
    hidden = trunk(**batch).last_hidden_state[mask]
    torch.testing.assert_close(hidden, model.encode(ids, mask)[mask], rtol=0, atol=2e-5)
    assert set(trunk.config.layer_types) == {"full_attention"}  # these rows fit any window
    if recipe == "electra":
        whole = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
        assert whole.config.id2label == {0: "original", 1: "replaced"}
        scores, expected = whole(**batch).logits.softmax(-1)[..., 1], model.replaced(ids, mask)
    else:
        whole = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
        scores, expected = whole(**batch).logits, model.logits(ids, mask)
    torch.testing.assert_close(scores[mask], expected[mask], rtol=0, atol=2e-5)


# ------------------------------------------------------------------- 13. Fine-tuning is the paper's


def test_metrics_by_hand():
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    guess = np.array([1, 1, 0, 0, 0, 1, 0, 0])  # tp 2, fp 1, fn 2, tn 3
    g = finetune_glue
    assert g.accuracy(guess, labels) == 5 / 8
    assert g.f1(guess, labels) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert g.matthews(guess, labels) == pytest.approx((2 * 3 - 1 * 2) / math.sqrt(3 * 4 * 4 * 5))
    assert g.pearson(np.array([1.0, 2, 3]), np.array([1.0, 2, 4])) == pytest.approx(
        3 / math.sqrt(2 * 14 / 3))
    one, none = np.ones(8, int), np.zeros(8, int)
    assert g.matthews(one, labels) == g.matthews(guess, one) == g.f1(none, none) == 0
    assert g.pearson(np.full(8, 0.1, np.float32), labels * 1.0) == 0


def test_glue_examples_are_built_and_cut():
    a, b = [10, 11, 12, 13, 14, 15], [20, 21]
    assert finetune_glue.build_example((a,), 99) == [2, *a, 3]
    assert finetune_glue.build_example((a, b), 99) == [2, *a, 3, *b, 3]
    assert finetune_glue.build_example((a, b), 9) == [2, 10, 11, 12, 13, 3, 20, 21, 3]
    assert finetune_glue.build_example((a,), 5) == [2, 10, 11, 12, 3]


def test_glue_learning_rate_warms_up_over_a_tenth_of_the_tasks_own_steps():
    for steps in (50, 5000):
        lr = [finetune_glue.lr_at(k, steps, 1.0) for k in range(steps)]
        assert np.argmax(lr) in (steps // 10 - 1, steps // 10) and max(lr) == 1
        assert lr[0] == pytest.approx(10 / steps) and lr[-1] < 0.01
        assert lr[steps // 10 + (steps - steps // 10) // 2] == pytest.approx(0.5, abs=0.02)


LENGTHS = random.Random(1).choices(range(3, 100), k=30)  # of examples, in tokens
TINY_GLUE = argparse.Namespace(batch_size=4, lr=1e-2, scratch=False, epochs=2, dropout=0.0)


def examples(device="cpu"):
    ids = torch.randint(5, 50, (30, 128), generator=torch.Generator().manual_seed(0))
    ids *= torch.arange(128) < torch.tensor(LENGTHS)[:, None]
    return finetune_glue.Split(ids.int().to(device), (torch.arange(30) % 2).to(device),
                               (np.array(LENGTHS) + 31) // 32 * 32)


def trial_of(seed=0, device="cpu"):
    """A small model to tune on these examples of CoLA, four a step."""
    return finetune_glue.Trial(
        model_of(seq_len=128).float().to(device), finetune_glue.TASKS["cola"], examples(device),
        seed, torch.float32, TINY_GLUE)


def weights_after(*trials):
    finetune_glue.run_trials(trials, finetune_glue.tqdm(total=1, disable=True))
    return [list(trial.model.parameters()) for trial in trials]


def test_every_row_once_an_epoch_and_the_smallest_length_that_holds_a_batch():
    (rows, T), other = (
        finetune_glue.epoch_batches(examples(), seed, TINY_GLUE) for seed in (7, 8))
    first, second = rows.reshape(2, 28)
    assert len(set(first)) == len(set(second)) == 28 and {*first, *second} <= set(range(30))
    assert first.tolist() != second.tolist() and rows.tolist() != other[0].tolist()
    for of_step, length in zip(rows, T, strict=True):
        assert length == min(n for n in (32, 64, 96, 128) if n >= max(LENGTHS[i] for i in of_step))


def test_predictions_are_in_the_order_of_the_rows_and_padding_changes_none():
    trial, split = trial_of(), examples()
    trial.task = finetune_glue.TASKS["stsb"]  # whose predictions are numbers
    predicted = trial.predict(split)
    with torch.no_grad():
        alone = [trial.model(row[None, :length], None)[0, 0]
                 for row, length in zip(split.ids, LENGTHS)]
    assert predicted == pytest.approx(np.array(alone), abs=1e-5) and predicted.std() > 1e-3


def test_a_trial_is_adamw_on_its_batches():
    """Against the plain loop: padded to each batch's longest, lr a number."""
    trial, split = trial_of(seed=5), examples()
    trial.model.double()
    reference = copy.deepcopy(trial.model)
    [ours] = weights_after(trial)
    rows = finetune_glue.epoch_batches(split, 5, TINY_GLUE)[0]

    optimizer = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.98), eps=1e-6,
                                  weight_decay=0.0)
    for step, chosen in enumerate(rows):
        ids = split.ids[chosen, : max(LENGTHS[i] for i in chosen)]
        logits = reference(ids, ids > 0).float()
        loss = torch.nn.functional.cross_entropy(logits, split.labels[chosen])
        optimizer.param_groups[0]["lr"] = finetune_glue.lr_at(step, len(rows), 1e-2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(ours, list(reference.parameters()), rtol=0, atol=1e-6)


@slow
def test_fine_tuning_learns_and_writes_what_it_learned(glue):
    glue.write("mnli", train=240, validation=63)
    glue("--task", "mnli", "--trials", 1, "--lr", 3e-3, "--epochs", 10, "--test")
    assert min(scores_in(glue.out)["mnli", 0].values()) > 95
    for file in ("MNLI-m", "MNLI-mm"):
        [path] = glue.out.glob(f"glue_test*/{file}.tsv")
        right = [f"{i}\t{('entailment', 'neutral', 'contradiction')[i % 3]}" for i in range(63)]
        assert len(set(right) & set(path.read_text().splitlines())) >= 60


def test_scratch_forgets_the_pretraining(glue, tmp_path):
    """And a checkpoint of an earlier version is read."""
    def score(ckpt, *flags):
        out = tmp_path / f"{ckpt.stem} {flags}"
        glue("--task", "stsb", *ONE, "--ckpt", ckpt, "--out", out, *flags)
        return scores_in(out)["stsb", 0]

    glue.write("stsb")
    assert score(glue.out / "ckpt.pt") != score(glue.other)
    assert score(glue.out / "ckpt.pt", "--scratch") == score(glue.other, "--scratch")


@pytest.mark.parametrize("recipe, flags, p", [
    ("crammed", [], 0.1), ("modern", [], 0.0), ("modern", ["--dropout", 0.3], 0.3)])
def test_dropout_is_the_papers_and_none_for_modernbert(glue, finished, recipe, flags, p):
    """After the embedding, in attention, after attention and FFN, before the last layer."""
    glue.write("rte")
    F, ckpt = torch.nn.functional, finished(recipe) / "ckpt.pt"
    with mock.patch.object(F, "dropout", wraps=F.dropout) as dropout, mock.patch.object(
            F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attention:
        glue("--task", "rte", *ONE, "--ckpt", ckpt, "--out", glue.out, *flags)
    train, score = [(p, True)] * (1 + 2 * 2 + 1), [(p, False)] * (1 + 2 * 2 + 1)  # a step each
    assert [call.args[1:3] for call in dropout.mock_calls] == train + score
    assert [call.kwargs["dropout_p"] for call in attention.mock_calls] == [p, p, 0, 0]


# ----------------------------------------------------------------------------------------- 14. GLUE


@slow
def test_all_of_glue_and_the_files_for_its_server(glue):
    """Scores do not depend on which trials run, side by side or one by one. (Without dropout: only
    on a card does each trial draw its own.)"""
    for name in finetune_glue.EIGHT:
        glue.write(name, validation=5)
    run = functools.partial(glue, "--epochs", 1, "--dropout", 0)
    with mock.patch("finetune_glue.trials_at_once", return_value=2):
        printed = run("--task", "all", "--trials", 2)
    assert "mnli: a subset, 16 training rows, not the official 392,702" in printed
    scores = scores_in(glue.out)
    nine = [(scores[name, 0][split] + scores[name, 1][split]) / 2
            for name in finetune_glue.EIGHT for split in finetune_glue.TASKS[name].validation]
    assert abs(scores["stsb", 0]["validation"] - scores["stsb", 1]["validation"]) > 1  # two heads
    assert f"\ncola             matthews {nine[-1]:6.1f} " in printed
    [average] = re.findall("^mean of 9 +(.*)", printed, re.M)
    assert average.split() == [f"{sum(nine) / 9:.1f}", "80.7"]  # the paper's

    run("--task", "all", "--trials", 1, "--test")
    assert scores_in(glue.out) == scores  # the first trials ran again, and are there once
    [folder] = glue.out.glob("glue_test*")
    three, two = {"entailment", "neutral", "contradiction"}, {"entailment", "not_entailment"}
    allowed = {"MNLI-m": three, "MNLI-mm": three, "AX": three, "QNLI": two, "RTE": two,
               "STS-B": None, **dict.fromkeys(["CoLA", "SST-2", "MRPC", "QQP", "WNLI"], "01")}
    assert {path.stem for path in folder.glob("*")} == set(allowed)
    for file, labels in allowed.items():
        header, *lines = (folder / f"{file}.tsv").read_text().splitlines()
        indices, predictions = zip(*(line.split("\t") for line in lines))
        assert header == "index\tprediction"
        assert list(map(int, indices)) == [*range({"AX": 1104, "WNLI": 146}.get(file, 5))]
        assert all(x in labels if labels else 0 <= float(x) <= 5 for x in predictions)

    # Predicted afresh, by the first trial; what another seed or other settings predict is apart
    stsb = (folder / "STS-B.tsv").read_text()
    (folder / "STS-B.tsv").unlink()
    for flags in (["--trials", 2], ["--trials", 1, "--seed", 1]):
        run("--task", "stsb", "--test", *flags)
        assert scores_in(glue.out) == scores
    run("--task", "stsb", "--test", "--trials", 1, "--lr", 1e-3)
    assert len([*glue.out.glob("glue_test*/STS-B.tsv")]) == 3
    assert stsb == (folder / "STS-B.tsv").read_text()


def test_without_data_the_rows_come_from_the_hub(glue, tmp_path):
    def load_dataset(repository, task, split):
        path = write_glue(tmp_path / repository, task) / task / f"{split}.jsonl"
        return map(json.loads, path.read_text().splitlines())

    args = ("--task", "cola", *ONE, "--ckpt", glue.out / "ckpt.pt", "--device", "cpu")
    with mock.patch("datasets.load_dataset", load_dataset):
        command(finetune_glue, *args)
    assert (tmp_path / "nyu-mll/glue").exists() and ("cola", 0) in scores_in(glue.out)
    with mock.patch("datasets.load_dataset", None):
        command(finetune_glue, *args, refused="without a network, give --data")


@slow
def test_a_trial_is_finished_if_checkpoint_settings_and_data_agree(glue, tmp_path):
    run = functools.partial(glue, "--task", "cola", *ONE, "--out", glue.out)
    glue.write("cola")
    run()
    glue.data = glue.data.rename(tmp_path / "elsewhere")  # a path is not content
    finished = run()
    assert "cola: glue.json has all these trials, none is run" in finished
    assert "cola seed 0" in run("--lr", 1e-3) and "cola seed 0" in run("--ckpt", glue.other)
    for split in ("train", "validation"):
        path = glue.data / f"cola/{split}.jsonl"
        before = path.read_text()
        path.write_text(before.replace('"label": 1', '"label": 0', 4))
        assert "cola seed 0" in run()
        path.write_text(before)

    results = glue.out / "glue.json"
    first, *others = json.loads(results.read_text())
    assert first["torch"] == torch.__version__ and first["rows"] == 16 and len(others) == 4
    others = [{**result, "scores": {"validation": 99.0}} for result in others]
    results.write_text(json.dumps([{**first, "torch": "2.0"}, *others]))
    assert run() == finished  # the table has the scores of this checkpoint, settings and data


def test_a_task_of_ones_own(glue, monkeypatch):
    """The README's example, in files that begin with a byte order mark, as on Windows."""
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    entry = re.search(r'^ +"emotion": (.*),$', readme, re.M)[1]
    own = eval(entry, vars(finetune_glue))
    monkeypatch.setitem(finetune_glue.TASKS, "emotion", own)
    for path in (glue.write("emotion") / "emotion").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    printed = glue("--task", "emotion", *ONE)
    assert re.search("^emotion .*accuracy", printed, re.M) and "subset" not in printed


# ------------------------------------------------------------------------------------ 15. Bad input


FILL, COLA = "cram --out out --fill <mask>", "finetune_glue --task cola"


@pytest.mark.parametrize("line, words, damage", [
    ("prepare --source nowhere", "nothing to read there", {}),
    ("prepare --source short.jsonl", "too little text", {}),
    ("prepare --source short.jsonl --vocab-size 70000", "256 to 65536", {}),
    ("cram --hours nan", "--hours must be above 0", {}),
    ("cram --hours 1e-9", "over before the first step", {}),
    ("cram --hours 1 --steps 2", "not allowed with argument", {}),
    ("cram --steps 2 --heads 5", "even multiple of its 5 heads", {}),
    ("cram --steps 2 --recipe magic", "choose from", {}),
    ("cram --fill <mask>", "no checkpoint", {}),
    ("cram --out out --steps 2", "or continue it with --resume", {}),
    ("cram --out out --export new", "only --model modernbert", {}),
    ("finetune_glue --task cola --batch-size 100", "give a smaller --batch-size", {}),
    ("finetune_glue --task rte", "train.jsonl", {}),
    (f"{COLA} --lr nan", "--lr must be positive", {}),

    ("cram --steps 2", "damaged", {"rows/meta.json": "{}"}),
    ("cram --steps 2", "not the one", {"rows/tokenizer.json": "{}"}),
    ("cram --steps 2", "damaged", {"rows/tokenizer.json": b"\xff"}),
    ("cram --steps 2", "damaged", {"rows/val.bin": ""}),
    (COLA, "not a checkpoint", {"out/ckpt.pt": ""}),
    (FILL, "not a checkpoint", {"out/ckpt.pt": "no checkpoint"}),
    (FILL, "version of cram.py", {"out/ckpt.pt": {"model": {}, "settings": {"magic": 1}}}),
    (FILL, "version of cram.py", {"out/ckpt.pt": {"settings": {}, "state": {"losses": []}}}),
    (FILL, "code, which is not run", {"out/ckpt.pt": {"model": os.getcwd, "settings": {}}}),
    (COLA, "train.jsonl, after 0 rows", {"glue/cola/train.jsonl": '{"sentence": '}),
    (COLA, "row 1, needs sentence as text", {"glue/cola/train.jsonl": "[3]"}),
    (COLA, "row 1, needs sentence as text", {"glue/cola/train.jsonl": '{"sentence": 3}'}),
    (COLA, "a label below 2", {"glue/cola/train.jsonl": '{"sentence": "x", "label": 0.5}'}),
    ("finetune_glue --task stsb", "a label from 0 to 5", {
        "glue/stsb/train.jsonl": '{"sentence1": "x", "sentence2": "y", "label": NaN}'}),
    (COLA, "idx counting from 0", {"glue/cola/test.jsonl": '{"sentence": "x", "idx": 1}'}),
    (COLA, "test.jsonl has no rows", {"glue/cola/test.jsonl": ""}),
    (COLA, "glue.json is not a results file", {"out/glue.json": '{"runs": 3}'}),
])
def test_bad_input_is_refused(data, glue, tmp_path, monkeypatch, line, words, damage):
    """A wrong command, or a right one where files are damaged, says so and leaves nothing behind.
    It runs in a folder with rows/, short.jsonl and what `glue` makes: out/ckpt.pt, glue/..."""
    monkeypatch.chdir(tmp_path)
    glue.write("cola")
    glue.write("stsb")
    shutil.copytree(data, "rows")
    write_jsonl(Path("short.jsonl"), ["too short"])
    for file, content in damage.items():
        if isinstance(content, dict):
            torch.save(content, file)
        else:
            Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())

    name, *args = line.split()
    usual = {"prepare": ("--out", "new", *SMALL_ROWS),
             "cram": ("--data", "rows", "--out", "new", *flags_of(TINY)),
             "finetune_glue": ("--data", "glue", "--ckpt", "out/ckpt.pt", "--test")}
    printed = command(sys.modules[name], *usual[name], *args, refused=words)
    assert not [*Path("new").glob("*.pt"), *Path("new").glob("unfinished")]
    assert "cola seed 0" not in printed  # fine-tuning finds all errors before its first step


def test_a_run_is_refused_to_be_resumed_as_something_else(train, data):
    train(steps=8, stop_after=3)
    train(resume=True, lr=1e-4, refused="--lr 0.0001 (was 0.003)")
    other = shutil.copytree(data, train.folder / "other")
    (other / "meta.json").write_text(json.dumps({**meta_of(other), "train_sha256": "0" * 64}))
    train(resume=True, data=other, refused="other train_sha256")
    train("x", resume=True, refused=f"no {train.folder}/x/last.pt")
    train(resume=True, data=train.folder / "moved", refused="name its folder with --data")
    train(resume=True)
    shutil.copy(train.folder / "out/ckpt.pt", train.folder / "out/last.pt")
    train(resume=True, refused="finished model")


# ------------------------------------------------------------------------------------ 16. On a card


def on_a_card(test):
    """Plain `pytest` leaves it out; where there is no card it is skipped."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
    return pytest.mark.cuda(slow(skip(test)))


@on_a_card
@pytest.mark.parametrize("recipe, precision", [
    ("crammed", "fp16"), ("modern", "auto"), ("electra", "auto")])
def test_on_a_card_a_compiled_run_is_the_plain_one_and_resumes(train, recipe, precision):
    """In 16 bits, within rounding of the same steps in float32, not compiled."""
    torch.compiler.reset()  # it remembers the shapes of the other recipes
    flags = {**ELECTRA, "recipe": recipe, "device": "cuda", "width": 64, "steps": 20}
    _, plain = train("plain", "--no-compile", **flags, precision="fp32")
    train("other", **flags, precision=precision, stop_after=8)
    dtype = "float16" if precision == "fp16" else "bfloat16"
    assert f"{dtype}, compiled; 512 rows per forward pass" in train.printed
    _, other = train("other", resume=True)
    assert "GiB" in train.printed and len(plain) == len(other)
    assert plain[-1]["loss"] < 0.8 * plain[0]["loss"]  # far more than the two may differ by
    for a, b in zip(plain, other):
        for key in {"loss", "val_loss", "loss_generator", "loss_discriminator"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=0.03)


@on_a_card
def test_on_a_card_the_microbatch_is_fitted_to_its_memory(train):
    """With 384 MiB allowed, of which weights and moments take 170, and 512 rows several hundred."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(384 * 2**20 / total)
    try:
        train(device="cuda", width=512, layers=4, batch=4096, steps=2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "trying half" in train.printed
    assert 1 <= int(re.search(r"(\d+) rows per forward pass\n", train.printed)[1]) < 512


@on_a_card
def test_on_a_card_replayed_graphs_are_the_steps_one_by_one():
    eager, *replayed = [trial_of(seed, device="cuda:0") for seed in (0, 0, 1)]
    eager.use_graphs = False
    (expected,), (ours, _) = weights_after(eager), weights_after(*replayed)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(ours, expected))
    moved = replayed[0].model.bert.embed.weight.cpu() - model_of(seq_len=128).float().embed.weight
    assert moved.abs().max() > 1e-2  # far more than the two may differ by
