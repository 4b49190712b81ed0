"""What the three scripts promise, as tests. No network; everything runs on text made here.

    pytest -q                 all, three minutes on two cores
    pytest -q -m "not slow"   the quick ones, 40 seconds
    pytest -q -m cuda         the tests that need a card

| promise | tests (test_...) |
|---|---|
| prepare: text becomes lower-case ASCII, no words glued | normalizer* |
| special tokens are ids 0 to 4 and never read from text | special_tokens* |
| rows lose nothing and are sorted; both splits; counts | packing*, counts* |
| every kind of source; bad parts are named and skipped | a_folder* to long_or_damaged* |
| the hub: default command, faults, outage, revision | default_command* |
| killed, stopped, two at once: the same bytes | killed_and_restarted* to two_on_one* |
| the model, ELECTRA and dropout are the papers' | parameters* to sampled_tokens* |
| settings, schedules, optimizers, masks, order of rows | defaults* to a_short_budget* |
| what each recipe computes has not moved | final_loss* |
| a run learns; log, validation, --fill, load_checkpoint | a_run_learns* to checkpoint_of_an_* |
| microbatch and processes change no result | microbatch_changes*, two_processes* |
| the deadline holds, no row is skipped for a slow start | the_clock*, a_first_step* |
| resume is exact, also after kill -9 | interrupted_twice*, finished_run*, stopped_or_killed* |
| nothing is overwritten; one run a folder | neither_overwritten*, stopped_or_killed* |
| screens, names and full disks end no run | stopped_or_killed*, names*, full_disk* |
| steps, weights that are not finite | step_that_is_not*, diverged*, model_that_is_not* |
| the microbatch is fitted to memory | the_microbatch_is_halved*, fitted_to_the_card* |
| torchrun: both stop together, one can go on; one is late | two_processes*, starts_late* |
| --export is the same model in transformers | exported_model*, cannot_be_exported* |
| a card: compilation, 16 bits, CUDA graphs | a_compiled_run*, replayed* |
| GLUE: metrics, examples, schedule, training loop | metrics* to adamw* |
| GLUE: all tasks, the hub, files for the server, own task | all_of_glue* to scratch* |
| GLUE: a score depends on nothing else; finished is skipped | finished_if*, depends_on_nothing* |
| bad input: one sentence that says what to do | *says_what_is_wrong, no_checkpoint*, glue_needs* |
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
import pickle
import random
import re
import shutil
import signal
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

HERE = Path(__file__).parent
TINY = {"layers": 2, "width": 32, "heads": 4, "batch": 32, "lr": 3e-3, "device": "cpu"}
ELECTRA = {"recipe": "electra", "generator_layers": 1, "generator_width": 16}
slow = pytest.mark.slow


# ------------------------------------------------------------------------------------------ helpers


def flags_of(settings):
    return [x for name, value in settings.items() for x in (f"--{name}".replace("_", "-"), value)]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def launch(name, *args, runner=(), before="", **popen):
    """Start one of the scripts as a user does. `before` is Python to run first in its process,
    where the script is `it`."""
    command = [sys.executable, *runner, HERE / name, *args]
    if before:
        main = f"import sys; sys.path.insert(0, {str(HERE)!r}); import {name[:-3]} as it; {before}"
        command[1:2] = ["-c", f"{main}\nit.main()"]
    return subprocess.Popen([*map(str, command)], **{
        "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **popen})


def script(name, *args, code=0, **launching):
    """Run one of the scripts to its end: what it prints."""
    process = launch(name, *args, **launching)
    try:
        printed, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, printed
    assert "Traceback" not in printed, printed
    return printed


def command(module, *args, refused=None, encoding="utf-8", **flags):
    """Run a script's main() in this process, as to start one takes seconds: what it prints.
    With refused="words" it must say them and stop."""
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    argv = [module.__name__ + ".py", *map(str, [*args, *flags_of(flags)])]
    screen, errors = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True), io.StringIO()
    error = (cram.CramError, OSError, SystemExit)
    stop = contextlib.nullcontext() if refused is None else pytest.raises(error)
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(errors):
            with mock.patch("sys.argv", argv), stop as stopped:
                module.main()
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
        printed = screen.buffer.getvalue().decode(encoding)
        print(printed, errors.getvalue())  # for pytest, which shows it if the test fails
    assert refused is None or refused in f"{stopped.value} {errors.getvalue()}"
    return printed


LETTERS = random.Random(0)
WORDS = ["".join(LETTERS.choices("abcdefghijklmnop", k=LETTERS.randint(3, 8))) for _ in range(100)]


def sentences(seed, n):
    """Text of a small language with something to learn in it: its words follow each other."""
    rng, text = random.Random(seed), []
    for _ in range(n):
        start, length = rng.randrange(100), rng.randint(3, 20)
        text.append(" ".join(WORDS[(start + i) % 100] for i in range(length)) + ".")
    return " ".join(text)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


SMALL_ROWS = ["--vocab-size", 700, "--seq-len", 32]


def prepare_rows(out, *args, **launching):
    """Run prepare.py in a process of its own: what it prints."""
    return script("prepare.py", "--out", out, *SMALL_ROWS, *args, **launching)


def meta_of(out):
    return json.loads((out / "meta.json").read_text())


def rows_of(out, split="train"):
    return np.fromfile(out / f"{split}.bin", "<u2").reshape(-1, meta_of(out)["seq_len"])


def tokenizer_of(out):
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def files_of(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder: rows of 32, 700 tokens, one document in a hundred to validate on."""
    folder = tmp_path_factory.mktemp("data")
    texts = [sentences(i, 8 + i % 5) + " <mask> <sep>" * (i == 0) for i in range(400)]
    prepare_rows(folder / "rows", "--source", write_jsonl(folder / "text.jsonl", texts))
    return folder / "rows"


def wait_for_log(process, out):
    """Until a run that was just started has added to its log and there is a last.pt."""
    log, last = out / "log.jsonl", out / "last.pt"
    before = log.stat().st_size if log.exists() else 0
    while not last.exists() or log.stat().st_size <= before:
        assert process.poll() is None
        time.sleep(0.02)


@pytest.fixture
def train(data, tmp_path):
    """Train in this process: train(out, flag=value, ...) -> (last.pt, lines of the log). With
    stop_after=n a signal comes in the n-th step, as from Ctrl-C."""
    def run(out="out", *args, resume=False, stop_after=None, refused=None, **flags):
        real, calls = cram.mask_tokens, itertools.count(1)

        def stop(*mask_args):
            if next(calls) == stop_after:
                signal.raise_signal(signal.SIGTERM)
            return real(*mask_args)

        args = [*args, "--resume"] if resume else [*args, "--data", data, *flags_of(TINY)]
        with mock.patch("cram.mask_tokens", stop):
            run.printed = command(cram, *args, refused=refused, **flags, out=tmp_path / out)
        return refused is None and read_run(tmp_path / out)

    run.folder = tmp_path
    return run


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """finished(recipe) -> the folder of a finished run, which is made once and not to be changed;
    finished.printed[recipe] is what it printed."""
    folder = tmp_path_factory.mktemp("finished")

    @functools.cache
    def run(recipe):
        flags = {**TINY, **ELECTRA, "recipe": recipe, "lr": 1e-2, "steps": 40}
        run.printed[recipe] = command(cram, **flags, data=data, out=folder / recipe)
        return folder / recipe

    run.printed = {}
    return run


def read_run(out):
    saved = torch.load(out / "last.pt", weights_only=True)
    return saved, [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# Bit for bit the same, through dictionaries and lists of tensors
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
TIMES = ("elapsed_s", "s_per_row", "tokens_per_s", "mfu", "log_bytes")  # the log has times in it


def untimed(entry):
    return {key: value for key, value in entry.items() if key not in TIMES}


def assert_same_run(one, other):
    (a, a_log), (b, b_log) = one, other
    assert_same([a["model"], a["optimizers"]], [b["model"], b["optimizers"]])
    assert_same(untimed(a["state"]), untimed(b["state"]))
    assert_same([*map(untimed, a_log)], [*map(untimed, b_log)])
    assert a["data"] == b["data"]


# --------------------------------------------------------------------------- prepare: text and rows


@pytest.fixture
def rows(tmp_path):
    """Run prepare.py in this process on a path or a list of texts: what it prints."""
    def run(source, out, *args, refused=None, **constants):
        if isinstance(source, list):
            source = write_jsonl(tmp_path / f"{out}.jsonl", source)
        args = ["--source", source, "--out", tmp_path / out, *SMALL_ROWS, *args]
        with mock.patch.dict(vars(prepare), constants):
            return command(prepare, *args, refused=refused)

    return run


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
    ids = tokenizer.encode("a" * 101 + " " + "b" * 100).ids  # a very long word is unknown
    assert ids[0] == cram.UNK and cram.UNK not in ids[1:]


def test_counts_of_what_is_dropped(tmp_path, rows):
    rng = random.Random(0)
    noise = ["".join(rng.choices("!#$%&*+,-./:;<=>?@^_~0123456789", k=300)) for _ in range(7)]
    good = [sentences(i, 30) for i in range(50)]
    lines = [{"text": t} for t in [*good, *noise, "", " \n ", "漢字", good[3], good[3].upper()]]
    lines += [{"text": None}, {"text": 5}, {"no": "text"}, [1], {"text": "x\ud800y"}]
    source = tmp_path / os.fsdecode(b"caf\xe9.jsonl")  # a name that is not UTF-8
    source.write_bytes("\n".join([*map(json.dumps, lines), "{not json", ""]).encode()
                       + b'{"text": "\xff"}\n')
    printed = rows(source, "d")
    assert "With a small --vocab-size" in printed  # a tenth was too dense
    assert "caf\\udce9.jsonl row 63: no text in a column \"text\", but {'text': None}" in printed
    meta = meta_of(tmp_path / "d")
    assert meta["documents_read"] == len(lines) + 2
    assert meta["invalid"] == 6  # null, number, no column, list, not JSON, not UTF-8
    assert meta["empty"] == 3
    assert meta["dropped_duplicate"] == 2
    assert meta["dropped_density"] in (7, 8)  # the noise, and perhaps the short "xy"
    assert meta["documents_kept"] + sum(meta[key] for key in (
        "empty", "invalid", "dropped_duplicate", "dropped_density")) == meta["documents_read"]


def reference_rows(texts, tokenizer, max_density, val_every, val_max_rows):
    """Rows of 32 to train and to validate on, as plainly as it can be said. A document is dropped
    if it is dense in tokens. The first row, then one document in val_every, by its hash, validates;
    what is too much for that is not trained on either."""
    val, train = [], []
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        digest = hashlib.blake2b(f"{normal} ".encode(), digest_size=8).digest()
        ids = tokenizer.encode(text, add_special_tokens=False).ids + [cram.SEP]
        if len(ids) - 1 >= max_density * len(normal):
            continue
        to_val = max(0, 32 - len(val))
        if not to_val and int.from_bytes(digest, "little") % val_every == 0:
            if len(val) >= val_max_rows * 32:
                continue
            to_val = len(ids)
        val += ids[:to_val]
        train += ids[to_val:]
    return [[tuple(stream[i : i + 32]) for i in range(0, len(stream) - 31, 32)]
            for stream in (train, val)]


def test_packing_loses_nothing_and_orders_by_full_stops(tmp_path, rows):
    texts = [sentences(i, 3 + i % 40).replace(". ", ".\n" if i % 2 else ". ") for i in range(300)]
    out = tmp_path / "d"
    rows(texts, "d", MAX_DENSITY=0.168, VAL_EVERY=3, VAL_MAX_ROWS=20, BUCKET_TOKENS=3200,
         DUPLICATE_SLOTS=7)  # other texts share a slot
    train, val, meta = rows_of(out), rows_of(out, "val"), meta_of(out)
    expected_train, expected_val = reference_rows(texts, tokenizer_of(out), 0.168, 3, 20)
    assert Counter(map(tuple, train.tolist())) == Counter(expected_train)
    assert [*map(tuple, val.tolist())] == expected_val[:20]
    assert meta["train_rows"] == len(train) and meta["val_rows"] == len(val) == 20
    assert meta["documents_kept"] + meta["dropped_density"] == meta["documents_read"] == len(texts)
    assert 50 < meta["dropped_density"] < 250

    dots = (train == tokenizer_of(out).token_to_id(".")).sum(1)
    assert (np.diff(dots.astype(int)) <= 0).all() and dots[0] > dots[-1]
    place = {row: i for i, row in enumerate(expected_train)}
    ties = [place[tuple(row)] for row in train[dots == np.bincount(dots).argmax()].tolist()]
    steps = np.diff(ties)  # rows with the same count are mixed, not in the order of the source
    assert 0.3 < (steps > 0).mean() < 0.7
    assert abs(np.corrcoef(ties, range(len(ties)))[0, 1]) < 0.2  # also across buckets

    p = np.unique(train, return_counts=True)[1] / train.size
    assert meta["unigram_entropy"] == pytest.approx(-(p * np.log(p)).sum())


# -------------------------------------------------------------------------------- prepare: sources


def test_a_folder_is_read_also_if_it_is_the_output(tmp_path, rows):
    """Beside other files and a linked folder; the tokenizer sees a share of every file."""
    out, other_letters = tmp_path / "data", str.maketrans("abcdefghijklmnop", "klmnopqrstuvwxyz")
    (out / "texts").mkdir(parents=True)
    for name in ("texts/c.csv", "tokenizer.json", "d.txt.zst"):
        (out / name).write_text("text")
    (out / "b.txt").write_text("\n".join(sentences(i, 8) for i in range(99)))
    write_jsonl(out / "texts/A.JSONL", [
        sentences(i, 8).translate(other_letters) for i in range(99)])
    (out / "linked").symlink_to(tmp_path, target_is_directory=True)
    printed = rows(out, "data", TOKENIZER_CHARS=8000, PIECE=500)
    assert "to read: 2; of other kinds, left out: 2" in printed
    assert "complete already" in rows(out, "data")  # its own files are no new text
    vocab = tokenizer_of(out).get_vocab()
    assert sum(word in vocab for word in WORDS) > 50
    assert sum(word.translate(other_letters) in vocab for word in WORDS) > 50


@slow
def test_every_kind_of_file_gives_the_same_rows(tmp_path, rows):
    import datasets

    texts = [sentences(i, 30) for i in range(40)]
    lines = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
    txt, tables = tmp_path / "txt", tmp_path / "parquet"
    txt.mkdir()
    for i, text in enumerate(texts):
        (txt / f"{i:03}.txt").write_text(text)
    # Other columns differ from table to table; one has no text, and one is damaged
    for name, columns in (("a[1]", {"id": [*range(20)], "text": texts[:20]}),
                          ("b", {"body": ["x"]}), ("c", {"id": ["x"] * 20, "text": texts[20:]})):
        datasets.Dataset.from_dict(columns).to_parquet(tables / f"{name}.parquet")
    (tables / "d.parquet").write_bytes((tables / "c.parquet").read_bytes()[:300])

    hashes = set()
    for source in ("a.jsonl", "*.xz", "a.json", "b.json.gz", "txt", "parquet"):
        printed = rows(tmp_path / source, "out-" + source)
        hashes.add(meta_of(tmp_path / ("out-" + source))["train_sha256"])
    assert len(hashes) == 1 and "b.parquet" in printed and "d.parquet" in printed


def test_long_or_damaged_files_lose_only_what_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 1000)

    def read(name, content):
        (tmp_path / name).write_bytes(content)
        return [*prepare.read_file(str(tmp_path / name))]

    text = "\n".join(sentences(i, 3) + " ’" for i in range(200))
    parts = [part for part, _ in read("t.txt", text.encode())]  # in pieces cut at line ends
    assert "".join(parts) == text and len(parts) > 10
    assert all(part.endswith("\n") for part in parts[:-1])
    cut = [*prepare.pieces("words " * 500)]  # or at spaces
    assert "".join(cut) == "words " * 500 and max(map(len, cut)) <= 1000
    assert {*" ".join(cut).split()} == {"words"}

    *parts, (none, reason) = read("line.txt", "word’".encode() * 400 + b"caf\xe9 \xff" + b"w" * 9)
    assert "".join(part for part, _ in parts) == "word’" * 400 + "caf\ufffd \ufffd" + "w" * 9
    assert none is None and "2 bytes that are not UTF-8" in reason
    lines = b"".join(b'{"text": "%s"}\n' % sentences(i, 20).encode() for i in range(400))
    for ending, whole in (("xz", lzma.compress(lines)), ("gz", gzip.compress(lines, 0))):
        half = whole[: len(whole) // 2]
        for content in (half, half + b"\xff" * 100_000):
            *documents, (_, reason) = read(f"cut.jsonl.{ending}", content)
            assert sum(bool(text) for text, _ in documents) > 50 and "cut off" in reason


@pytest.mark.parametrize("content, args, words", [
    (None, [], "nothing to read there"),
    (b'{"text": "too short"}\n', [], "too little text"),
    (b"", ["--vocab-size", 70000], "256 to 65536"),
    (b"", ["--tokens", "inf"], "at least one row, and finite"),
])
def test_prepare_says_what_is_wrong(tmp_path, rows, content, args, words):
    if content is not None:
        (tmp_path / "t.jsonl").write_bytes(content)
    rows(tmp_path / "t.jsonl", "d", *args, refused=words)
    assert not (tmp_path / "d/unfinished").exists()  # another source may be given


# -------------------------------------------------------------------------------- prepare: the hub


TEXTS = [sentences(i, 30) for i in range(399)]
IMPATIENT = "import time; sleep = time.sleep; time.sleep = lambda s: sleep(min(s, 0.001))"


class HubRequest(http.server.SimpleHTTPRequestHandler):
    """A request to the fixture `hub`."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        self.fault = self.server.fault(self.path)
        self.send_error(self.fault) if isinstance(self.fault, int) else super().do_GET()

    def end_headers(self):
        self.send_header("ETag", f'"{self.path}"')
        self.send_header("X-Repo-Commit", self.server.sha)
        super().end_headers()

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // (2 if self.fault == "cut" else 1)])


@pytest.fixture
def hub(tmp_path):
    """The hub as far as its client asks it for C4, here in three gzipped files of lines.
    `hub.fault(path)` may give a status to fail with, "cut" to close the connection in the middle of
    the answer, or None; `hub.asked` lists the paths asked for."""
    lines = [json.dumps({"text": text, "timestamp": "2019", "url": "http://a"}) for text in TEXTS]
    files = {f"c4-train.0000{i}.json.gz": gzip.compress(
        "\n".join(lines[133 * i : 133 * (i + 1)]).encode()) for i in range(3)}
    tree = [{"type": "file", "path": file, "oid": "b" * 40, "size": len(content)}
            for file, content in files.items()]
    about = {"id": "allenai/c4", "sha": "a" * 40, "tags": [], "private": False, "gated": False,
             "siblings": [{"rfilename": file} for file in files]}
    readme = (b"---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n"
              b"    path: c4-train.*.json.gz\n---\n")
    for path, content in {
            "datasets/allenai/c4/resolve/main/README.md": readme,
            f"api/datasets/allenai/c4/revision/{'a' * 40}": json.dumps(about).encode(),
            f"api/datasets/allenai/c4/tree/{'a' * 40}": json.dumps(tree).encode(),
            **{f"datasets/allenai/c4/resolve/{'a' * 40}/{file}": files[file] for file in files},
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    hub = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(HubRequest, directory=tmp_path))
    hub.sha, hub.asked, hub.fault = "a" * 40, [], lambda path: None
    hub.env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
               "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    return hub


@slow
def test_the_default_command_reads_c4_over_an_unreliable_network(hub, tmp_path, rows):
    rows(write_jsonl(tmp_path / "t.jsonl", TEXTS), "local")
    prepare_rows(tmp_path / "hub", env=hub.env)
    one, other = (files_of(tmp_path / name) for name in ("hub", "local"))
    assert all(one[name] == other[name] for name in ("train.bin", "val.bin", "tokenizer.json"))
    assert meta_of(tmp_path / "hub")["revision"] == hub.sha

    failures = [500, "cut", 429, 503] * 20  # longer than the client itself tries again
    hub.fault = lambda path: failures.pop() if "00001.json" in path and failures else None
    printed = prepare_rows(tmp_path / "faults", env=hub.env, before=IMPATIENT)
    assert not failures and "does not answer" in printed
    assert files_of(tmp_path / "faults") == one

    passes = itertools.count()  # the tokenizer's, then that of packing: an outage begins
    hub.fault = lambda path: 500 if "00002.json" in path and next(passes) else None
    printed = prepare_rows(tmp_path / "d", env=hub.env, code=1, before=IMPATIENT
                           + "; it.OUTAGE_SECONDS = 0.1; it.SAVE_SECONDS = 0")
    assert "Start the same command again" in printed
    old, hub.sha, hub.fault, hub.asked = hub.sha, "d" * 40, lambda path: None, []
    prepare_rows(tmp_path / "d", env=hub.env)
    assert any(old in path for path in hub.asked) and not any(hub.sha in p for p in hub.asked)
    assert files_of(tmp_path / "d") == one  # of the revision that it began with

    hub.shutdown()
    hub.server_close()
    printed = prepare_rows(tmp_path / "none", env=hub.env, code=1, before=IMPATIENT)
    assert "--source python-docs" in printed and not (tmp_path / "none").exists()


# ---------------------------------------------------------------------------- prepare: interrupted


@slow
def test_killed_and_restarted_gives_the_same_bytes_on_one_core_as_on_two(tmp_path):
    texts = [sentences(i, 20 + i % 60) for i in range(2000)]
    source = write_jsonl(tmp_path / "t.jsonl", texts + texts[::2])  # the last third repeats
    prepare_rows(tmp_path / "once", "--source", source,
                 before="import os; getattr(os, 'sched_setaffinity', lambda *_: 0)(0, {0})")
    import resource

    killed = ["--out", tmp_path / "killed", "--source", source, *SMALL_ROWS]
    assert "File too large. Start the same command again" in script(
        "prepare.py", *killed, code=1, preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (200_000, 200_000)))  # as a full disk would stop it

    progress, read = tmp_path / "killed/unfinished/progress.json", [0]
    for target in (1, 1250, 2100, 10**9):  # documents read when the process is killed
        process = launch("prepare.py", *killed, before="it.SAVE_SECONDS = 0.05")
        while process.poll() is None and read[-1] < target:
            time.sleep(0.01)
            if progress.exists():
                read.append(json.loads(progress.read_text())["counts"]["documents_read"])
        process.kill()
        process.communicate(timeout=60)  # until the workers have ended too, which hold its output
    assert process.returncode == 0 and len({*read}) > 3
    assert meta_of(tmp_path / "once")["dropped_duplicate"] == 1000
    assert files_of(tmp_path / "once") == files_of(tmp_path / "killed")  # meta.json's counts too


def test_stopped_before_any_of_its_files_it_goes_on(tmp_path, rows, monkeypatch):
    """Also where --tokens ends it: after 2,000 documents, which are tokenized together."""
    source = write_jsonl(tmp_path / "t.jsonl", [sentences(i, 2) for i in range(2100)])
    rows(source, "once", "--tokens", 1000)
    assert meta_of(tmp_path / "once")["documents_read"] == 2000
    replace, stopped = os.replace, []

    def stop(old, new):
        if new in stopped:
            return replace(old, new)
        stopped.append(new)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", stop)
    while not (tmp_path / "d/meta.json").exists():
        rows(source, "d", "--tokens", 1000, refused="No space" if len(stopped) < 7 else None)
    assert files_of(tmp_path / "d") == files_of(tmp_path / "once") and len(stopped) == 7


@slow
def test_two_on_one_folder_and_starting_over(tmp_path, rows):
    """The second is refused while the first lives. Other arguments are refused later, too."""
    source, work = write_jsonl(tmp_path / "t.jsonl", TEXTS[:30]), tmp_path / "d/unfinished"
    first = launch("prepare.py", "--source", source, "--out", work.parent, *SMALL_ROWS)
    while not (work / "arguments.json").exists():
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    rows(source, "d", refused="another prepare.py is writing")
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=60)
    assert first.returncode == 0 and not work.exists()
    rows(source, "d", "--seq-len", 64, refused="other seq_len")


# --------------------------------------------------------------------------------------- the models


def model_of(kind="crammed", vocab=50, seq_len=16, layers=2, **settings):
    torch.manual_seed(1)
    s = cram.Settings(model=kind, layers=layers, width=32, heads=4, **settings)
    model = cram.build_model(s, vocab, seq_len)
    for p in model.parameters():  # norms and scale away from 1 and 0, which would hide mistakes
        p.data = p.data + 0.1 * torch.randn_like(p)
    return model.double()


@slow
def test_parameters_and_operations_at_the_papers_size():
    s = cram.Settings(**cram.RECIPES["electra"])
    with torch.device("meta"):
        model = cram.CrammedBERT(cram.Settings(), 32_768, 128)
        electra = cram.Electra(s, 32_768, 128)
    assert sum(p.numel() for p in model.parameters()) == 119_589_889
    assert round(model.flops_per_token(0.25) / 1e6) == 623
    trunks = [10 * L * C * C * 6 + 12 * L * 128 * C for L, C in ((s.layers, s.width), (6, 256))]
    assert electra.flops_per_token(0.15) == pytest.approx(
        sum(trunks) + 2 * 6 * 32_768 * s.width * 0.15, rel=0.01)


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


@pytest.mark.parametrize("kind", ["crammed", "modernbert"])
def test_dropout_only_in_fine_tuning(kind):
    """After the embedding, in attention, after attention and FFN, before the last layer."""
    ids, plain, F = torch.randint(50, (2, 16)), model_of(kind).train(), torch.nn.functional
    assert torch.equal(plain.encode(ids), plain.encode(ids))
    tuned = finetune_glue.Classifier(copy.deepcopy(plain), 2, dropout=0.3).double().train()
    with mock.patch.object(F, "dropout", wraps=F.dropout) as dropout, mock.patch.object(
            F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attention:
        tuned(ids, None)
    assert [call.args[1:3] for call in dropout.mock_calls] == [(0.3, True)] * (1 + 2 * 2 + 1)
    assert [call.kwargs["dropout_p"] for call in attention.mock_calls] == [0.3] * 2
    torch.testing.assert_close(tuned.eval().bert.encode(ids), plain.encode(ids))


def electra(**settings):
    """A tiny Electra in float64, and a batch for it."""
    model = model_of("modernbert", vocab=12, objective="rtd", generator_layers=1,
                     generator_width=16, **settings)
    rows = torch.randint(5, 12, (16, 16))
    masked = cram.mask_tokens(rows, 0.25, 1.0, 12, torch.Generator().manual_seed(3))
    return model, rows, masked


def test_electra_losses_by_slow_formulas():
    model, rows, (ids, positions, targets, uniform) = electra()
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


def test_electra_gradients():
    """The generator learns nothing from the discriminator but through the embedding, which gets the
    gradients of both losses."""
    gradients = []
    for weight in (0.0, 1.0, 50.0):
        model, _, masked = electra(rtd_weight=weight)
        model(*masked)[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    none, one, fifty = gradients
    assert "generator.embed.weight" not in none  # it is the discriminator's
    for name, g in none.items():
        if name.startswith("generator"):
            assert torch.equal(g, fifty[name]) and g.abs().sum() > 0, name
    embed = "discriminator.embed.weight"
    of_discriminator = one[embed] - none[embed]
    assert none[embed].abs().sum() > 0 and of_discriminator.abs().sum() > 0
    torch.testing.assert_close(fifty[embed], none[embed] + 50 * of_discriminator)


def test_sampled_tokens_follow_the_distribution():
    """Also where the logits are in 16 bits, in which their sum would be far too coarse."""
    logits = (3 * torch.randn(1, 1, 300)).bfloat16()
    uniform = (torch.arange(20_000)[:, None] + 0.5) / 20_000
    tokens = cram.sample_tokens(logits.expand(20_000, 1, 300), uniform)
    share = torch.bincount(tokens.flatten(), minlength=300) / 20_000
    assert (share - logits.float().softmax(-1)[0, 0]).abs().sum() / 2 < 5e-3
    last = cram.sample_tokens(torch.randn(300, 1, 30_000), torch.full((300, 1), 1 - 2**-24))
    assert last.max() < 30_000  # the sum of so many probabilities may stay below it


# ------------------------------------------------------------------------------------- the recipes


def test_defaults_are_the_papers():
    s = cram.Settings()
    assert (s.hours, s.layers, s.width, s.heads) == (24, 16, 768, 12)
    assert (s.lr, s.beta1, s.beta2, s.eps) == (1e-3, 0.9, 0.98, 1e-12)
    assert (s.weight_decay, s.clip, s.batch, s.mask_rate) == (0.01, 0.5, 8192, 0.25)
    assert (finetune_glue.MAX_LENGTH, len(finetune_glue.EIGHT)) == (128, 8)


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


def test_masks_are_exact_and_never_the_same():
    rows = torch.randint(5, 1000, (192, 128))
    inputs, positions, targets, uniform = cram.mask_tokens(
        rows, 0.25, 0.8, 1000, torch.Generator().manual_seed(0))
    assert positions.shape == uniform.shape == (192, 32)
    assert all(len(set(p)) == 32 for p in positions.tolist())
    assert len({tuple(sorted(p)) for p in positions.tolist()}) == 192
    everywhere = torch.bincount(positions.flatten(), minlength=128)
    assert everywhere.min() > 20 and everywhere.max() < 85  # of 48
    assert torch.equal(targets, rows.gather(1, positions))
    at = inputs.gather(1, positions)
    assert (at[:, :26] == cram.MASK).all()
    assert (at[:, 29:] == targets[:, 29:]).all()  # 3 stay
    assert (at[:, 26:29] != targets[:, 26:29]).float().mean() > 0.95  # 3 are random
    assert torch.equal(inputs.scatter(1, positions, targets), rows)
    assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02


@pytest.mark.parametrize("order", ["file", "random"])
def test_row_order(order):
    s = cram.Settings(order=order)
    passes = [cram.row_numbers(10 * n, 10, 10, s).tolist() for n in range(4)]
    assert (passes[0] == [*range(10)]) == (order == "file")
    assert all(sorted(p) == [*range(10)] for p in passes) and len({*map(tuple, passes)}) == 4
    pieces = np.concatenate([cram.row_numbers(3 * i, 3, 10, s) for i in range(12)])
    assert pieces.tolist() == cram.row_numbers(0, 36, 10, s).tolist()
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


# ---------------------------------------------------------------------------------- a training run


@pytest.mark.parametrize("recipe, loss, val_loss, tolerance", [
    ("crammed", 4.62322, 4.57589, 2e-4), ("modern", 4.54408, 4.53045, 2e-4),
    ("electra", 4.5348, 4.5278, 2e-3)])
def test_the_final_loss_of_each_recipe(finished, recipe, loss, val_loss, tolerance):
    """Numbers from this code: whatever moves them changes what a recipe computes. (A second thread
    moves them by 5e-6, and electra's by 4e-4, as it draws another token. They are no results: this
    is too early.)"""
    _, [*_, line] = read_run(finished(recipe))
    assert line.get("loss_generator", line["loss"]) == pytest.approx(loss, abs=tolerance)
    assert line["val_loss"] == pytest.approx(val_loss, abs=tolerance)


def test_a_run_learns_and_keeps_its_books(finished):
    out = finished("crammed")
    (saved, log), printed = read_run(out), finished.printed["crammed"]
    s = cram.Settings(**saved["settings"])
    rows = [cram.batch_at(k / 40, s) for k in range(40)]
    for n, line in enumerate(log, 1):
        assert (line["step"], line["batch"], line["tokens"]) == (n, rows[n - 1], 32 * sum(rows[:n]))
        assert line["lr"] == cram.lr_at((n - 1) / 40, s)
        assert line["mfu"] is None and line["tokens_per_s"] > 0
        assert ("val_loss" in line) == (n % 2 == 0)  # every 5 %
    for optimizer in saved["optimizers"]:
        assert {group["lr"] for group in optimizer["param_groups"]} == {log[-1]["lr"]}
    assert log[-1]["val_loss"] < log[1]["val_loss"] - 1
    content = torch.load(out / "ckpt.pt", weights_only=True)
    assert_same(content["model"], saved["model"])
    assert content["result"]["val_loss"] == log[-1]["val_loss"]

    assert len(re.findall(r"^ *\d+:\d\d:\d\d .*", printed, re.M)) == len(log)
    summary = printed[printed.index("\ntokens  "):]  # one block ends the run
    for words in ("40, of which 0 skipped", "train ", "peak memory", "exaFLOP",
                  f"validation loss  {log[-1]['val_loss']:.3f}"):
        assert words in summary


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


@pytest.mark.parametrize("recipe", ["crammed", pytest.param("electra", marks=slow)])
def test_the_microbatch_changes_nothing(train, recipe):
    flags = {**ELECTRA, "recipe": recipe, "optimizer": "adamw", "steps": 6}
    whole, log = train("whole", **flags)
    parts, parts_log = train("parts", **flags, microbatch=5)
    for name, p in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], p, rtol=1e-4, atol=2e-5)
    for a, b in zip(log, parts_log):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5 * a["loss"])


def test_the_clock_ends_a_run_before_its_deadline(train, monkeypatch):
    """On a clock of our own, by which a step takes 1.1 s: 54 in a minute, as none is begun that
    would end later. Rate and batch, and a validation every 5 %, follow the clock."""
    now, real = [1000.0], cram.mask_tokens

    def step(*mask_args):
        now[0] += 1.1
        return real(*mask_args)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cram, "mask_tokens", step)
    saved, log = train(minutes=1)
    s = cram.Settings(**saved["settings"])
    for line in log:
        before = (line["step"] - 1) * 1.1 / 60
        assert line["progress"] == pytest.approx(line["elapsed_s"] / 60)
        assert line["elapsed_s"] == pytest.approx(line["step"] * 1.1)
        assert line["lr"] == pytest.approx(cram.lr_at(before, s))
        assert line["batch"] == cram.batch_at(before, s)
    assert line["step"] == saved["state"]["step"] == 54
    assert sum("val_loss" in line for line in log) == 20


def test_a_first_step_that_compiles_skips_no_rows_and_ends_no_run(train, monkeypatch):
    """It takes 40 s of the minute; the others, of 0.3 s, read more than all rows."""
    now, passes, real = [1000.0], itertools.count(), cram.mask_tokens

    def forward_pass(*mask_args):
        now[0] += 40 if next(passes) == 1 else 0.3  # the first is the search for the microbatch
        return real(*mask_args)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cram, "mask_tokens", forward_pass)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    saved, _ = train("out", "--compile", minutes=1, ramp=0)
    assert saved["state"]["rows"] == saved["state"]["position"] > 60 * 32


def test_the_loss_of_a_line_is_the_mean_since_the_one_before(train):
    """With a rate so small that no weight moves, a budget of 40 steps, with a line for each, has
    the losses that one of 100 has, with a line for one or two."""
    flags = {"lr": 1e-30, "ramp": 0, "order": "random", "layers": 1, "batch": 2}
    _, log = train("each", steps=40, **flags)
    losses, start = [line["loss"] for line in log], 0
    _, log = train("several", steps=100, stop_after=40, **flags)
    for line in log:
        assert line["loss"] == pytest.approx(np.mean(losses[start : line["step"]]))
        start = line["step"]
    assert start == 40 and len(log) < 30 and len(set(losses)) == 40


@pytest.mark.parametrize("recipe", ["modern", "electra"])
def test_fill_and_python_interface(finished, recipe):
    out = finished(recipe)
    printed = command(cram, "--out", out, "--fill", "a <mask> b <mask>.")
    assert printed.count("<mask>:") == 2 and printed.count("%") == 10
    model, tokenizer = cram.load_checkpoint(out / "ckpt.pt", device="cpu")
    ids = torch.tensor([tokenizer.encode("some text").ids])
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert model.encode(ids, mask).shape == (*ids.shape, 32) and not model.training
    if recipe == "electra":
        printed = command(cram, "--out", out, "--fill", "Nothing masked")
        assert [line.split()[1] for line in printed.splitlines()] == ["Nothing", "masked"]
        assert model.replaced(ids, mask).shape == ids.shape
        with pytest.raises(cram.CramError, match="no logits"):
            model.logits(ids)
    else:
        command(cram, "--out", out, "--fill", "nothing", refused="<mask>")
        assert model.logits(ids, mask).shape == (*ids.shape, tokenizer.get_vocab_size())


def test_a_checkpoint_of_an_earlier_version_loads(finished, tmp_path):
    content = torch.load(finished("crammed") / "ckpt.pt", weights_only=True)
    del content["settings"]["objective"]  # it had no such setting
    torch.save(content, tmp_path / "ckpt.pt")
    assert cram.load_checkpoint(tmp_path / "ckpt.pt")[0].seq_len == 32
    content["settings"]["magic"] = 1
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(cram.CramError, match="another version of cram.py, with magic"):
        cram.load_checkpoint(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("flags, words", [
    ({"hours": "nan"}, "--hours must be a positive number"),
    ({"hours": 1e-9}, "over before the first step"),
    ({"hours": 1, "steps": 2}, "one of --hours, --minutes and --steps"),
    ({"steps": 2, "heads": 3}, "even multiple of its 3 heads"),
    ({"steps": 2, "generator_width": 130}, "even multiple of its 2 heads"),
    ({"steps": 2, "device": "tpu"}, "cannot be used"),
    ({"steps": 2, "recipe": "magic"}, "choose from"),
    ({"fill": "a <mask>"}, "no checkpoint"),
])
def test_cram_says_what_is_wrong(train, flags, words):
    train("o", refused=words, **flags)
    assert not list(train.folder.glob("o/*.pt*"))


@pytest.mark.parametrize("name, words", [
    ("meta.json", "damaged"), ("tokenizer.json", "not the one"), ("val.bin", "cannot reshape")])
def test_a_data_folder_that_was_copied_badly_is_refused(data, train, name, words):
    folder = shutil.copytree(data, train.folder / "data")
    (folder / name).write_text("{}")
    train("o", data=folder, refused=words, steps=2)


class Mischief:
    def __reduce__(self):
        return os.system, ("touch mischief-was-done",)


def test_a_file_that_is_no_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Mischief(), "settings": {}}, "code.pt")
    code = Path("code.pt").read_bytes()
    for content in (b"", b"no checkpoint", pickle.dumps({"model": 1}, 2), code):
        Path("ckpt.pt").write_bytes(content)
        command(cram, "--out", ".", "--fill", "a <mask>", refused="not a checkpoint")
        command(finetune_glue, "--task", "cola", "--ckpt", "ckpt.pt", refused="not a checkpoint")
    assert not Path("mischief-was-done").exists()


# ---------------------------------------------------------------------------- interrupted, resumed


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
    """It writes the same model again; with another budget it goes on."""
    out = shutil.copytree(finished("crammed"), train.folder / "out")
    saved, log = read_run(out)
    (out / "ckpt.pt").unlink()
    assert_same_run(train(resume=True), (saved, log))
    result = torch.load(out / "ckpt.pt", weights_only=True)["result"]
    assert untimed(result) == untimed(log[-1])
    assert result["elapsed_s"] - log[-1]["elapsed_s"] < 5  # validation and saving are not counted

    saved, log = train(resume=True, steps=60)
    assert saved["state"]["step"] == 60 and "another budget" in train.printed
    steps = [line["step"] for line in log]
    assert steps == sorted(set(steps)) and steps[-1] == 60
    saved, _ = train(resume=True, minutes=1e-4)  # six milliseconds, long spent
    assert saved["state"]["step"] == 60 and "another budget" in train.printed


def test_a_run_is_neither_overwritten_nor_resumed_with_something_else(train, data):
    train(steps=8, stop_after=3)
    train(steps=2, refused="continue it with --resume")
    for flags, words in (({"lr": 1e-4}, "--lr 0.0001 (was 0.003)"), ({"layers": 3}, "--layers 3"),
                         ({"seed": 1}, "--seed 1"),
                         ({"data": train.folder / "moved"}, "name its folder with --data")):
        train(resume=True, refused=words, **flags)
    other = shutil.copytree(data, train.folder / "other")
    (other / "meta.json").write_text(json.dumps({**meta_of(other), "train_sha256": "0" * 64}))
    train(resume=True, data=other, refused="other train_sha256")
    os.truncate(other / "train.bin", 647)
    train(resume=True, data=other, refused="damaged")
    train("x", resume=True, refused=f"no {train.folder}/x/last.pt")
    train(resume=True)
    (train.folder / "out/ckpt.pt").rename(train.folder / "out/last.pt")
    train(resume=True, refused="finished model")


@slow
def test_stopped_or_killed_at_any_moment_it_goes_on(train, data):
    """SIGTERM saves and leaves, kill -9 does not; last.pt is written after every step. Meanwhile no
    other run can use the folder: the lock ends with its process, however that ends. (Not Ctrl-C's
    signal, which is ignored where a shell started pytest with &.) The whole run, to compare with,
    outlives its screen, as behind `| head -n 1` or in a terminal that is closed."""
    flags = {**TINY, "data": data, "width": 128, "steps": 100}
    whole = launch("cram.py", "--out", train.folder / "whole", *flags_of(flags),
                   stderr=subprocess.PIPE)
    whole.stdout.readline()
    whole.stdout.close()
    out, rng, flags["save_minutes"] = train.folder / "out", random.Random(2), 1e-6
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        resume = out.exists()
        process = launch("cram.py", "--out", out, *(["--resume"] if resume else flags_of(flags)))
        try:
            wait_for_log(process, out)
            process.send_signal(signal.SIGSTOP)
            train(resume=resume, refused="another run is writing to")
            process.send_signal(signal.SIGCONT)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(number)
            printed, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == (-9 if number == signal.SIGKILL else 0)
        assert ("continue with --resume" in printed) == (number != signal.SIGKILL)
        assert (out / "last.pt").exists() and not (out / "ckpt.pt").exists()
    assert whole.stderr.read() == "" and whole.wait() == 0
    assert_same_run(train(resume=True, save_minutes=5), read_run(train.folder / "whole"))


def test_names_that_the_terminal_cannot_show(train):
    out = train.folder / "é漢"
    train("é漢", steps=2, recipe="modern", encoding="ascii")
    assert r"\xe9" in train.printed
    assert r"\xe9" in command(cram, "--out", out, "--export", out / "é", encoding="ascii")


# ---------------------------------------------------------------------------- when things go wrong


def nan_in_steps(monkeypatch, *steps):
    """Make the norm of the gradient NaN in these steps."""
    real, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: (
        real(*args) * (math.nan if next(calls) in steps else 1)))


def test_a_step_that_is_not_finite_changes_nothing(train, monkeypatch):
    """In the middle and at the end: weights and moments are those of the steps before it, and the
    run ends with its model."""
    nan_in_steps(monkeypatch, 4, 8)
    before, _ = train(steps=8, stop_after=7)
    saved, log = train(resume=True)
    for one, other in zip(before["optimizers"], saved["optimizers"]):
        assert_same([other["state"], saved["model"]], [one["state"], before["model"]])
    assert (saved["state"]["step"], saved["state"]["skipped"]) == (8, 2)
    assert (train.folder / "out/ckpt.pt").exists()
    assert all(math.isfinite(line["loss"]) for line in log)


def test_a_run_that_diverged_stops_and_keeps_its_last_checkpoint(train, monkeypatch):
    before, _ = train(steps=100, stop_after=3)
    nan_in_steps(monkeypatch, *range(100))
    train(resume=True, refused="30 steps in a row")
    assert_same_run((read_run(train.folder / "out")[0], []), (before, []))


@pytest.mark.parametrize("steps, lr, words", [
    (10, 1e39, "not finite: the run has diverged"), (2, 1e37, "validation loss is not finite")])
def test_a_model_that_is_not_finite_is_not_saved(train, steps, lr, words):
    """The first step has learning rate 0; the second makes the weights infinite, or so large that
    they give no loss."""
    train(steps=steps, lr=lr, lr_start=0, save_minutes=1e-9, refused=words)
    saved, _ = read_run(train.folder / "out")
    assert all(p.isfinite().all() for p in saved["model"].values())
    assert not (train.folder / "out/ckpt.pt").exists()


def test_the_microbatch_is_halved_until_a_step_fits(train, monkeypatch):
    """On a card; here one is played, in place of the compiler. The search moves no weight and
    leaves no momentum: the run is the one that began with that microbatch."""
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


def test_a_full_disk(train, monkeypatch):
    """Too little room is said at the start; in mid-run training continues; at the end the model is
    written before last.pt; a file is whole or not there."""
    real, saves, out = torch.save, [], train.folder / "out"

    def disk(content, f):
        saves.append(content)
        real(content, f)
        if 3 <= len(saves) < 6 or "optimizers" in content and "ckpt.pt" in os.listdir(out):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk)
    train(steps=12, save_minutes=1e-9)
    assert train.printed.count("No space left on device; the older last.pt is kept") == 4
    assert "tokenizer" in saves[-2]
    assert cram.load_checkpoint(out / "ckpt.pt") and not list(out.glob("*.part"))
    assert read_run(out)[0]["state"]["step"] == 12

    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    train("other", steps=2, refused="has 0.0 GB free")


# ------------------------------------------------------------------------------- several processes


@slow
def test_two_processes_end_where_one_ends_also_stopped_and_killed(train, data):
    """With electra, so also with Muon, whose matrices they share. Asked to stop, within a step,
    both save; killed, one takes the other with it; one alone can go on, and two after it. (They sum
    in another order, and Muon makes much of little.)"""
    flags = {**TINY, **ELECTRA, "batch": 37, "microbatch": 4, "steps": 24, "save_minutes": 1e-6}
    out = train.folder / "two"
    for number, words, args in (
            (signal.SIGTERM, "; continue with --resume", flags_of({"data": data, **flags})),
            (signal.SIGKILL, "has lost another process of the run", ["--resume"]),
            (None, "validation loss", ["--resume"])):
        two = launch("cram.py", "--out", out, *args, runner=TORCHRUN)
        try:
            if number:
                wait_for_log(two, out)
                children = Path(f"/proc/{two.pid}/task/{two.pid}/children").read_text().split()
                os.kill(int(children[-1]), number)
            printed, _ = two.communicate(timeout=120)
        finally:
            two.kill()
        assert (two.returncode == 0) == (number != signal.SIGKILL) and words in printed
        if number:
            assert not (out / "ckpt.pt").exists()
            train("two", resume=True, stop_after=1)
    assert printed.count("validation loss") == 1
    (a, a_log), (b, b_log) = train("one", **flags), read_run(out)
    for name, p in a["model"].items():
        torch.testing.assert_close(b["model"][name], p, rtol=0, atol=5e-4)
    assert a["state"]["rows"] == b["state"]["rows"] and len(a_log) == len(b_log)
    for line, other in zip(a_log, b_log):
        for key in ("loss", "val_loss"):
            assert line.get(key) == pytest.approx(other.get(key), abs=0.05)


@slow
def test_a_process_that_starts_late_validates_with_the_others(data, tmp_path):
    """Its clock is a tenth of the budget behind, so between the two a validation is always due."""
    late = tmp_path / "late.py"
    late.write_text(f"import sys, time; sys.path.insert(0, {str(HERE)!r}); import cram\n"
                    "time.sleep(0.5 * (cram.RANK == 0)); cram.main()")
    flags = {**TINY, "minutes": 5 / 60, "data": data, "out": tmp_path / "o"}
    process = subprocess.run([sys.executable, *TORCHRUN, late, *map(str, flags_of(flags))],
                             capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert all(line.get("val_loss", 0) < 8 for line in read_run(tmp_path / "o")[1])


# ------------------------------------------------------------------------------------------ export


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

    trained = {}  # the classes of transformers that take every weight, or the trunk
    for kind in ("", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"):
        theirs, report = getattr(transformers, "AutoModel" + kind).from_pretrained(
            folder, output_loading_info=True)
        trained[kind] = theirs.eval()
        lacks = {key.split(".")[0] for key in report["missing_keys"]} - {"decoder"}
        assert lacks == ({"classifier"} if "Class" in kind and recipe == "modern" else set())
    hidden = trained[""](**batch).last_hidden_state[mask]
    torch.testing.assert_close(hidden, model.encode(ids, mask)[mask], rtol=0, atol=2e-5)
    trained[""].save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again", attn_implementation="eager")
    torch.testing.assert_close(again(**batch).last_hidden_state[mask], hidden, rtol=0, atol=2e-5)
    assert (again.bfloat16()(**batch).last_hidden_state[mask] - hidden).abs().mean() < 0.05
    assert set(trained[""].config.layer_types) == {"full_attention"}  # these rows fit any window

    if recipe == "electra":
        scores = trained["ForTokenClassification"](**batch).logits.softmax(-1)[..., 1]
        torch.testing.assert_close(scores[mask], model.replaced(ids, mask)[mask])
        found = transformers.pipeline("token-classification", model=str(folder), ignore_labels=[])
        assert {entry["entity"] for entry in found(texts[1])} <= {"original", "replaced"}
        assert "what it guesses is nonsense" in (folder / "README.md").read_text()
        return
    logits = trained["ForMaskedLM"](**batch).logits[mask]
    torch.testing.assert_close(logits, model.logits(ids, mask)[mask], rtol=0, atol=2e-5)
    printed = command(cram, "--out", out, "--fill", texts[0])
    for guess in transformers.pipeline("fill-mask", model=str(folder))(texts[0]):
        assert f" {guess['score']:.1%}" in printed


def test_what_cannot_be_exported_is_said(finished, tmp_path):
    command(cram, "--out", finished("crammed"), "--export", tmp_path / "x",
            refused="only --model modernbert")
    assert not (tmp_path / "x").exists()
    command(cram, "--out", finished("modern"), "--export", finished("modern"), refused="not empty")


# --------------------------------------------------------------------------------------- on a card


def on_a_card(test):
    """Only `pytest -m cuda` runs it."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
    return pytest.mark.cuda(skip(test))


@on_a_card
@pytest.mark.parametrize("recipe, precision", [
    ("crammed", "fp16"), ("modern", "auto"), ("electra", "auto")])
def test_a_compiled_run_in_16_bits_is_the_plain_one_and_resumes(train, recipe, precision):
    """On a card, compiled and resumed, within rounding of the same steps in float32."""
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
def test_the_microbatch_is_fitted_to_the_card(train):
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


# --------------------------------------------------------------------------------- GLUE: the parts


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
    assert len(finetune_glue.build_example((a * 20, a * 30), 128)) == 128


def test_glue_learning_rate_warms_up_over_a_tenth_of_the_tasks_own_steps():
    for steps in (50, 5000):
        lr = [finetune_glue.lr_at(k, steps, 1.0) for k in range(steps)]
        assert np.argmax(lr) in (steps // 10 - 1, steps // 10) and max(lr) == 1
        assert lr[0] == pytest.approx(10 / steps) and lr[-1] < 0.01
        assert lr[steps // 10 + (steps - steps // 10) // 2] == pytest.approx(0.5, abs=0.02)


def split_of(lengths, device="cpu"):
    """Examples of so many random tokens."""
    ids = torch.randint(5, 50, (len(lengths), 128), generator=torch.Generator().manual_seed(0))
    ids *= torch.arange(128) < torch.tensor(lengths)[:, None]
    labels = torch.arange(len(lengths)) % 2
    return finetune_glue.Split(ids.int().to(device), labels.to(device),
                               (np.array(lengths) + 31) // 32 * 32)


LENGTHS = random.Random(1).choices(range(3, 100), k=30)


TINY_GLUE = argparse.Namespace(batch_size=4, lr=1e-2, scratch=False, epochs=2, dropout=0.0)


def trial_of(seed=0, device="cpu"):
    """A small model to tune on CoLA with examples of LENGTHS, four a step."""
    return finetune_glue.Trial(
        model_of(seq_len=128).float().to(device), finetune_glue.TASKS["cola"],
        split_of(LENGTHS, device), seed, torch.float32, TINY_GLUE)


def weights_after(*trials):
    """Their weights at the end."""
    finetune_glue.run_trials(trials, finetune_glue.tqdm(total=1, disable=True))
    return [list(trial.model.parameters()) for trial in trials]


def test_every_row_once_an_epoch_and_the_smallest_length_that_holds_a_batch():
    split = split_of(LENGTHS)
    (rows, T), other = (finetune_glue.epoch_batches(split, seed, TINY_GLUE) for seed in (7, 8))
    first, second = rows.reshape(2, 28)
    assert len(set(first)) == len(set(second)) == 28 and {*first, *second} <= set(range(30))
    assert first.tolist() != second.tolist() and rows.tolist() != other[0].tolist()
    for of_step, length in zip(rows, T, strict=True):
        assert length == min(n for n in (32, 64, 96, 128) if n >= max(LENGTHS[i] for i in of_step))


def test_predictions_are_in_the_order_of_the_rows_and_padding_changes_none():
    trial, split = trial_of(), split_of(LENGTHS)
    trial.task = finetune_glue.TASKS["stsb"]  # whose predictions are numbers
    predicted = trial.predict(split)
    with torch.no_grad():
        alone = [trial.model(row[None, :length], None)[0, 0]
                 for row, length in zip(split.ids, LENGTHS)]
    assert predicted == pytest.approx(np.array(alone), abs=1e-5) and predicted.std() > 1e-3


def test_a_trial_is_adamw_on_its_batches():
    """Against the plain loop: padded to each batch's longest, lr a number."""
    trial, split = trial_of(seed=5), split_of(LENGTHS)
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
    for one, other in zip(ours, reference.parameters()):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


@on_a_card
def test_replayed_graphs_are_the_steps_one_by_one():
    eager, *replayed = [trial_of(seed, device="cuda:0") for seed in (0, 0, 1)]
    eager.use_graphs = False
    (expected,), (ours, _) = weights_after(eager), weights_after(*replayed)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(ours, expected))
    moved = replayed[0].model.bert.embed.weight.cpu() - model_of(seq_len=128).float().embed.weight
    assert moved.abs().max() > 1e-2  # far more than the two may differ by


# ------------------------------------------------------------------------------- GLUE: the command


def write_glue(folder, name, train=32, validation=16, **columns):
    """A task in the columns of nyu-mll/glue whose answer can be read off its first word."""
    task, rng = finetune_glue.TASKS[name], random.Random(0)
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split in ("train", *task.validation, *task.test):
        rows = []
        for i in range(train if split == "train" else validation):
            label = i % len(task.labels) if task.labels else rng.uniform(0, 5)
            row = {c: f"{'abc'[int(label) % 3]} " * 8 + sentences(i, 1) for c in task.columns}
            rows.append({**row, "label": label, "idx": i, **columns})
            if split in task.test:
                rows[i]["label"] = -1
        (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def glue(finished, tmp_path):
    """Run finetune_glue.py in this process on what write_glue wrote: glue(flags) -> its output."""
    (tmp_path / "out").mkdir()
    shutil.copy(finished("crammed") / "ckpt.pt", tmp_path / "out")

    def run(*args, refused=None):
        return command(finetune_glue, "--ckpt", tmp_path / "out/ckpt.pt", "--device", "cpu",
                       "--data", tmp_path / "glue", *args, refused=refused)

    run.folder = tmp_path / "out"
    return run


def results_in(folder):
    """Scores of glue.json: {(task, seed): {split: score}}; each trial once."""
    results = json.loads((folder / "glue.json").read_text())
    scores = {(result["task"], result["seed"]): result["scores"] for result in results}
    assert len(scores) == len(results)
    return scores


ONE = ("--trials", 1, "--epochs", 1)


@slow
def test_all_of_glue_and_the_files_for_its_server(glue, tmp_path):
    for name in finetune_glue.EIGHT:
        write_glue(tmp_path / "glue", name, train=16, validation=5)
    glue("--task", "cola", *ONE)
    printed = glue("--task", "all", "--trials", 2, "--epochs", 1)
    assert "cola seed 0" not in printed and "cola seed 1" in printed  # only what is missing
    assert "mnli: a subset, 16 training rows, not the official 392,702" in printed
    scores = results_in(glue.folder)
    nine = [(scores[name, 0][split] + scores[name, 1][split]) / 2
            for name in finetune_glue.EIGHT for split in finetune_glue.TASKS[name].validation]
    assert len(nine) == 9 and len(scores) == 16
    assert f"\ncola             matthews {nine[-1]:6.1f} " in printed
    [average] = re.findall("^average of nine +(.*)", printed, re.M)
    assert average.split() == [f"{sum(nine) / 9:.1f}", "80.7", "subset"]  # the paper's

    glue("--task", "all", "--test", *ONE)
    assert results_in(glue.folder) == scores  # the first trials ran again, and are there once
    [folder] = glue.folder.glob("glue_test*")
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
    for more in (["--trials", 2], [*ONE, "--seed", 1], [*ONE, "--lr", 1e-3]):
        printed = glue("--task", "stsb", "--test", "--epochs", 1, *more)
    assert "average" not in printed and "cola" not in printed  # a table of its own
    assert len([*glue.folder.glob("glue_test*/STS-B.tsv")]) == 3
    assert stsb == (folder / "STS-B.tsv").read_text()


def test_without_data_the_rows_come_from_the_hub(glue, tmp_path, monkeypatch):
    import datasets

    def load_dataset(repository, task, split):
        path = write_glue(tmp_path / repository, task) / task / f"{split}.jsonl"
        return map(json.loads, path.read_text().splitlines())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = ["--task", "cola", *ONE, "--ckpt", glue.folder / "ckpt.pt", "--device", "cpu"]
    command(finetune_glue, *args)
    assert (tmp_path / "nyu-mll/glue").exists() and ("cola", 0) in results_in(glue.folder)
    monkeypatch.setattr(datasets, "load_dataset", None)
    command(finetune_glue, *args, refused="without a network, give --data")


@slow
def test_fine_tuning_learns_and_each_prediction_stands_beside_its_row(glue, tmp_path):
    write_glue(tmp_path / "glue", "mnli", train=512, validation=63)
    glue("--task", "mnli", "--trials", 1, "--lr", 3e-3, "--epochs", 10, "--test")
    assert min(results_in(glue.folder)["mnli", 0].values()) > 95
    for file in ("MNLI-m", "MNLI-mm"):
        [path] = glue.folder.glob(f"glue_test*/{file}.tsv")
        right = [f"{i}\t{('entailment', 'neutral', 'contradiction')[i % 3]}" for i in range(63)]
        assert len(set(right) & set(path.read_text().splitlines())) >= 60


def test_a_trial_is_finished_if_checkpoint_settings_and_data_agree(glue, tmp_path):
    write_glue(tmp_path / "glue", "cola")
    results, ckpt = glue.folder / "glue.json", glue.folder / "ckpt.pt"
    glue("--task", "cola", *ONE)
    data = (tmp_path / "glue").rename(tmp_path / "elsewhere")  # a path is not content
    flags = ["--task", "cola", *ONE, "--data", data]
    [result] = json.loads(results.read_text())
    assert result["torch"] == torch.__version__ and result["rows"] == 32
    results.write_text(json.dumps([{**result, "torch": "2.0", "card": "another"}]))
    before = glue(*flags)
    assert "cola: glue.json has all these trials, none is run" in before

    files = {data / f"cola/{split}.jsonl": "" for split in ("train", "validation")}
    for path in files:
        files[path] = path.read_text()
        path.write_text(files[path].replace('"label": 1', '"label": 0', 9))
        assert "cola seed 0" in glue(*flags)
    first, *others = json.loads(results.read_text())
    others = [{**result, "scores": {"validation": 99.0}} for result in others]
    results.write_text(json.dumps([first, *others]))
    for path, content in files.items():
        path.write_text(content)
    assert glue(*flags) == before  # the table has the scores of these data
    assert "cola seed 0" in glue(*flags, "--lr", 1e-3)
    content = torch.load(ckpt, weights_only=True)
    content["model"]["embed.weight"] += 1e-3
    torch.save(content, ckpt)
    printed = glue(*flags)
    assert "cola seed 0" in printed and re.search("^cola .* 1  ", printed, re.M)  # of one trial
    assert len(json.loads(results.read_text())) == 5


def test_a_score_depends_on_nothing_else_in_the_command(glue, tmp_path, monkeypatch):
    for name in ("stsb", "rte"):
        write_glue(tmp_path / "glue", name)
    scores = []
    for at_once, flags in ((1, ["--task", "stsb", "--seed", 1, "--trials", 1]),
                           (2, ["--task", "rte", "stsb", "--trials", 3])):
        monkeypatch.setattr(finetune_glue, "trials_at_once", lambda *_, n=at_once: n)
        glue(*flags, "--epochs", 2, "--lr", 1e-3, "--dropout", 0, "--out", tmp_path / str(at_once))
        scores.append(results_in(tmp_path / str(at_once)))
    assert scores[0]["stsb", 1] == scores[1]["stsb", 1] != scores[1]["stsb", 0]


@slow
def test_a_task_of_ones_own(glue, tmp_path, monkeypatch):
    """The README's example, and a byte order mark as Windows writes it."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    [entry] = re.findall(r'^ +("emotion": .*)', readme, re.M)
    own = eval("{" + entry + "}", vars(finetune_glue))
    monkeypatch.setattr(finetune_glue, "TASKS", {**own, **finetune_glue.TASKS})
    for path in (write_glue(tmp_path / "glue", "emotion", train=16) / "emotion").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    printed = glue("--task", "emotion", *ONE)
    assert re.search("^emotion .*accuracy", printed, re.M) and "subset" not in printed


def test_dropout_is_the_papers_and_none_for_modernbert(glue, finished, tmp_path):
    write_glue(tmp_path / "glue", "rte", train=16)
    for recipe, dropout, more in (("crammed", 0.1, []), ("modern", 0, []),
                                  ("modern", 0.3, ["--dropout", 0.3])):
        ckpt = finished(recipe) / "ckpt.pt"
        glue("--task", "rte", *ONE, "--ckpt", ckpt, "--out", glue.folder, *more)
        [*_, result] = json.loads((glue.folder / "glue.json").read_text())
        assert result["settings"]["dropout"] == dropout


def test_a_trial_that_diverges_says_so(glue, tmp_path):
    write_glue(tmp_path / "glue", "rte")
    write_glue(tmp_path / "glue", "stsb")
    assert glue("--task", "rte", "stsb", *ONE, "--lr", 1e30).count("diverged") == 2
    scores = results_in(glue.folder)  # of one prediction for all rows
    assert scores["rte", 0]["validation"] == 50 and scores["stsb", 0]["validation"] == 0


@pytest.mark.parametrize("scratch", [False, True])
def test_scratch_forgets_the_pretraining(glue, tmp_path, monkeypatch, scratch):
    write_glue(tmp_path / "glue", "rte", train=16)
    embeddings, real = [], finetune_glue.Trial.set_weights
    monkeypatch.setattr(finetune_glue.Trial, "set_weights", lambda self, *args: (
        real(self, *args), embeddings.append(self.model.bert.embed.weight.detach().clone())))
    glue("--task", "rte", "--trials", 2, "--epochs", 1, *["--scratch"] * scratch)
    pretrained = torch.load(glue.folder / "ckpt.pt", weights_only=True)["model"]["embed.weight"]
    assert torch.equal(embeddings[0], pretrained) != scratch
    assert torch.equal(embeddings[0], embeddings[1]) != scratch  # each trial draws its own


@pytest.mark.parametrize("task, columns, flags, words", [
    ("cola", {"label": 2}, (), "train.jsonl, row 1, needs sentence as text, a label from 0 to 1"),
    ("cola", {"label": 0.5}, (), '"label": 0.5'),
    ("stsb", {"label": -0.5}, (), "a label from 0 to 5"),
    ("cola", {"label": "1"}, (), '"label": "1"'),
    ("mrpc", {"sentence2": 3}, (), "needs sentence1 and sentence2 as text"),
    ("cola", {"idx": 0}, ("--test",), "test.jsonl, row 2, needs sentence as text, idx counting"),
    ("cola", {}, ("--batch-size", 100), "training rows: give a smaller --batch-size"),
    ("cola", {}, ("--dropout", 1), "--dropout from 0 to below 1"),
    ("rte", None, (), "train.jsonl"),
])
def test_glue_says_what_is_wrong(glue, tmp_path, task, columns, flags, words):
    if columns is not None:
        write_glue(tmp_path / "glue", task, **columns)
    glue("--task", task, *flags, refused=words)


def test_glue_needs_its_columns_its_splits_and_a_place_for_results(glue, tmp_path, monkeypatch):
    folder, args = write_glue(tmp_path / "glue", "cola") / "cola", ["--task", "cola", *ONE]
    (folder / "test.jsonl").unlink()
    glue(*args)  # needed by --test only
    monkeypatch.setattr(finetune_glue.Trial, "run_step", None)  # all below is said before a step
    glue(*args, "--test", refused="test.jsonl")
    glue(*args, "--out", glue.folder / "glue.json", refused="glue.json")  # a file
    (glue.folder / "glue.json").write_text('{"runs": 3}')
    (folder / "train.jsonl").write_text(json.dumps({"text": "x", "label": 0}))
    glue(*args, refused="glue.json is not a results file")
    (glue.folder / "glue.json").unlink()
    glue(*args, refused="needs sentence as text")
    (folder / "train.jsonl").write_text('{"sentence": ')
    glue(*args, refused="train.jsonl, after 0 rows: Expecting value")
