"""What the three scripts promise, as tests: pytest -q (three minutes on two cores, no network).

Sections: preparing data, the model, the recipe, a training run, a run that is interrupted, several
processes, export, bad input, GLUE. Everything runs on small text that is made here.
"""

import argparse
import copy
import gzip
import hashlib
import http.server
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
import types
import unicodedata
import urllib.parse
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import cram
import finetune_glue
import prepare

HERE = Path(__file__).parent
TINY = {"layers": 2, "width": 32, "heads": 4, "batch": 32, "lr": 3e-3, "device": "cpu"}


def script(name, *args, code=0, before="", **popen):
    """Run one of the scripts as a user does; `before` is Python to run first in its process."""
    command = [sys.executable, HERE / name, *map(str, args)]
    if before:
        main = f"import sys; sys.path.insert(0, {str(HERE)!r}); import {name[:-3]} as it; {before}"
        command = [sys.executable, "-c", main + "; it.main()", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **popen)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def complaint(monkeypatch, capsys):
    """What a script says to arguments that it refuses. In this process: to start one takes longer
    than all else. (test_fill_and_python_interface sees one come out of a process.)"""
    def run(module, *args):
        monkeypatch.setattr(cram.Stop, "listen", lambda self: None)
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
        with pytest.raises((cram.CramError, SystemExit)) as error:
            module.main()
        return str(error.value) + capsys.readouterr().err

    return run


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


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder: rows of 32, some 700 tokens, one document in a hundred to validate on."""
    folder = tmp_path_factory.mktemp("data")
    source = write_jsonl(folder / "text.jsonl", [sentences(i, 8 + i % 5) for i in range(400)])
    script("prepare.py", "--source", source, "--out", folder / "rows", "--vocab-size", 700,
           "--seq-len", 32)
    return folder / "rows"


@pytest.fixture
def train(data, tmp_path, monkeypatch):
    """Train in this process: train(out, flag=value, ...) -> (last.pt, lines of the log)."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(out="out", resume=False, **flags):
        flags = {**({} if resume else {"data": str(data), **TINY}), **flags,
                 "out": str(tmp_path / out)}
        cram.train(*cram.settings_for(flags, resume))
        return read_run(tmp_path / out)

    run.folder = tmp_path
    yield run
    for number, handler in handlers:
        signal.signal(number, handler)


def read_run(out):
    saved = torch.load(out / "last.pt", weights_only=True)
    return saved, [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(a, b):
    """Bit for bit the same, through dictionaries and lists of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


TIMES = ("elapsed_s", "s_per_row", "tokens_per_s", "mfu", "timed_s")


def untimed(entry):
    return {key: value for key, value in entry.items() if key not in TIMES}


def assert_same_run(one, other):
    (a, a_log), (b, b_log) = one, other
    for key in ("model", "optimizers", "order", "data"):
        assert same(a[key], b[key]), key
    assert same(untimed(a["run"]), untimed(b["run"]))
    assert same([*map(untimed, a_log)], [*map(untimed, b_log)])


# ------------------------------------------------------------------------------ preparing data


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
    assert prepare.build_normalizer().normalize_str(text) == expected


def test_normalizer_glues_nothing_and_its_short_form_agrees_on_ascii():
    whole, short = prepare.build_normalizer(), prepare.build_normalizer(ascii_only=True)
    for c in map(chr, range(0x2000)):
        result = whole.normalize_str(f"1{c}1")
        assert re.fullmatch(r"[ -@\[-~]+", result)
        assert result != "11" or unicodedata.category(c) in ("Mn", "Me", "Mc", "Cf", "Cn"), ord(c)
    rng = random.Random(0)
    for alphabet in ("aB1 \n\t'`\x00\x7f.\"-", "a1 ½²³⁻₂①™º≠´“…é\u0301\u00ad–μß漢😀ﬁ\u0338İ"):
        for _ in range(2000):
            text = "".join(rng.choices(alphabet, k=rng.randint(0, 12)))
            normal = whole.normalize_str(text)  # without a panic of the library
            assert not text.isascii() or normal == short.normalize_str(text)


def test_very_long_word_is_one_unknown_token(data):
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    ids = tokenizer.encode("a" * 101 + " " + "b" * 100).ids
    assert ids[0] == cram.UNK and cram.UNK not in ids[1:]


def test_special_tokens_come_first_and_are_not_read_from_text(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", [sentences(1, 30) + " <mask> <sep>", *(
        sentences(i, 30) for i in range(60))])
    script("prepare.py", "--source", source, "--out", tmp_path / "d", "--vocab-size", 700,
           "--seq-len", 16)
    tokenizer = Tokenizer.from_file(str(tmp_path / "d/tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in range(5)] == prepare.SPECIAL_TOKENS
    rows = np.fromfile(tmp_path / "d/train.bin", np.uint16)
    assert not (rows == cram.MASK).any() and (rows == cram.SEP).sum() <= 61


def reference_rows(texts, tokenizer, seq_len):
    """Packing, as plainly as it can be said; validation documents by their hash."""
    streams = {True: [], False: []}
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        digest = hashlib.blake2b(f"{normal} ".encode(), digest_size=8).digest()
        ids = tokenizer.encode(text, add_special_tokens=False).ids + [cram.SEP]
        to_val = max(0, seq_len - len(streams[True]))  # the first row, then one in a hundred
        if not to_val and int.from_bytes(digest, "little") % prepare.VAL_EVERY == 0:
            to_val = len(ids)
        streams[True] += ids[:to_val]
        streams[False] += ids[to_val:]
    return [[tuple(stream[i : i + seq_len]) for i in range(0, len(stream) - seq_len + 1, seq_len)]
            for stream in (streams[False], streams[True])]


def test_packing_loses_nothing_and_orders_by_full_stops(tmp_path):
    texts = [sentences(i, 3 + i % 40).replace(". ", ".\n" if i % 2 else ". ") for i in range(300)]
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    script("prepare.py", "--source", source, "--out", tmp_path / "d", "--vocab-size", 1000,
           "--seq-len", 32, before="it.BUCKET_TOKENS = 3200; it.READ_TOKENS = 2240")
    meta = json.loads((tmp_path / "d/meta.json").read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "d/tokenizer.json"))
    train = np.fromfile(tmp_path / "d/train.bin", "<u2").reshape(-1, 32)
    val = np.fromfile(tmp_path / "d/val.bin", "<u2").reshape(-1, 32)

    expected_train, expected_val = reference_rows(texts, tokenizer, 32)
    assert Counter(map(tuple, train.tolist())) == Counter(expected_train)
    assert [*map(tuple, val.tolist())] == expected_val  # not sorted
    assert meta["train_rows"] == len(train) and meta["val_rows"] == len(val)
    assert meta["documents_kept"] == meta["documents_read"] == 300

    dots = (train == tokenizer.token_to_id(".")).sum(1)
    assert (np.diff(dots.astype(int)) <= 0).all() and dots[0] > dots[-1]
    place = {row: i for i, row in enumerate(expected_train)}
    ties = [place[tuple(row)] for row in train[dots == np.bincount(dots).argmax()].tolist()]
    steps = np.diff(ties)  # rows with the same count are mixed, not in the order of the source
    assert 0.3 < (steps > 0).mean() < 0.7
    assert abs(np.corrcoef(ties, range(len(ties)))[0, 1]) < 0.2  # also across piles

    p = np.unique(train, return_counts=True)[1] / train.size
    assert meta["unigram_entropy"] == pytest.approx(-(p * np.log(p)).sum())

    text = tokenizer.decode([t for row in expected_train for t in row if t != cram.SEP])
    words = set(text.replace(" ##", "").split())
    assert words <= set(" ".join(texts).replace(".", " .").split()) | set(text.split()[-1:])


def test_counts_of_what_is_dropped(tmp_path):
    rng = random.Random(0)
    noise = ["".join(rng.choices("!#$%&*+,-./:;<=>?@^_~0123456789", k=300)) for _ in range(7)]
    good = [sentences(i, 30) for i in range(50)]
    rows = [{"text": t} for t in [*good, *noise, "", " \n ", "漢字", good[3], good[3].upper()]]
    rows += [{"text": None}, {"text": 5}, {"no": "text"}, [1],
             {"text": "x\ud800y"}]
    lines = [json.dumps(row) for row in rows] + ["{not json", "[" * 100_000]
    (tmp_path / "t.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    printed = script("prepare.py", "--source", tmp_path / "t.jsonl", "--out", tmp_path / "d",
                     "--vocab-size", 700, "--seq-len", 32)
    assert "With a small --vocab-size" in printed  # a tenth was too dense
    meta = json.loads((tmp_path / "d/meta.json").read_text())
    assert meta["documents_read"] == len(rows) + 3
    assert meta["invalid"] == 7  # null, number, no column, list, not JSON, too deep, not UTF-8
    assert meta["empty"] == 3
    assert meta["dropped_duplicate"] == 2
    assert meta["dropped_density"] in (7, 8)  # the noise, and perhaps the short "xy"
    assert meta["documents_kept"] + sum(meta[key] for key in (
        "empty", "invalid", "dropped_duplicate", "dropped_density")) == meta["documents_read"]


def test_dense_is_tokens_against_characters_with_the_spaces_between_lines(tmp_path):
    texts = [sentences(i, 8).replace(". ", ".\n") for i in range(60)]
    args = ["--source", write_jsonl(tmp_path / "t.jsonl", texts), "--vocab-size", 700,
            "--seq-len", 16, "--out"]
    script("prepare.py", *args, tmp_path / "all")
    tokenizer = Tokenizer.from_file(str(tmp_path / "all/tokenizer.json"))
    dense = sorted(len(tokenizer.encode(t).ids) / len(tokenizer.normalizer.normalize_str(t))
                   for t in texts)
    assert dense[-1] < 0.3 and dense[29] < dense[30]
    limit = float(dense[29] + dense[30]) / 2
    script("prepare.py", *args, tmp_path / "half", before=f"it.MAX_DENSITY = {limit}")
    assert json.loads((tmp_path / "half/meta.json").read_text())["dropped_density"] == 30


def test_tokens_end_it_at_the_end_of_a_chunk_also_when_started_again(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", [sentences(i, 2) for i in range(4100)])
    args = ["--source", source, "--vocab-size", 700, "--seq-len", 16, "--tokens", 1000, "--out"]
    script("prepare.py", *args, tmp_path / "once")
    assert json.loads((tmp_path / "once/meta.json").read_text())["documents_read"] == 2000
    script("prepare.py", *args, tmp_path / "again", code=1,
           before="it.order_rows = lambda *a: sys.exit('stopped')")
    script("prepare.py", *args, tmp_path / "again")
    assert files_of(tmp_path / "once") == files_of(tmp_path / "again")


def test_what_validation_does_not_need_is_not_trained_on(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", [sentences(i, 30) for i in range(60)])
    metas = []
    for rows in (16384, 1):
        script("prepare.py", "--source", source, "--vocab-size", 700, "--seq-len", 32, "--out",
               tmp_path / str(rows), before=f"it.VAL_EVERY = 2; it.VAL_MAX_ROWS = {rows}")
        metas.append(json.loads((tmp_path / str(rows) / "meta.json").read_text()))
    assert metas[0]["train_sha256"] == metas[1]["train_sha256"]
    assert metas[0]["val_rows"] > metas[1]["val_rows"] == 1


def test_tokenizer_sees_a_share_of_every_file(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name * 9}\n" * 1000)
    monkeypatch.setattr(prepare, "PIECE", 500)
    seen = "".join(prepare.Source(str(tmp_path), tmp_path / "out").sample(4000))
    assert 1500 < seen.count("a") < 2500 and 1500 < seen.count("b") < 2500


def test_duplicates_are_forgotten_only_when_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "DUPLICATE_SLOTS", 8)
    table = prepare.DuplicateTable(tmp_path / "h", 0)
    assert not table.add(3) and table.add(3)
    assert not table.add(11) and not table.add(3)  # same slot
    assert not table.add(4)
    table.log.flush()
    again = prepare.DuplicateTable(tmp_path / "h", 2)  # only 3 and 11 are on record
    assert again.add(11) and not again.add(4)


def test_a_folder_is_read_and_what_is_not_read_is_said(tmp_path, capsys):
    """Other data beside the text, text in --out itself, a linked folder."""
    out = tmp_path / "data"
    for path in ("b.txt", "meta.json", "texts/A.JSONL", "texts/c.csv", "tokenizer.json",
                 "d.txt.zst", "work/progress.json", "work/deep/x.txt"):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text("text")
    (out / "linked").symlink_to(tmp_path, target_is_directory=True)
    assert prepare.local_files(str(out), out) == [str(out / "b.txt"), str(out / "texts/A.JSONL")]
    printed = capsys.readouterr().out
    assert "1 .jsonl, 1 .txt; not read: 1 .csv, 1 .zst, 1 linked folders" in printed


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import datasets

    texts = [sentences(i, 30) for i in range(40)]
    rows = [{"text": t} for t in texts]
    write_jsonl(tmp_path / "a.jsonl", texts)
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as f:
        f.write((tmp_path / "a.jsonl").read_text())
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"txt/{i:03}.txt").write_text(text)
    folder = tmp_path / "parquet"  # other columns differ, some files have no rows or are no good
    folder.mkdir()
    for name, some, extra in (("a[1]", rows[:20], 1), ("b", rows[:0], 1), ("c", rows[20:30], "x"),
                              ("d", rows[30:], None)):
        datasets.Dataset.from_list([{"id": extra, **row} for row in some] or [{"text": "", "id": 1}]
                                   ).select(range(len(some))).to_parquet(folder / f"{name}.parquet")
    datasets.Dataset.from_list([{"body": "x"}]).to_parquet(folder / "e.parquet")
    (folder / "f.parquet").write_bytes((folder / "d.parquet").read_bytes()[:300])
    (folder / "mixed.jsonl").write_text("")

    hashes = set()
    for source in ("a.jsonl", "a.jsonl.xz", "a.json", "b.json.gz", "parquet", "txt"):
        out = tmp_path / ("out-" + source)
        printed = script("prepare.py", "--source", tmp_path / source, "--out", out,
                         "--vocab-size", 700, "--seq-len", 32)
        hashes.add(json.loads((out / "meta.json").read_text())["train_sha256"])
        assert not (out / "work").exists()
        assert source != "parquet" or ("e.parquet" in printed and "f.parquet" in printed)
    assert len(hashes) == 1


def test_long_text_file_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 1000)
    text = "\n".join(sentences(i, 3) + " ’" for i in range(200))
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    parts = [part for part, _ in prepare.read_file(str(tmp_path / "t.txt"))]
    assert "".join(parts) == text and len(parts) > 10
    assert all(part.endswith("\n") for part in parts[:-1])
    (tmp_path / "line.txt").write_bytes("word’".encode() * 400 + b"caf\xe9 \xff" + b"word" * 9)
    *parts, (none, reason) = prepare.read_file(str(tmp_path / "line.txt"))
    assert "".join(part for part, _ in parts) == "word’" * 400 + "caf\ufffd \ufffd" + "word" * 9
    assert none is None and "2 bytes that are not UTF-8" in reason
    cut = [*prepare.pieces("word " * 500)]
    assert "".join(cut) == "word " * 500 and len(cut) == 3 and max(map(len, cut)) <= 1000
    assert not any(part[-1:] in "wor" and part[-4:] != "word" for part in cut)  # at spaces only


class Hub(http.server.ThreadingHTTPServer):
    """The Hugging Face hub as far as its client asks it, with files {repository: {path: bytes}}.

    `fault(path, first_byte)` may give a status to fail with, "cut" to close the connection in the
    middle of the answer, or None.
    """

    daemon_threads = True

    def __init__(self, repositories, home):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.repositories, self.sha, self.asked = repositories, "a" * 40, []
        self.fault = lambda path, first_byte: None
        self.env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
                    "HF_HOME": str(home), "no_proxy": "127.0.0.1"}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *args):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # of a client that was killed
            super().handle_error(*args)


class HubRequest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if not self.cut else body[: len(body) // 2])
        self.close_connection = self.close_connection or self.cut

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        first, _, last = self.headers.get("Range", "bytes=0-")[6:].partition("-")
        first = int(first)
        fault = self.server.fault(path, first)
        self.cut = fault == "cut"
        self.server.asked.append((self.command, path, first))
        found = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)"
                             r"(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path)
        sha = found[3] if found and found[3] and len(found[3]) == 40 else self.server.sha
        files = self.server.repositories.get(found and found[1])
        if isinstance(fault, int):
            self.reply(fault)
        elif files is None:
            self.reply(404, X_Error_Code="RepoNotFound")
        elif found[2] in (None, "revision"):
            self.reply(200, json.dumps({
                "id": found[1], "sha": sha, "tags": [], "private": False, "gated": False,
                "lastModified": "2024-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": name} for name in files]}).encode())
        elif found[2] == "tree":
            under = f"{found[4]}/" if found[4] else ""
            inside = {name[len(under):].partition("/")[:2] for name in files
                      if name.startswith(under)}
            entries = [{"type": "directory" if folder else "file", "oid": "b" * 40,
                        "path": under + name, "size": len(files.get(under + name, b""))}
                       for name, folder in sorted(inside)]
            self.reply(200 if inside else 404, json.dumps(entries).encode(),
                       X_Error_Code="EntryNotFound")
        elif found[4] not in files:
            self.reply(404, X_Error_Code="EntryNotFound")
        else:
            body = files[found[4]]
            part = body[first : int(last) + 1 if last else None]
            self.reply(206 if "Range" in self.headers else 200, part, X_Repo_Commit=sha,
                       ETag=f'"{hash(body)}"',
                       Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(body)}")

    do_HEAD = do_GET


def hub_c4(texts, shards, home):
    """C4 as it lies on the hub: gzipped lines in en/, and a README that says which."""
    lines = [json.dumps({"text": text, "timestamp": "2019", "url": f"http://{i}"}) + "\n"
             for i, text in enumerate(texts)]
    size = -(-len(lines) // shards)
    files = {f"en/c4-train.{i:05}-of-{shards:05}.json.gz":
             gzip.compress("".join(lines[i * size : (i + 1) * size]).encode(), mtime=0)
             for i in range(shards)}
    files["en/c4-validation.00000-of-00001.json.gz"] = gzip.compress(b"")
    files["README.md"] = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""
    return Hub({"allenai/c4": files}, home)


IMPATIENT = "import time; sleep = time.sleep; time.sleep = lambda s: sleep(min(s, 0.001))"
TEXTS = [sentences(i, 30) for i in range(400)]
FROM_HUB = ["--vocab-size", 700, "--seq-len", 32]


def is_shard(path, number):
    return path.endswith(f"{number:05}-of-00003.json.gz")


def test_the_default_command_reads_c4_and_survives_an_unreliable_network(tmp_path):
    hub = hub_c4(TEXTS, 3, tmp_path / "home")
    script("prepare.py", *FROM_HUB, "--out", tmp_path / "hub", env=hub.env)
    script("prepare.py", *FROM_HUB, "--out", tmp_path / "local", "--source",
           write_jsonl(tmp_path / "t.jsonl", TEXTS))
    one, other = (files_of(tmp_path / name) for name in ("hub", "local"))
    assert all(one[name] == other[name] for name in ("train.bin", "val.bin", "tokenizer.json"))
    meta = json.loads((tmp_path / "hub/meta.json").read_text())
    assert meta["documents_read"] == 400 and meta["revision"] == hub.sha

    failures = [500, "cut", 429, 503] * 20  # longer than the client itself tries again
    hub.fault = lambda path, first: failures.pop() if is_shard(path, 1) and failures else None
    printed = script("prepare.py", *FROM_HUB, "--out", tmp_path / "faults", env=hub.env,
                     before=IMPATIENT)
    assert not failures and "does not answer" in printed
    assert files_of(tmp_path / "faults") == one


def test_an_outage_ends_the_run_which_goes_on_at_the_same_revision(tmp_path):
    hub = hub_c4(TEXTS, 3, tmp_path / "home")
    script("prepare.py", *FROM_HUB, "--out", tmp_path / "once", env=hub.env)
    old, asked = hub.sha, []
    passes = itertools.count()  # the tokenizer's, then that of packing
    hub.fault = lambda path, first: 500 if is_shard(path, 2) and next(passes) else None
    args = [*FROM_HUB, "--out", tmp_path / "d"]
    printed = script("prepare.py", *args, env=hub.env, code=1,
                     before=IMPATIENT + "; it.OUTAGE_SECONDS = 0.1; it.SAVE_SECONDS = 0")
    assert "Start the same command again" in printed and "Traceback" not in printed
    hub.fault = lambda path, first: 500
    printed = script("prepare.py", *args, env=hub.env, code=1,
                     before=IMPATIENT + "; it.OUTAGE_SECONDS = 0.1")  # not even its list of files
    assert "Start the same command again" in printed and "python-docs" not in printed

    hub.sha, hub.fault = "d" * 40, lambda path, first: asked.append(path)
    script("prepare.py", *args, env=hub.env)
    assert any(old in path for path in asked) and not any(hub.sha in path for path in asked)
    assert files_of(tmp_path / "d") == files_of(tmp_path / "once")


def test_killed_in_the_middle_of_a_shard_it_says_that_it_reads_it_again(tmp_path):
    hub = hub_c4([sentences(i, 40) for i in range(1500)], 3, tmp_path / "home")
    args = [*FROM_HUB, "--out"]
    script("prepare.py", *args, tmp_path / "once", env=hub.env)
    kill = ("import os; save = it.Packer.save; it.SAVE_SECONDS = 0; it.Packer.save = lambda self: "
            "(save(self), self.counts['documents_read'] > 700 and os.kill(os.getpid(), 9))")
    script("prepare.py", *args, tmp_path / "killed", env=hub.env, before=kill, code=-9)
    printed = script("prepare.py", *args, tmp_path / "killed", env=hub.env)
    assert "again from its start, up to document" in printed
    assert files_of(tmp_path / "once") == files_of(tmp_path / "killed")


def test_a_damaged_shard_is_named_and_its_rest_skipped(tmp_path):
    hub = hub_c4(TEXTS, 3, tmp_path / "home")
    files = hub.repositories["allenai/c4"]
    name = "en/c4-train.00001-of-00003.json.gz"
    files[name] = files[name][: len(files[name]) // 2] + bytes(1000)
    printed = script("prepare.py", *FROM_HUB, "--out", tmp_path / "d", env=hub.env)
    assert f"skipped: hf://datasets/allenai/c4@{hub.sha}/{name}: the file is damaged" in printed
    meta = json.loads((tmp_path / "d/meta.json").read_text())
    assert meta["invalid"] == 1 and 300 < meta["documents_kept"] < 399
    shards = [path for _, path, _ in hub.asked if is_shard(path, 1)]
    assert len(shards) == 2  # once for the tokenizer, once to pack


def test_without_a_network_the_first_command_says_what_works(tmp_path):
    hub = hub_c4(TEXTS, 3, tmp_path / "home")
    hub.shutdown()
    hub.server_close()
    printed = script("prepare.py", "--out", tmp_path / "d", env=hub.env, code=1, before=IMPATIENT)
    assert "--source python-docs" in printed and not (tmp_path / "d").exists()


def test_fine_tuning_reads_cola_from_the_hub(data, tmp_path):
    import datasets

    script("cram.py", "--data", data, "--out", tmp_path / "out", "--steps", 1, "--no-compile",
           *(word for name, value in TINY.items() for word in (f"--{name}", value)))
    files = {"README.md": b"---\nconfigs:\n- config_name: cola\n  data_files:\n" + b"".join(
        f"  - split: {split}\n    path: cola/{split}-*\n".encode()
        for split in ("train", "validation", "test")) + b"---\n"}
    for split, n in (("train", 64), ("validation", 16), ("test", 16)):
        rows = {"sentence": [sentences(i, 1) for i in range(n)],
                "label": [i % 2 if split != "test" else -1 for i in range(n)], "idx": [*range(n)]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
        files[f"cola/{split}-00000-of-00001.parquet"] = (tmp_path / "x.parquet").read_bytes()
    hub = Hub({"nyu-mll/glue": files}, tmp_path / "home")
    script("finetune_glue.py", "--task", "cola", "--ckpt", tmp_path / "out/ckpt.pt", "--trials", 1,
           "--epochs", 1, env=hub.env)
    assert "cola" in (tmp_path / "out/glue.json").read_text()


@pytest.fixture(scope="session")
def larger_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("larger")
    texts = [sentences(i, 20 + i % 60) for i in range(4000)]
    return write_jsonl(folder / "t.jsonl", texts + texts[::2])  # the last third repeats


def files_of(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()}


def test_killed_and_restarted_gives_the_same_bytes_on_one_core_as_on_two(larger_text, tmp_path):
    args = ["--source", larger_text, "--vocab-size", 3000]
    script("prepare.py", *args, "--out", tmp_path / "once",
           before="import os; os.sched_setaffinity(0, {0})"
           if hasattr(os, "sched_setaffinity") else "")
    main = f"import sys; sys.path.insert(0, {str(HERE)!r}); import prepare as it; "
    command = [sys.executable, "-c", main + "it.SAVE_SECONDS = 0.05; it.main()", *map(str, args),
               "--out", str(tmp_path / "killed")]
    progress, read = tmp_path / "killed/work/progress.json", [0]
    for target in (1, 1200, 2500, 4100, 10**9):  # documents read when the process is killed
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and read[-1] < target:
            time.sleep(0.01)
            if progress.exists():
                read.append(json.loads(progress.read_text())["cursor"]["documents"])
        process.kill()
        process.communicate(timeout=60)  # until the workers have ended too, which hold its stderr
    assert process.returncode == 0 and len({*read}) > 4
    assert json.loads((tmp_path / "once/meta.json").read_text())["dropped_duplicate"] == 2000
    assert files_of(tmp_path / "once") == files_of(tmp_path / "killed")  # meta.json's counts too


def test_stopped_between_any_two_files_of_the_end_it_goes_on(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", [sentences(i, 60) for i in range(3)])
    args = ["--source", source, "--vocab-size", 700, "--seq-len", 32, "--out"]
    script("prepare.py", *args, tmp_path / "once")
    for n in range(1, 20):
        stop = (f"import os, shutil, itertools; calls = itertools.count(1); "
                f"at = lambda real: lambda *a, **k: real(*a, **k) if next(calls) < {n} else "
                f"sys.exit('stopped'); os.replace = at(os.replace); "
                f"shutil.rmtree = at(shutil.rmtree)")
        out = tmp_path / str(n)
        try:
            script("prepare.py", *args, out, before=stop, code=1)
        except AssertionError:
            break  # the run was over before
        script("prepare.py", *args, out)
        assert files_of(out) == files_of(tmp_path / "once")
    assert n > 7


@pytest.mark.parametrize("documents", [1, 2, 3, 20])
def test_the_smallest_corpus_has_both_splits(tmp_path, documents):
    """The first tokens are one row to validate on, the rest of them is trained on."""
    texts = [sentences(i, 60 // documents + 1) for i in range(documents)]
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"texts/{i:02}.txt").write_text(text)
    script("prepare.py", "--source", tmp_path / "texts", "--out", tmp_path / "d", "--vocab-size",
           700, "--seq-len", 32)
    tokenizer = Tokenizer.from_file(str(tmp_path / "d/tokenizer.json"))
    expected_train, expected_val = reference_rows(texts, tokenizer, 32)
    train = np.fromfile(tmp_path / "d/train.bin", "<u2").reshape(-1, 32)
    assert [*map(tuple, np.fromfile(tmp_path / "d/val.bin", "<u2").reshape(-1, 32).tolist())] == (
        expected_val)
    assert Counter(map(tuple, train.tolist())) == Counter(expected_train) and len(train)


def test_two_on_one_folder_the_second_is_refused_while_the_first_lives(tmp_path):
    name = os.fsdecode(b"caf\xe9.jsonl")  # a name that is not UTF-8: meta.json must not hold it
    source = write_jsonl(tmp_path / name, [sentences(i, 60) for i in range(30)])
    args = ["--source", source, "--out", tmp_path / "d", "--vocab-size", 700, "--seq-len", 32]
    first = subprocess.Popen([sys.executable, HERE / "prepare.py", *map(str, args)])
    while not (tmp_path / "d/work/arguments.json").exists():
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    assert "another prepare.py is writing" in script("prepare.py", *args, code=1)
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=60) == 0 and not (tmp_path / "d/work").exists()
    (tmp_path / "d/meta.json").read_text().encode()
    assert "caf\\xe9" in json.loads((tmp_path / "d/meta.json").read_text())["source"]


def test_a_run_whose_output_nobody_reads_ends_and_goes_on(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", [sentences(i, 60) for i in range(30)])
    args = ["--source", source, "--out", tmp_path / "d", "--vocab-size", 700, "--seq-len", 32]
    process = subprocess.Popen([sys.executable, HERE / "prepare.py", *map(str, args)],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()  # as `2>&1 | head -1` does, in the middle of a progress bar
    assert process.wait(timeout=60) == 1
    script("prepare.py", *args)
    assert (tmp_path / "d/meta.json").exists()


def test_prepare_starts_over_only_when_told(tmp_path, data):
    source = data.parent / "text.jsonl"
    again = ["--source", source, "--out", data, "--vocab-size", 700, "--seq-len"]
    assert "complete already" in script("prepare.py", *again, 32)
    assert "other seq_len" in script("prepare.py", *again, 64, code=1)


# ------------------------------------------------------------------------------ the model


def model_of(kind="crammed", vocab=50, seq_len=16, layers=2):
    torch.manual_seed(1)
    s = cram.Settings(model=kind, layers=layers, width=32, heads=4)
    model = cram.CrammedBERT(s, vocab, seq_len)
    for p in model.parameters():  # norms and scale away from 1 and 0, which would hide mistakes
        p.data = p.data + 0.1 * torch.randn_like(p)
    return model.double()


def test_parameters_at_the_papers_size():
    with torch.device("meta"):
        model = cram.CrammedBERT(cram.Settings(), 32_768, 128)
    assert sum(p.numel() for p in model.parameters()) == 119_589_889
    assert round(cram.flops_per_token(model, cram.Settings(), 128) / 1e6) == 623


def reference_encode(w, ids, heads, keep):
    """The crammed BERT for one row, with loops and plain formulas, in float64."""
    def norm(x, name):
        mean, var = x.mean(), ((x - x.mean()) ** 2).mean()
        return (x - mean) / np.sqrt(var + 1e-12) * w[name + ".weight"] + w[name + ".bias"]

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    T, C = len(ids), w["embed.weight"].shape[1]
    D, layers = C // heads, 1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks"))
    x = np.zeros((T, C))
    for t in range(T):
        for c in range(C):
            angle = t / 10_000 ** (c // 2 * 2 / C)
            x[t, c] = w["embed.weight"][ids[t], c] + w["position_scale"] * (
                math.sin(angle) if c % 2 == 0 else math.cos(angle))
        x[t] = norm(x[t], "embed_norm")
    for layer in range(layers):
        b = f"blocks.{layer}."
        q, k, v = (np.stack([w[f"{b}attention.{name}.weight"] @ norm(x[t], b + "norm1")
                             for t in range(T)]) for name in "qkv")
        mixed = np.zeros((T, C))
        for h in range(heads):
            part = slice(h * D, h * D + D)
            for t in range(T):
                scores = [math.exp(q[t, part] @ k[u, part] / math.sqrt(D)) * keep[u]
                          for u in range(T)]
                for u in range(T):
                    mixed[t, part] += scores[u] / sum(scores) * v[u, part]
        for t in range(T):
            x[t] += w[b + "attention.out.weight"] @ mixed[t]
            y = norm(x[t], b + "norm2")
            gated = (w[b + "ffn.up.weight"] @ y) * gelu(w[b + "ffn.gate.weight"] @ y)
            x[t] += w[b + "ffn.down.weight"] @ gated
    return np.stack([norm(x[t], "final_norm") for t in range(T)])


def test_forward_is_what_the_paper_says():
    model = model_of()
    ids = torch.randint(50, (3, 16))
    keep = torch.ones(3, 16, dtype=torch.bool)
    keep[1, 10:] = keep[2, 5:] = False
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    hidden = np.stack([reference_encode(weights, row, 4, k)
                       for row, k in zip(ids.numpy(), keep.numpy())])
    close = {"rtol": 1e-5, "atol": 1e-5}  # the table of positions is stored in float32
    np.testing.assert_allclose(model.encode(ids, keep).detach(), hidden, **close)

    logits = hidden @ weights["embed.weight"].T
    np.testing.assert_allclose(model.logits(ids, keep).detach(), logits, **close)

    hidden = reference_encode(weights, ids[0].numpy(), 4, np.ones(16))
    scores = hidden[[3, 9]] @ weights["embed.weight"].T
    surprise = [math.log(np.exp(row).sum()) - row[t] for row, t in zip(scores, (7, 8))]
    loss = model(ids[:1], torch.tensor([[3, 9]]), torch.tensor([[7, 8]]))
    assert loss.item() == pytest.approx(np.mean(surprise), abs=1e-5)


BOTH = pytest.mark.parametrize("kind", ["crammed", "modernbert"])


@BOTH
def test_the_last_block_may_look_at_the_masked_positions_only(kind):
    model, ids = model_of(kind), torch.randint(50, (3, 16))
    positions = torch.tensor([[3, 9], [0, 15], [7, 2]])
    some = model.encode(ids, positions=positions)
    torch.testing.assert_close(some, torch.stack([
        row[at] for row, at in zip(model.encode(ids), positions)]))


def test_rotary_attention_knows_distances_and_no_positions():
    table = cram.rotary(16, 8).double()
    q, k = torch.randn(2, 1, 1, 16, 8, dtype=torch.double)
    q, k = q[:, :, :1].expand(q.shape), k[:, :, :1].expand(k.shape)  # one vector everywhere
    scores = (cram.rotate(q, table) @ cram.rotate(k, table).mT)[0, 0]
    for distance in range(-15, 16):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand(len(along)), rtol=1e-5, atol=1e-5)
    assert scores[0].std() > 0.1
    assert table[:, 1, 0].tolist() == pytest.approx([math.cos(1), math.sin(1)])
    assert table[:, 1, 3].tolist() == pytest.approx([math.cos(1e-3), math.sin(1e-3)])  # 10,000^-3/4


@BOTH
def test_padding_changes_nothing(kind):
    model = model_of(kind).eval()
    ids = torch.randint(50, (1, 9))
    padded = torch.cat([ids, torch.randint(50, (1, 7))], 1)
    keep = torch.arange(16)[None] < 9
    torch.testing.assert_close(model.encode(padded, keep)[:, :9], model.encode(ids))


@BOTH
def test_dropout_only_in_fine_tuning(kind):
    """After the embedding, in attention, after attention and FFN, before the last layer."""
    ids = torch.randint(50, (2, 16))
    plain = model_of(kind).train()
    assert torch.equal(plain.encode(ids), plain.encode(ids))
    tuned = finetune_glue.Classifier(copy.deepcopy(plain), 2, dropout=0.3).double().train()
    places, calls = [m for m in tuned.modules() if isinstance(m, torch.nn.Dropout)], []
    assert [place.p for place in places] == [0.3] * (1 + 2 * 2 + 1)  # two blocks
    for place in places:
        place.register_forward_hook(lambda *_: calls.append(1))
    tuned(ids, None)
    assert len(calls) == 1 + 2 * 2 + 1  # a block's is called twice, attention's by its kernel
    for place in places:
        for other in places:
            other.p = 0.3 * (other is place)
        assert not torch.equal(tuned(ids, None), tuned(ids, None))
    torch.testing.assert_close(tuned.eval().bert.encode(ids), plain.encode(ids))


@BOTH
def test_initial_weights(kind):
    model = cram.CrammedBERT(cram.Settings(model=kind, layers=2, width=128, heads=4), 1000, 128)
    for name, p in model.named_parameters():
        if kind == "modernbert" and name.endswith(("attention.out.weight", "ffn.down.weight")):
            assert (p == 0).all(), name
        elif p.ndim == 2:
            assert abs(p.std().item() - 0.02) < 0.001 and abs(p.mean().item()) < 0.001, name
        else:
            value = 128**-0.5 if name == "position_scale" else float(name.endswith("weight"))
            assert (p == value).all(), name


# ------------------------------------------------------------------------------ the recipe


def test_defaults_are_the_papers():
    s = cram.Settings()
    assert (s.hours, s.layers, s.width, s.heads) == (24, 16, 768, 12)
    assert (s.lr, s.beta1, s.beta2, s.eps) == (1e-3, 0.9, 0.98, 1e-12)
    assert (s.weight_decay, s.clip, s.batch, s.mask_rate) == (0.01, 0.5, 8192, 0.25)
    assert (finetune_glue.MAX_LENGTH, len(finetune_glue.TASKS)) == (128, 8)


@pytest.mark.parametrize("f, share", [(0, 0.25), (0.5, 0.75), (0.75, 1), (0.875, 0.5), (1, 0),
                                      (2, 0)])
def test_learning_rate(f, share):
    assert cram.lr_at(f, cram.Settings()) == pytest.approx(1e-3 * share)


@pytest.mark.parametrize("f, share", [(0, 0), (0.015, 0.5), (0.03, 1), (0.3, 1), (0.65, 0.5),
                                      (1, 0), (2, 0)])
def test_learning_rate_of_the_modern_recipe(f, share):
    s = cram.Settings(**cram.RECIPES["modern"])
    assert cram.lr_at(f, s) == pytest.approx(2e-3 * share)
    assert cram.lr_at(f, cram.Settings(warmup=0, decay=0, lr=1)) == 1


def test_batch_staircase():
    s = cram.Settings
    assert [cram.batch_at(f, s()) for f in (0, 0.0374, 0.0376, 0.3, 0.5624, 0.5626, 1)] == [
        512, 512, 1024, 4608, 7680, 8192, 8192]
    assert [cram.batch_at(f, s(batch=32)) for f in (0, 0.0376, 1)] == [2, 4, 32]
    assert cram.batch_at(0, s(batch=1)) == cram.batch_at(1, s(batch=1)) == 1
    assert cram.batch_at(0, s(batch=32, ramp=0)) == 32


def test_weight_decay_spares_the_norms():
    model = cram.CrammedBERT(cram.Settings(layers=1, width=8, heads=1), 20, 8)
    [adamw] = cram.build_optimizers(model, cram.Settings(), cram.Team(torch.device("cpu")))
    with_decay, without = adamw.param_groups
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.01, 0)
    assert len(without["params"]) == 8 and {p.ndim for p in without["params"]} == {1}
    assert len(with_decay["params"]) == 9  # embedding, position scale, seven matrices


def test_muon_is_torchs_muon_for_the_matrices_of_blocks_and_head():
    s = cram.Settings(model="modernbert", optimizer="muon", lr=2e-3, weight_decay=5.0,
                      layers=2, width=32, heads=2)
    model = cram.CrammedBERT(s, 50, 16)
    adamw, ours = cram.build_optimizers(model, s, cram.Team(torch.device("cpu")))
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not model.embed.weight]
    assert {p for g in ours.param_groups for p in g["params"]} == set(matrices)
    everything = [p for o in (adamw, ours) for g in o.param_groups for p in g["params"]]
    assert len(everything) == len(set(everything)) == len([*model.parameters()])
    starts = [p.detach().clone() for p in matrices]
    copies = [torch.nn.Parameter(p.clone()) for p in starts]
    theirs = torch.optim.Muon(copies, lr=s.lr, weight_decay=s.weight_decay,
                              adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, copy in zip(matrices, copies):
            p.grad = torch.randn_like(p)
            copy.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, copy, start in zip(matrices, copies, starts):  # theirs computes in bf16
        assert (p - copy).norm() < 0.03 * (copy - start).norm()


def test_masks_are_exact_and_never_the_same():
    rows = torch.randint(5, 1000, (64, 128))
    seen = set()
    for seed in range(3):
        inputs, positions, targets = cram.mask_tokens(
            rows, 0.25, 0.8, 1000, torch.Generator().manual_seed(seed))
        assert positions.shape == (64, 32)
        assert all(len(set(p)) == 32 for p in positions.tolist())
        assert torch.equal(targets, rows.gather(1, positions))
        at = inputs.gather(1, positions)
        assert (at[:, :26] == cram.MASK).all()
        assert (at[:, 29:] == targets[:, 29:]).all()  # 3 stay
        assert (at[:, 26:29] != targets[:, 26:29]).float().mean() > 0.95  # 3 are random
        untouched = torch.ones_like(rows, dtype=torch.bool).scatter(1, positions, False)
        assert torch.equal(inputs[untouched], rows[untouched])
        seen |= {tuple(sorted(p)) for p in positions.tolist()}
        everywhere = torch.bincount(positions.flatten(), minlength=128)
        assert everywhere.min() > 0 and everywhere.max() < 40
    assert len(seen) == 3 * 64


def test_every_chosen_token_can_become_a_mask():
    inputs, positions, _ = cram.mask_tokens(
        torch.full((4, 128), 7), 0.25, 1.0, 1000, torch.Generator())
    assert ((inputs == cram.MASK).sum(1) == 32).all() and ((inputs == 7).sum(1) == 96).all()


def test_masks_depend_on_the_seed_and_the_step():
    rows = torch.zeros(4, 128, dtype=torch.long)
    draws = {tuple(cram.mask_tokens(rows, 0.25, 0.8, 9, torch.Generator().manual_seed(
        cram.mask_seed(seed, step)))[1].flatten().tolist()) for seed in (0, 1) for step in (0, 1)}
    assert len(draws) == 4


def test_row_order():
    order = cram.RowOrder(10, cram.Settings())
    assert order.rows_at(0, 10).tolist() == [*range(10)]
    passes = [order.rows_at(10 * n, 10).tolist() for n in (1, 2, 3)]
    assert all(sorted(p) == [*range(10)] for p in passes) and len({*map(tuple, passes)}) == 3
    pieces = np.concatenate([order.rows_at(3 * i, 3) for i in range(12)])
    assert pieces.tolist() == order.rows_at(0, 36).tolist()

    order = cram.RowOrder(1000, cram.Settings())
    order.fit(100, 300)  # 900 rows are ahead, and time for 300 of them
    rows = order.rows_at(100, 300)
    assert rows[0] == 100 and set(np.diff(rows)) == {3} and rows[-1] == 997
    assert sorted(order.rows_at(400, 1000)) == [*range(1000)]  # what comes after is a whole pass
    order.fit(200, 10_000)  # a larger budget: every row from here on
    assert order.rows_at(200, 3).tolist() == [400, 401, 402]


def test_random_row_order():
    order = cram.RowOrder(10, cram.Settings(order="random"))
    order.fit(0, 5)
    passes = [order.rows_at(10 * n, 10).tolist() for n in (0, 1, 2)]
    assert all(sorted(p) == [*range(10)] for p in passes) and len({*map(tuple, passes)}) == 3
    assert [*range(10)] not in passes
    other = cram.RowOrder(10, cram.Settings(order="random", seed=1)).rows_at(0, 10).tolist()
    assert other != passes[0]


# ------------------------------------------------------------------------------ a training run


def test_a_run_learns_and_keeps_its_books(train, data):
    saved, log = train(steps=200)
    s = cram.Settings(**saved["settings"])
    rows = [cram.batch_at(k / 200, s) for k in range(200)]
    for line in log[:-1]:
        assert line["tokens"] == 32 * sum(rows[: line["step"]])
        assert line["lr"] == cram.lr_at((line["step"] - 1) / 200, s)
        assert line["batch"] == rows[line["step"] - 1]
        assert line["mfu"] is None and line["tokens_per_s"] > 0
    for optimizer in saved["optimizers"]:
        assert {group["lr"] for group in optimizer["param_groups"]} == {log[-1]["lr"]}
    assert [line["step"] for line in log if "val_loss" in line] == [*range(10, 201, 10)]
    val = [line["val_loss"] for line in log if "val_loss" in line]
    assert val[-1] < val[0] - 1

    checkpoint = torch.load(train.folder / "out/ckpt.pt", weights_only=True)
    assert same(checkpoint["model"], saved["model"])
    assert checkpoint["result"]["val_loss"] == val[-1]


def test_validation_loss_as_the_contract_defines_it(train, data):
    _, log = train(steps=4)
    model, _ = cram.load_checkpoint(train.folder / "out/ckpt.pt")
    rows = np.fromfile(data / "val.bin", "<u2").reshape(-1, 32)[:4096].astype(int)
    order = np.random.default_rng(0).random(rows.shape).argsort(1)
    total = []
    for row, positions in zip(rows, order[:, : round(0.15 * 32)]):
        masked = row.copy()
        masked[positions] = cram.MASK
        with torch.no_grad():
            logits = model.logits(torch.tensor(masked)[None])[0].double().log_softmax(-1)
        total += [-logits[p, row[p]].item() for p in positions]
    assert log[-1]["val_loss"] == pytest.approx(np.mean(total), abs=1e-5)


def test_the_microbatch_changes_nothing(train):
    whole, log = train("whole", steps=6)
    parts, parts_log = train("parts", steps=6, microbatch=5)
    for name, p in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], p, rtol=1e-4, atol=2e-5)
    for a, b in zip(log, parts_log):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_gradient_of_a_step_is_that_of_its_whole_batch(train, data, monkeypatch):
    gradients = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, largest):
        parameters = list(parameters)
        gradients.append([p.grad.clone() for p in parameters])
        return clip(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train(steps=1, microbatch=1, batch=48)
    torch.manual_seed(0)
    model = cram.CrammedBERT(cram.Settings(**TINY), json.loads(
        (data / "meta.json").read_text())["vocab_size"], 32)
    rows = np.fromfile(data / "train.bin", "<u2").reshape(-1, 32)
    order = cram.RowOrder(len(rows), cram.Settings())
    order.fit(0, 3)
    batch = torch.from_numpy(rows[order.rows_at(0, 3)].astype(np.int64))
    masked = cram.mask_tokens(batch, 0.25, 0.8, len(model.embed.weight),
                              torch.Generator().manual_seed(cram.mask_seed(0, 0)))
    model(*masked).backward()
    for p, g in zip(model.parameters(), gradients[0]):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-6)


def test_the_clock(train, capsys, monkeypatch):
    real = cram.save_whole
    monkeypatch.setattr(cram, "save_whole", lambda *a: (time.sleep(0.5), real(*a)))
    began = time.monotonic()
    saved, log = train(hours=6 / 3600)
    assert saved["run"]["elapsed_s"] >= 0
    assert all(line["elapsed_s"] <= 6.1 for line in log)  # saving comes after the clock
    assert 5 < time.monotonic() - began < 10
    last_lr = log[-1]["lr"]
    step = saved["run"]["s_per_row"] * 32 / 6  # share of the budget that a step takes
    assert 0 <= last_lr <= 3e-3 * 4 * max(0.02, 3 * step)
    shares = sorted(line["progress"] for line in log if "val_loss" in line)
    assert len(shares) >= 20 * (1 - saved["clock"]["start"] / 6) - 5  # some fall into one step
    assert "the budget takes" in capsys.readouterr().out


def test_stop_before_the_deadline_rather_than_after(train, monkeypatch):
    """A step that would not fit is not begun: with steps of 0.5 s, 2.2 s hold four."""
    real = cram.mask_tokens
    monkeypatch.setattr(cram, "mask_tokens", lambda *a: (time.sleep(0.5), real(*a))[1])
    monkeypatch.setattr(cram, "batch_at", lambda f, s: 4)
    saved, log = train(hours=2.3 / 3600, batch=16)
    assert saved["run"]["step"] in (3, 4) and log[-1]["elapsed_s"] < 2.4


def test_a_line_of_the_log():
    """Time, time left, share done ... under their names, within 100 columns after days of it."""
    entry = {"step": 12_345_678, "tokens": 0, "elapsed_s": 36 * 3600 + 61.7, "progress": 0.75,
             "lr": 1.25e-4, "batch": 8192, "loss": 10.12345, "val_loss": 12.3456,
             "tokens_per_s": 123_456_789.0, "mfu": 0.4567}
    row = cram.log_row(entry)
    assert row.split() == ["36:01:02", "12:00:21", "75.0%", "12345678", "8192", "1.25e-04",
                           "10.123", "12.346", "123,456,789", "45.7%"]
    assert len(row) == len(cram.LOG_HEADER) <= 100
    ends = [[i for i, (a, b) in enumerate(zip(line, line[1:] + " ")) if a != " " and b == " "]
            for line in (cram.LOG_HEADER, row)]
    assert ends[0] == ends[1]
    assert cram.log_row({**entry, "progress": 1.01}).split()[1] == "0:00:00"


@pytest.mark.parametrize("ramp", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("batch, microbatch", [(512, 512), (1000, 300), (8192, 512)])
def test_all_sizes_of_microbatches_are_known_before_compiling(ramp, batch, microbatch):
    s = cram.Settings(ramp=ramp, batch=batch)
    batches = {cram.batch_at(k / 10_000, s) for k in range(10_000)}
    seen = {min(microbatch, rows - i) for rows in batches for i in range(0, rows, microbatch)}
    assert cram.microbatch_sizes(s, microbatch, Mock(size=1)) == seen


def test_milestones_are_said_of_the_unchanged_recipe_only(train, monkeypatch, capsys):
    monkeypatch.setitem(cram.RECIPES, "crammed", TINY)
    train("a", steps=2, seed=3)
    assert cram.MILESTONES["crammed"] in capsys.readouterr().out
    train("b", steps=2, lr=1e-4)
    assert "H200" not in capsys.readouterr().out


def test_the_loss_of_a_line_is_the_mean_since_the_one_before(train, monkeypatch):
    seen, real = [], math.isfinite
    monkeypatch.setattr(math, "isfinite", lambda x: (seen.append(x), real(x))[1])
    _, log = train(steps=100)
    losses = seen[::2]  # the loop asks for loss and norm of each step
    starts = [0] + [line["step"] for line in log]
    assert len(log) >= 50 and starts[-1] == 100
    for start, line in zip(starts, log):
        assert line["loss"] == pytest.approx(np.mean(losses[start : line["step"]]))


def test_the_end_repeated(train, monkeypatch):
    """A finished run, resumed, ends with the same numbers; the final validation is on no clock."""
    train(steps=30)
    ckpt = train.folder / "out/ckpt.pt"
    before = torch.load(ckpt, weights_only=True)["result"]
    real = cram.validate
    monkeypatch.setattr(cram, "validate", lambda *a: (time.sleep(2), real(*a))[1])
    saved, log = train(resume=True)
    assert untimed(torch.load(ckpt, weights_only=True)["result"]) == untimed(before)
    assert 0 <= saved["run"]["elapsed_s"] - before["elapsed_s"] < 1.5
    assert log[-1]["elapsed_s"] - before["elapsed_s"] < 1.5


def test_fill_and_python_interface(train, data):
    train(steps=30)
    out = train.folder / "out"
    printed = script("cram.py", "--out", out, "--fill", "a <mask> b <mask>.")
    assert printed.count("<mask>:") == 2 and printed.count("%") == 10
    printed = script("cram.py", "--out", out, "--fill", "nothing", code=1)
    assert "<mask>" in printed and "Traceback" not in printed
    model, tokenizer = cram.load_checkpoint(out / "ckpt.pt", device="cpu")
    ids = torch.tensor([tokenizer.encode("some text").ids])
    assert model.encode(ids, torch.ones_like(ids, dtype=torch.bool)).shape == (*ids.shape, 32)
    assert model.logits(ids).shape == (*ids.shape, tokenizer.get_vocab_size())
    assert not model.training


# ------------------------------------------------------------------------------ interrupted


class StopAt:
    """Stands in for cram.Stop: asks for a stop at the n-th microbatch."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        return self

    def listen(self):
        pass

    @property
    def asked(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("steps, batch, passes", [(300, 32, 4.4), (40, 8, 0.14)])
def test_interrupted_twice_and_resumed_is_bit_for_bit_the_same(
        train, monkeypatch, data, steps, batch, passes):
    """Also inside an accumulation (4 microbatches a step), across passes over the data, and within
    one of which the budget takes only every seventh row."""
    flags = {"steps": steps, "batch": batch, "microbatch": batch // 4}
    whole = train("whole", **flags)
    rows = json.loads((data / "meta.json").read_text())["train_rows"]
    assert whole[0]["run"]["rows"] / rows == pytest.approx(passes, rel=0.1)
    rng = random.Random(0)
    for attempt in range(2):
        out = f"parts{attempt}"
        for resume in (False, True):
            monkeypatch.setattr(cram, "Stop", StopAt(rng.randint(1, steps)))
            train(out, resume, **({} if resume else flags))
            assert not (train.folder / out / "ckpt.pt").exists()
        monkeypatch.setattr(cram, "Stop", StopAt(10**9))
        assert_same_run(train(out, resume=True), whole)


def test_killed_at_any_moment_it_goes_on(data, tmp_path):
    """kill -9, with last.pt written all the time. CRAM_KILLS sets how often (50 for the record)."""
    wanted = int(os.environ.get("CRAM_KILLS", 3))
    flags = ["--data", data, *(x for k, v in TINY.items() for x in (f"--{k}", v)),
             "--steps", max(240, 60 * wanted), "--save-minutes", 1e-6]
    before = ("real = it.torch.save; it.SAVE_SHARE = 1; "
              "it.torch.save = lambda *a: (real(*a), it.time.sleep(0.02))")
    script("cram.py", *flags, "--out", tmp_path / "whole")
    rng, kills, inside = random.Random(2), 0, 0
    main = f"import sys; sys.path.insert(0, {str(HERE)!r}); import cram as it; {before}; it.main()"
    out = tmp_path / "killed"
    while True:
        args = ["--resume"] if (out / "last.pt").exists() else flags
        process = subprocess.Popen(
            [sys.executable, "-c", main, *map(str, args), "--out", str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            printed, _ = process.communicate(timeout=rng.uniform(2, 5) if kills < wanted else 200)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            inside += (out / "last.pt.part").exists()
            continue
        assert process.returncode == 0, printed
        if kills >= wanted or (out / "ckpt.pt").exists():
            break
    print(f"{kills} kills, {inside} of them while last.pt was being written")
    assert kills >= min(wanted, 3)
    assert_same_run(read_run(out), read_run(tmp_path / "whole"))


def test_signals_save_and_leave(data, tmp_path):
    command = [sys.executable, HERE / "cram.py", "--data", data, "--out", tmp_path / "o",
               "--hours", "0.05", *(str(x) for k, v in TINY.items() for x in (f"--{k}", v))]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if "0:00:0" in line:  # the first line of the log
                break
        sent = time.monotonic()
        process.send_signal(number)
        printed, _ = process.communicate(timeout=20)
        assert process.returncode == 0 and "go on with --resume" in printed
        assert time.monotonic() - sent < 5
        command = [sys.executable, HERE / "cram.py", "--out", tmp_path / "o", "--resume"]
    assert read_run(tmp_path / "o")[0]["run"]["step"] > 1


def test_a_run_outlives_its_screen(data, tmp_path):
    """As behind `| head -n 1`, or in a terminal that is closed."""
    command = [sys.executable, HERE / "cram.py", "--data", data, "--out", tmp_path / "o",
               "--steps", 40, *(x for k, v in TINY.items() for x in (f"--{k}", v))]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    assert (tmp_path / "o/ckpt.pt").exists() and read_run(tmp_path / "o")[1][-1]["step"] == 40


def test_resume_is_refused_when_something_differs(train, data, monkeypatch):
    monkeypatch.setattr(cram, "Stop", StopAt(5))
    train(steps=50)
    for flags, words in (({"lr": 1e-4}, "--lr 0.0001 (was 0.003)"), ({"layers": 3}, "--layers 3"),
                         ({"seed": 1}, "--seed 1"), ({"hours": 1.0}, "--steps"),
                         ({"steps": 0}, "begun with --steps")):
        with pytest.raises(cram.CramError, match=words.replace("(", r"\(").replace(")", r"\)")):
            train(resume=True, **flags)
    other = train.folder / "other"
    shutil.copytree(data, other)
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps({**meta, "train_sha256": "0" * 64}))
    with pytest.raises(cram.CramError, match="other train_sha256"):
        train(resume=True, data=str(other))
    for broken in ("{}", "[1]", '{"seq_'):
        (other / "meta.json").write_text(broken)
        with pytest.raises(cram.CramError, match="meta.json is damaged"):
            train(resume=True, data=str(other))


def test_rows_left_out_are_said_only_while_some_are(train, capsys):
    train(steps=5)
    assert "one row in" in capsys.readouterr().out
    train(resume=True, steps=10)  # the first pass, of some rows, is over: now all come
    assert "one row in" not in capsys.readouterr().out


def test_a_run_is_not_overwritten(train, monkeypatch):
    monkeypatch.setattr(cram, "Stop", StopAt(5))
    train(steps=50)
    with pytest.raises(cram.CramError, match="--resume"):
        train(steps=50)
    (train.folder / "out/last.pt").unlink()  # without it there is nothing to lose
    train(steps=50)
    with pytest.raises(cram.CramError, match="no checkpoint"):
        train("elsewhere", resume=True)


def test_another_budget_on_resume(train, monkeypatch, capsys):
    train(steps=20)
    saved, log = train(resume=True, steps=40)
    assert saved["run"]["step"] == 40 and log[-1]["step"] == 40
    assert [line["step"] for line in log] == sorted(line["step"] for line in log)
    assert "another budget" in capsys.readouterr().out


def test_resuming_a_finished_run_changes_nothing(train, capsys):
    train(steps=20)
    before = files_of(train.folder / "out")
    train(resume=True)
    assert files_of(train.folder / "out") == before
    assert "no further step" in capsys.readouterr().out
    (train.folder / "out/ckpt.pt").write_bytes(b"broken")  # what is missing is made
    train(resume=True)
    assert cram.load_whole(train.folder / "out/ckpt.pt")["result"]["step"] == 20


def test_a_log_with_foreign_lines_is_gone_on_with(train, monkeypatch):
    monkeypatch.setattr(cram, "Stop", StopAt(5))
    train(steps=20)
    monkeypatch.setattr(cram, "Stop", StopAt(10**9))
    with open(train.folder / "out/log.jsonl", "a") as log:
        log.write("{garbage}\n[]\n{}\n")
    _, lines = train(resume=True)
    assert lines[-1]["step"] == 20


def test_a_step_that_is_not_finite_is_skipped(train, monkeypatch):
    real, calls = cram.CrammedBERT.forward, []

    def sometimes_nan(self, *args):
        loss = real(self, *args)
        calls.extend([0] * torch.is_grad_enabled())
        return loss * math.nan if len(calls) in (3, 4) and torch.is_grad_enabled() else loss

    monkeypatch.setattr(cram.CrammedBERT, "forward", sometimes_nan)
    saved, log = train(steps=8)
    assert saved["run"]["skipped"] == 2 and saved["run"]["step"] == 8
    assert all(p.isfinite().all() for p in saved["model"].values())
    assert all(math.isfinite(line["loss"]) for line in log)


def test_a_run_that_broke_down_stops_and_keeps_its_last_checkpoint(train, monkeypatch):
    monkeypatch.setattr(cram, "Stop", StopAt(3))
    before, _ = train(steps=100)
    monkeypatch.setattr(cram, "Stop", StopAt(10**9))
    real = cram.CrammedBERT.forward
    monkeypatch.setattr(cram.CrammedBERT, "forward", lambda self, *a: real(self, *a) * math.inf)
    with pytest.raises(cram.CramError, match="not finite in 30 steps"):
        train(resume=True)
    assert same(read_run(train.folder / "out")[0], before)

    # However often it is saved: never between steps that fail
    monkeypatch.setattr(cram, "SAVE_SHARE", 1.0)
    with pytest.raises(cram.CramError, match="not finite in 30 steps"):
        train(resume=True, save_minutes=1e-9)
    assert read_run(train.folder / "out")[0]["run"]["skipped"] == 0


@pytest.mark.parametrize("lr, bad_step", [(1e20, 5), (math.inf, 9)])
def test_a_run_that_broke_down_at_its_end_is_not_saved(train, monkeypatch, lr, bad_step):
    """With huge weights the next steps are skipped; infinite ones may come with the last step."""
    train(steps=5)
    good, usual = (train.folder / "out/last.pt").read_bytes(), cram.lr_at
    monkeypatch.setattr(
        cram, "lr_at", lambda f, s: lr if round(10 * f) == bad_step else usual(f, s))
    with pytest.raises(cram.CramError, match="has broken down, and is not saved"):
        train(resume=True, steps=10)
    assert (train.folder / "out/last.pt").read_bytes() == good


def test_a_model_without_a_finite_validation_loss_is_no_model(train, monkeypatch):
    monkeypatch.setattr(cram, "validate", lambda *a: math.nan)
    with pytest.raises(cram.CramError, match="validation loss is nan"):
        train(steps=5)
    assert not (train.folder / "out/ckpt.pt").exists()


def test_out_of_memory_halves_the_microbatch_and_nothing_else(train, monkeypatch, capsys):
    whole, _ = train("whole", steps=20, microbatch=4)
    real = cram.CrammedBERT.forward

    def small_card(self, ids, *args):
        if len(ids) > 4 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, ids, *args)

    monkeypatch.setattr(cram.CrammedBERT, "forward", small_card)
    halved, _ = train("halved", steps=20, microbatch=16)
    assert re.search("out of memory: [1-4] rows at a time", capsys.readouterr().out)
    for name, p in whole["model"].items():
        torch.testing.assert_close(halved["model"][name], p, rtol=1e-4, atol=2e-5)
    assert halved["run"]["rows"] == whole["run"]["rows"]


def test_a_full_disk_keeps_the_old_checkpoint_and_training(train, monkeypatch, capsys):
    real, saves = torch.save, []

    def disk(content, f):
        saves.append(0)
        real(content, f)
        if len(saves) > 2 and len(saves) < 6:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk)
    monkeypatch.setattr(cram, "SAVE_SHARE", 1)
    saved, _ = train(steps=12, save_minutes=1e-9)
    assert saved["run"]["step"] == 12
    printed = capsys.readouterr().out
    assert printed.count("No space left on device; training goes on") == 3
    assert not list(train.folder.glob("out/*.part"))

    target = train.folder / "x.pt"
    cram.save_whole(target, {"a": 1})
    monkeypatch.setattr(torch, "save", lambda c, f: (f.write(b"half"), (_ for _ in ()).throw(
        RuntimeError("write failed"))))
    with pytest.raises(OSError):
        cram.save_whole(target, {"a": 2})
    assert torch.load(target, weights_only=True) == {"a": 1}


# ------------------------------------------------------------------------------ several processes


@pytest.fixture
def team(data, tmp_path):
    """Start cram.py in two processes: team(out, flag=value, ...) -> the torchrun process."""
    started, cram_py = [], tmp_path / "cram_py.py"
    cram_py.write_text(f"""import os, runpy
with open({str(tmp_path)!r} + "/pid" + os.environ["RANK"], "w") as f:
    f.write(str(os.getpid()))
runpy.run_path({str(HERE / "cram.py")!r}, run_name="__main__")
""")

    def run(out, **flags):
        flags = {"data": data, **TINY, "batch": 37, "microbatch": 4, **flags, "out": tmp_path / out}
        started.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             cram_py, *(str(x) for k, v in flags.items() for x in (f"--{k}", v))],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}))
        return started[-1]

    run.folder = tmp_path
    yield run
    for process in started:
        process.kill()


def process_of_rank_1(torchrun, folder):
    """Its number, once the run has written lines of its log."""
    log = folder / "two/log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 1):
        assert torchrun.poll() is None
        time.sleep(0.02)
    return int((folder / "pid1").read_text())


def assert_close_runs(one, other, tolerance):
    (a, a_log), (b, b_log) = one, other
    for name, p in a["model"].items():
        torch.testing.assert_close(b["model"][name], p, rtol=0, atol=tolerance)
    assert a["run"]["rows"] == b["run"]["rows"] and len(a_log) == len(b_log)
    for line, other_line in zip(a_log, b_log):
        for key in ("loss", "val_loss"):
            if key in line:
                assert line[key] == pytest.approx(other_line[key], abs=100 * tolerance)


@pytest.mark.parametrize("recipe, tolerance", [
    ("crammed", 2e-5), ("modern", 2e-4)])  # Muon makes much of little
def test_two_processes_end_where_one_ends(team, train, recipe, tolerance):
    flags = {"recipe": recipe, "steps": 12}
    two = team("two", **flags)
    one = train("one", **flags, batch=37)
    printed, _ = two.communicate(timeout=120)
    assert two.returncode == 0 and printed.count("validation loss") == 1, printed
    assert_close_runs(one, read_run(team.folder / "two"), tolerance)


def test_a_signal_to_one_process_stops_both_and_one_process_goes_on(team, train):
    two = team("two", steps=2000, microbatch=1)  # the signal comes within a step, likely
    os.kill(process_of_rank_1(two, team.folder), signal.SIGTERM)
    printed, _ = two.communicate(timeout=60)
    assert two.returncode == 0 and "and saved; go on with --resume" in printed
    stopped = torch.load(team.folder / "two/last.pt", weights_only=True)["run"]["step"]
    assert 0 < stopped < 2000 and not (team.folder / "two/ckpt.pt").exists()
    train("two", resume=True, steps=stopped + 3)
    assert (team.folder / "two/ckpt.pt").exists()


def test_a_process_that_dies_takes_the_other_with_it(team, train):
    two = team("two", steps=2000, **{"save-minutes": 0.002})
    out = team.folder / "two"
    pid = process_of_rank_1(two, team.folder)
    while not (out / "last.pt").exists():
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    printed, _ = two.communicate(timeout=60)
    assert two.returncode != 0 and "has lost another process of the run" in printed
    assert time.monotonic() - began < 60
    saved = torch.load(out / "last.pt", weights_only=True)["run"]["step"]
    train("two", resume=True, steps=saved + 3)
    assert (out / "ckpt.pt").exists()


# ------------------------------------------------------------------------------ export


def test_an_exported_model_is_the_same_in_transformers(train):
    transformers = pytest.importorskip("transformers")
    train(recipe="modern", steps=80)
    ckpt, folder = train.folder / "out/ckpt.pt", train.folder / "exported"
    printed = script("cram.py", "--out", train.folder / "out", "--export", folder)
    assert str(folder) in printed

    model, tokenizer = cram.load_checkpoint(ckpt)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [f"{WORDS[3]} <mask> {WORDS[5]}.", f"{' '.join(WORDS[80:92])} <mask>"]
    batch = tokens(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == cram.CLS and batch["attention_mask"].min() == 0
    for text, ids, keep in zip(texts, batch["input_ids"], batch["attention_mask"].bool()):
        ours = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids[keep].tolist() == [cram.CLS, *ours, cram.SEP]

    head = {"head.dense.weight", "head.norm.weight"}
    classifier = {"classifier.weight", "classifier.bias"}
    for kind, missing, unexpected in [("AutoModelForMaskedLM", set(), set()),
                                      ("AutoModel", set(), head),
                                      ("AutoModelForSequenceClassification", classifier, set())]:
        theirs, report = getattr(transformers, kind).from_pretrained(
            folder, output_loading_info=True)
        assert type(theirs).__name__.startswith("ModernBert")
        assert set(report["missing_keys"]) == missing, kind
        assert set(report["unexpected_keys"]) == unexpected, kind

    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        a, b = theirs(**batch).logits, model.logits(batch["input_ids"], keep)
    torch.testing.assert_close(a[keep], b[keep], rtol=0, atol=2e-5)
    assert set(theirs.config.layer_types) == {"full_attention"}  # these rows are in any window

    printed = script("cram.py", "--out", train.folder / "out", "--fill", texts[0])
    guesses = transformers.pipeline("fill-mask", model=str(folder))(texts[0])
    for guess in guesses:
        assert f"{guess['token_str']} {guess['score']:.1%}" in printed

    card = (folder / "README.md").read_text()
    for words in ("recipe modern", "80 steps", "| cpu |", "text.jsonl", "nats"):
        assert words in card, words


def test_what_cannot_be_exported_is_said(train):
    train(steps=2)
    printed = script("cram.py", "--out", train.folder / "out", "--export", train.folder / "x",
                     code=1)
    assert "only --model modernbert" in printed and not (train.folder / "x").exists()
    (train.folder / "full").mkdir()
    (train.folder / "full/file").touch()
    train("modern", steps=2, model="modernbert")
    printed = script("cram.py", "--out", train.folder / "modern", "--export", train.folder / "full",
                     code=1)
    assert "not empty" in printed


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("content, args, words", [
    (None, [], "nothing to read there"),
    (b"", [], "too little text: 0 tokens of 0 documents"),
    (b'{"body": "x"}\n', [], "no column .text., but ..body"),
    (b'{"text": "\xff\xfe"}\n', [], "not UTF-8"),
    (b'{"text": "too short"}\n', [], "too little text"),
    (b'{"text": "x"}\n', ["--vocab-size", 70000], "256 to 65536"),
    (b'{"text": "x"}\n', ["--tokens", 0], "at least one row"),
    (b'{"text": "x"}\n', ["--tokens", "inf"], "at least one row, and finite"),
    (b'{"text": "x"}\n', ["--source", ""], "--source is empty"),
])
def test_prepare_says_what_is_wrong(tmp_path, content, args, words):
    if content is not None:
        (tmp_path / "t.jsonl").write_bytes(content)
    printed = script("prepare.py", "--source", tmp_path / "t.jsonl", "--out", tmp_path / "d", *args,
                     code=2 if args else 1)
    assert re.search(words, printed), printed
    assert "Traceback" not in printed and not (tmp_path / "d").exists()


def test_a_folder_of_the_users_is_not_deleted(tmp_path, complaint):
    source = write_jsonl(tmp_path / "t.jsonl", [sentences(i, 60) for i in range(3)])
    (tmp_path / "d/work").mkdir(parents=True)
    (tmp_path / "d/work/thesis.tex").write_text("years of it")
    assert "give another --out" in complaint(prepare, "--source", source, "--out", tmp_path / "d",
                                             "--vocab-size", 700, "--seq-len", 32)
    assert (tmp_path / "d/work/thesis.tex").read_text() == "years of it"


def test_a_work_file_that_lost_its_end_is_not_filled_up(tmp_path):
    (tmp_path / "train.tokens").write_bytes(b"12345")
    with pytest.raises(SystemExit, match="is damaged"):
        prepare.open_at(tmp_path / "train.tokens", 10)


def test_damaged_files_lose_only_what_is_damaged(tmp_path):
    text = "".join(json.dumps({"text": sentences(i, 20)}) + "\n" for i in range(400)).encode()
    packed = lzma.compress(text)
    (tmp_path / "cut.jsonl.xz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 5000}) + "\n"
                                         + json.dumps({"text": "short"}) + "\n")
    documents = [*prepare.read_file(str(tmp_path / "cut.jsonl.xz"))]
    assert len(documents) > 50 and "cut off" in documents[-1][1]
    assert all(text for text, _ in documents[:-1])
    limit, prepare.MAX_DOCUMENT = prepare.MAX_DOCUMENT, 1000
    try:
        (long, reason), short = prepare.read_file(str(tmp_path / "long.jsonl"))
    finally:
        prepare.MAX_DOCUMENT = limit
    assert long is None and "over 1,000 bytes" in reason and short == ("short", None)


def damage(folder, what):
    """A prepared folder with something wrong in it."""
    meta = json.loads((folder / "meta.json").read_text())
    if what == "cut":
        os.truncate(folder / "train.bin", 64 * 10 + 7)
    elif what == "ids":
        rows = np.fromfile(folder / "train.bin", "<u2")
        rows[:] = 60_000
        rows.tofile(folder / "train.bin")
    elif what == "val ids":
        rows = np.fromfile(folder / "val.bin", "<u2")
        rows[5] = meta["vocab_size"]
        rows.tofile(folder / "val.bin")
    elif what == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif what == "gone":
        shutil.rmtree(folder)


@pytest.mark.parametrize("what, args, words", [
    ("gone", [], "no prepared data"),
    ("cut", [], "train.bin has 647 bytes and should have"),
    ("ids", [], "token id 60000"),
    ("val ids", [], "tokenizer ends at"),
    ("tokenizer", [], "not the one the tokens were made with"),
    ("", ["--hours", "0"], "--hours must be a positive number"),
    ("", ["--hours", "-1"], "--hours must be a positive number"),
    ("", ["--hours", "nan"], "--hours must be a positive number"),
    ("", ["--hours", "soon"], "invalid float"),
    ("", ["--hours", "1e-9"], "over before the first step"),
    ("", ["--hours", "1", "--steps", "2"], "not both"),
    ("", ["--width", "100", "--heads", "3"], "even multiple of --heads"),
    ("", ["--device", "tpu"], "cannot be used"),
    ("", ["--recipe", "magic"], "crammed or modern"),
    ("", ["--batch", "0"], "must be a positive number"),
    ("", ["--resume"], "no checkpoint"),
    ("", ["--fill", "a <mask>"], "no checkpoint"),
    ("", ["--no-such-flag"], "unrecognized"),
])
def test_cram_says_what_is_wrong(data, tmp_path, complaint, what, args, words):
    folder = tmp_path / "d"
    shutil.copytree(data, folder)
    damage(folder, what)
    budget = [] if "--hours" in args else ["--steps", 2]
    tiny = [x for k, v in TINY.items() for x in (f"--{k}", v)]
    assert words in complaint(
        cram, "--data", folder, "--out", tmp_path / "o", *budget, *tiny, *args)
    assert not list((tmp_path / "o").glob("*.pt*")) if (tmp_path / "o").exists() else True


class Mischief:
    def __reduce__(self):
        return os.system, ("touch mischief-was-done",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"model": 1}), "code"])
def test_a_file_that_is_no_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    if content == "code":
        torch.save({"model": Mischief(), "settings": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(cram.CramError, match="not a checkpoint"):
        cram.load_checkpoint(path)
    printed = script("finetune_glue.py", "--task", "cola", "--ckpt", path, code=1)
    assert "not a checkpoint" in printed and "Traceback" not in printed
    assert not (tmp_path / "mischief-was-done").exists()


# ------------------------------------------------------------------------------ GLUE


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
    assert g.matthews(labels, labels) == pytest.approx(1)
    assert g.matthews(1 - labels, labels) == pytest.approx(-1)


def test_glue_examples_are_joined_and_cut():
    a, b = [10, 11, 12, 13, 14, 15], [20, 21]
    assert finetune_glue.join((a,), 99) == [2, *a, 3]
    assert finetune_glue.join((a, b), 99) == [2, *a, 3, *b, 3]
    assert finetune_glue.join((a, b), 9) == [2, 10, 11, 12, 13, 3, 20, 21, 3]
    assert finetune_glue.join((a,), 5) == [2, 10, 11, 12, 3]
    assert len(finetune_glue.join((a * 20, a * 30), 128)) == 128


def test_glue_learning_rate_warms_up_over_a_tenth_of_the_tasks_own_steps():
    for steps in (50, 5000):
        lr = [finetune_glue.lr_at(k, steps, 1.0) for k in range(steps)]
        assert np.argmax(lr) in (steps // 10 - 1, steps // 10) and max(lr) == 1
        assert lr[0] == pytest.approx(10 / steps) and lr[-1] < 0.01
        assert lr[steps // 10 + (steps - steps // 10) // 2] == pytest.approx(0.5, abs=0.02)


def write_glue(folder, name, train=64, validation=16, **columns):
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
def glue(train, tmp_path, monkeypatch, capsys):
    """Run finetune_glue.py in this process on what write_glue wrote: glue(flags) -> its output."""
    train(steps=20)

    def run(*flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [
            "finetune_glue.py", "--ckpt", str(tmp_path / "out/ckpt.pt"), "--device", "cpu",
            "--data", str(tmp_path / "glue"), *map(str, flags)])
        finetune_glue.main()
        return capsys.readouterr().out

    return run


def runs_of(folder):
    return json.loads((folder / "out/glue.json").read_text())["runs"]


def test_all_of_glue_end_to_end(train, tmp_path):
    train(steps=20)
    for name in finetune_glue.TASKS:
        write_glue(tmp_path / "glue", name)
    ckpt = tmp_path / "out/ckpt.pt"
    common = ["--ckpt", ckpt, "--data", tmp_path / "glue", "--epochs", 2, "--device", "cpu"]
    script("finetune_glue.py", "--task", "cola", "--trials", 1, *common)
    printed = script("finetune_glue.py", "--task", "all", "--trials", 2, *common)
    assert "cola seed 0" not in printed and "cola seed 1" in printed  # only what is missing
    [run] = runs_of(tmp_path)
    assert run["checkpoint"] == hashlib.sha256(ckpt.read_bytes()).hexdigest()
    for name, entry in run["tasks"].items():
        assert [trial["seed"] for trial in entry["trials"]] == [0, 1] and entry["subset"]
        for split in finetune_glue.TASKS[name].validation:
            scores = [trial[split] for trial in entry["trials"]]
            assert entry["median"][split] == pytest.approx(sum(scores) / 2)
    nine = [x for entry in run["tasks"].values() for x in entry["median"].values()]
    assert len(nine) == 9 and run["average"] == pytest.approx(sum(nine) / 9)

    table = printed[printed.index("published: arXiv 2212.14034"):].splitlines()
    assert max(map(len, table)) <= 100
    cola = run["tasks"]["cola"]["median"]["validation"]
    assert f"cola             matthews {cola:6.1f}" in "\n".join(table)
    [average] = [line.split() for line in table if "average of nine" in line]
    assert average[3:] == [f"{sum(nine) / 9:.1f}", "45.5", "80.7", "80.9", "subset"]  # the paper's
    assert "mnli was trained on 64 rows, not the official 392,702" in "\n".join(table)

    script("finetune_glue.py", "--task", "rte", "cola", "--trials", 1, "--scratch", *common)
    runs = runs_of(tmp_path)
    assert len(runs) == 2 and set(runs[1]["tasks"]) == {"rte", "cola"}
    assert len(runs[0]["tasks"]) == 8


def test_fine_tuning_learns(glue, tmp_path):
    write_glue(tmp_path / "glue", "sst2", train=512, validation=64)
    printed = glue("--task", "sst2", "--trials", 1, "--lr", 3e-3, "--epochs", 10)
    [run] = runs_of(tmp_path)
    assert run["tasks"]["sst2"]["median"]["validation"] > 90, printed
    assert "average" not in printed  # of one task there is none


def test_results_of_other_data_or_another_checkpoint_are_kept_apart(glue, tmp_path):
    for name in ("cola", "rte"):
        write_glue(tmp_path / "glue", name, train=32)
        glue("--task", name, "--trials", 1, "--epochs", 1)
    moved = (tmp_path / "glue").rename(tmp_path / "elsewhere")  # a path is not content
    printed = glue("--task", "cola", "--trials", 1, "--epochs", 1, "--data", moved)
    assert "cola seed" not in printed and "glue.json has all these trials, none is run" in printed
    assert len(runs_of(tmp_path)) == 1

    for split in ("train", "validation"):
        path = moved / f"cola/{split}.jsonl"
        path.write_text(path.read_text().replace('"label": 1', '"label": 0', 1))
        again = glue("--task", "cola", "--trials", 1, "--epochs", 1, "--data", moved)
        assert "cola seed 0" in again
    first, *others = runs_of(tmp_path)
    assert set(first["tasks"]) == {"cola", "rte"} and len(first["tasks"]["cola"]["trials"]) == 1
    assert [set(run["tasks"]) for run in others] == [{"cola"}, {"cola"}]

    ckpt = tmp_path / "out/ckpt.pt"
    content = torch.load(ckpt, weights_only=True)
    content["model"]["embed.weight"] += 1e-3
    torch.save(content, ckpt)
    assert "cola seed 0" in glue("--task", "cola", "--trials", 1, "--epochs", 1, "--data", moved)
    assert len(runs_of(tmp_path)) == 4


def test_of_several_runs_that_fit_the_one_that_has_the_task_goes_on(tmp_path):
    runs = [{"checkpoint": "c", "tasks": {"cola": {"data": {"train": "old"}}}},
            {"checkpoint": "c", "tasks": {name: {"data": {"train": name}}
                                          for name in ("cola", "rte")}}]
    (tmp_path / "glue.json").write_text(json.dumps({"runs": runs}))
    for name, train, expected in (("rte", "rte", {"cola", "rte"}), ("cola", "old", {"cola"})):
        _, run = finetune_glue.open_results(
            tmp_path / "glue.json", {"checkpoint": "c"}, {name: {"train": train}})
        assert set(run["tasks"]) == expected


def test_predictions_as_the_glue_server_takes_them(glue, tmp_path):
    folder, flags = tmp_path / "out/glue_test", ["--trials", 2, "--epochs", 1, "--test"]
    for name in finetune_glue.TASKS:
        write_glue(tmp_path / "glue", name, train=16, validation=5)
    mixed = tmp_path / "glue/rte/test.jsonl"
    mixed.write_text("\n".join(reversed(mixed.read_text().splitlines())))  # its idx says the order
    in_order = [json.loads(line)["idx"] for line in mixed.read_text().splitlines()]
    assert in_order == [4, 3, 2, 1, 0]
    glue("--task", "all", *flags)

    words = {"entailment", "neutral", "contradiction", "not_entailment"}
    allowed = {"MNLI-m": words - {"not_entailment"}, "MNLI-mm": words - {"not_entailment"},
               "QNLI": {"entailment", "not_entailment"}, "RTE": {"entailment", "not_entailment"},
               "AX": words - {"not_entailment"}, "STS-B": None,
               **dict.fromkeys(["CoLA", "SST-2", "MRPC", "QQP", "WNLI"], {"0", "1"})}
    assert {path.stem for path in folder.glob("*")} == set(allowed)
    for file, labels in allowed.items():
        header, *lines = (folder / f"{file}.tsv").read_text().splitlines()
        indices, predictions = zip(*(line.split("\t") for line in lines))
        assert header == "index\tprediction"
        assert list(map(int, indices)) == [*range({"AX": 1104, "WNLI": 146}.get(file, 5))]
        assert set(predictions) <= labels if labels else all(
            0 <= float(x) <= 5 for x in predictions)

    # What is there is not made again, what is missing is, by the first trial
    rte = (folder / "RTE.tsv").read_text()
    assert "seed" not in glue("--task", "all", *flags)
    (folder / "RTE.tsv").unlink()
    printed = glue("--task", "all", *flags)
    assert re.findall("^(.* seed .): ", printed, re.M) == ["rte seed 0"]
    assert (folder / "RTE.tsv").read_text() == rte
    [run] = runs_of(tmp_path)
    assert [len(entry["trials"]) for entry in run["tasks"].values()] == [2] * 8
    stsb = (folder / "STS-B.tsv").read_text()  # with another first trial they are another's
    assert "stsb seed 1" in glue("--task", "stsb", *flags, "--seed", 1)
    assert (folder / "STS-B.tsv").read_text() != stsb
    assert "stsb seed" not in glue("--task", "stsb", *flags, "--seed", 1)

    with pytest.raises(cram.CramError, match="move .* away"):  # other settings: not into this one
        glue("--task", "rte", "--trials", 1, "--epochs", 2, "--test")


def test_predictions_are_those_of_the_rows_they_stand_beside(glue, tmp_path, monkeypatch):
    """A model that knows the answer: label words in the right order, at the right index."""
    write_glue(tmp_path / "glue", "mnli", train=16, validation=7)
    write_glue(tmp_path / "glue", "stsb", train=16, validation=5)
    seen = []

    def predict(self, split):
        seen.append(split)
        if self.task.labels:
            return np.eye(3, dtype=np.float32)[np.arange(len(split.ids)) % 3]
        return np.array([[-1.0], [0], [2.34567], [5], [9]], np.float32)

    monkeypatch.setattr(finetune_glue.Tuning, "predict", predict)
    for name in ("mnli", "stsb"):
        glue("--task", name, "--trials", 2, "--epochs", 1, "--test")
    assert len(seen) == (2 * 2 + 2) + (2 * 1 + 1)  # only the first of two trials predicts the test
    for file in ("MNLI-m", "MNLI-mm"):
        assert (tmp_path / f"out/glue_test/{file}.tsv").read_text().split()[2:] == [
            "0", "entailment", "1", "neutral", "2", "contradiction", "3", "entailment",
            "4", "neutral", "5", "contradiction", "6", "entailment"]
    assert (tmp_path / "out/glue_test/STS-B.tsv").read_text().split()[3::2] == [
        "0.000", "0.000", "2.346", "5.000", "5.000"]


def test_a_task_of_ones_own(glue, tmp_path, monkeypatch):
    """One entry, without published scores and test files; the average stays the paper's."""
    entry = """TASKS = {
    "own": Task(("sentence",), ("no", "yes", "both"), "accuracy", 64, {}, {"validation": ()}),"""
    source = Path(finetune_glue.__file__).read_text().replace("TASKS = {", entry, 1)
    changed = types.ModuleType("changed")
    monkeypatch.setitem(sys.modules, "changed", changed)
    exec(source, vars(changed))
    monkeypatch.setattr(sys.modules[__name__], "finetune_glue", changed)
    for name in changed.TASKS:
        write_glue(tmp_path / "glue", name, train=16, validation=5)
    flags = ["--trials", 1, "--epochs", 1]
    assert "average of nine" not in glue("--task", "own", "cola", *flags)
    printed = glue("--task", "all", *flags, "--test")
    assert re.search("^own .*accuracy", printed, re.M) and "own seed" not in printed
    assert re.search("^average of nine .* 45.5 .* 80.7 .* 80.9 ", printed, re.M)
    [run] = runs_of(tmp_path)
    nine = [x for name, entry in run["tasks"].items() if name != "own"
            for x in entry["median"].values()]
    assert len(nine) == 9 and run["average"] == pytest.approx(np.mean(nine))


def test_dropout_is_the_papers_and_none_for_modernbert(glue, train, tmp_path):
    write_glue(tmp_path / "glue", "rte", train=16)
    train("modern", recipe="modern", steps=2)
    flags = ["--task", "rte", "--trials", 1, "--epochs", 1]
    for folder, dropout, more in (("out", 0.1, []), ("modern", 0, []),
                                  ("modern", 0.3, ["--dropout", 0.3])):
        glue(*flags, "--ckpt", tmp_path / folder / "ckpt.pt", *more)
        [*_, run] = json.loads((tmp_path / folder / "glue.json").read_text())["runs"]
        assert run["settings"]["dropout"] == dropout


def test_trials_in_groups_are_the_trials_one_by_one(glue, tmp_path, monkeypatch):
    write_glue(tmp_path / "glue", "stsb", train=32)
    trials = []
    for at_once in (1, 2):
        monkeypatch.setattr(finetune_glue, "trials_at_once", lambda *a: at_once)
        glue("--task", "stsb", "--trials", 3, "--epochs", 2, "--lr", 1e-3, "--dropout", 0)
        trials.append(runs_of(tmp_path)[0]["tasks"]["stsb"]["trials"])
        (tmp_path / "out/glue.json").unlink()
    assert trials[0] == trials[1] and len({trial["validation"] for trial in trials[0]}) == 3


def test_a_trial_that_diverged_has_no_score_and_costs_no_other(glue, tmp_path, monkeypatch):
    write_glue(tmp_path / "glue", "rte", train=16)
    real = finetune_glue.Tuning.predict
    monkeypatch.setattr(finetune_glue.Tuning, "predict", lambda self, split: (
        real(self, split) * (math.nan if torch.initial_seed() == 1 else 1)))
    with pytest.raises(cram.CramError, match="without a score: rte seed 1. A smaller --lr"):
        glue("--task", "rte", "--trials", 3, "--epochs", 1)
    trials = runs_of(tmp_path)[0]["tasks"]["rte"]["trials"]
    assert [trial["seed"] for trial in trials] == [0, 2]


@pytest.mark.parametrize("scratch", [False, True])
def test_scratch_forgets_the_pretraining(glue, tmp_path, monkeypatch, scratch):
    write_glue(tmp_path / "glue", "rte", train=16)
    first_weights = []
    real = finetune_glue.Tuning.start

    def spy(self, seed):
        real(self, seed)
        first_weights.append(self.model.bert.embed.weight.detach().clone())

    monkeypatch.setattr(finetune_glue.Tuning, "start", spy)
    glue("--task", "rte", "--trials", 2, "--epochs", 1, *["--scratch"] * scratch)
    pretrained = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["model"]["embed.weight"]
    assert torch.equal(first_weights[0], pretrained) != scratch
    assert torch.equal(first_weights[0], first_weights[1]) != scratch  # each trial draws its own


# --- A trial, without the command


def tuning_of(lengths, task="cola", dropout=0.0, epochs=2, **others):
    """A small model to tune on examples of so many random tokens, and these examples."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
    for row, length in zip(ids, lengths):
        row[:length] = torch.randint(5, 50, (length,), generator=generator)
    labels = torch.tensor([i % 2 for i in range(len(lengths))])
    lengths = np.array([-(-n // 32) * 32 for n in lengths])
    ids = torch.cat([ids, ids.new_zeros(len(ids), lengths.max() - ids.shape[1])], dim=1)
    split = finetune_glue.Split(ids, labels, lengths, "")
    bert = model_of(seq_len=128).float()
    args = argparse.Namespace(**{"batch_size": 4, "lr": 1e-2, "scratch": False, "seed": 0,
                                 "epochs": epochs, "dropout": dropout, "test": False, **others})
    tuning = finetune_glue.Tuning(bert, finetune_glue.TASKS[task], split, torch.float32, args)
    return tuning, split


LENGTHS = random.Random(1).choices(range(3, 100), k=30)


def test_every_row_once_an_epoch_and_the_smallest_length_that_holds_a_batch():
    split = tuning_of(LENGTHS)[1]
    rows, T = finetune_glue.plan(split, 7, 3, 4)
    assert rows.shape == (21, 4) and T.shape == (21,)
    for epoch in rows.reshape(3, 28):
        assert len(set(epoch)) == 28 and set(epoch) < set(range(30))
    assert len({tuple(epoch) for epoch in rows.reshape(3, 28)}) == 3  # in another order
    for step, of_step in enumerate(rows):
        longest = max(LENGTHS[row] for row in of_step)
        assert T[step] % 32 == 0 and T[step] - 32 < longest <= T[step]
    assert same(finetune_glue.plan(split, 7, 3, 4)[0].tolist(), rows.tolist())
    assert finetune_glue.plan(split, 8, 3, 4)[0].tolist() != rows.tolist()


def test_padding_changes_no_logit_and_evaluation_keeps_the_order():
    tuning, split = tuning_of(LENGTHS)
    tuning.start(0)
    logits = tuning.predict(split)
    with torch.no_grad():
        for i, length in enumerate(LENGTHS):
            ids, keep, _ = finetune_glue.batch_of(split, [i], length)
            alone = tuning.model(ids, None)
            assert keep.all() and np.allclose(logits[i], alone, atol=1e-5)
    assert len(np.unique(logits[:, 0].round(5))) == 30  # rows differ, so that order would show


def test_a_trial_is_adamw_on_its_batches():
    """Against the plain loop: padded to each batch's longest, lr a number, a new optimizer."""
    tuning, split = tuning_of(LENGTHS, lr=1e-3)
    tuning.model.double()
    tuning.start(5)
    reference = copy.deepcopy(tuning.model)
    finetune_glue.fit([tuning], [5], lambda tokens: None)
    rows = finetune_glue.plan(split, 5, 2, 4)[0]

    optimizer = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.98), eps=1e-6,
                                  weight_decay=0.0)
    for step, chosen in enumerate(rows):
        ids = split.ids[chosen, : max(LENGTHS[i] for i in chosen)]
        logits = reference(ids, ids > 0).float()
        loss = torch.nn.functional.cross_entropy(logits, split.labels[chosen])
        optimizer.param_groups[0]["lr"] = finetune_glue.lr_at(step, len(rows), 1e-3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(tuning.model.parameters(), reference.parameters()):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


def test_a_trial_repeats_and_leaves_nothing_to_the_next():
    """In the same tensors, whose addresses a recorded graph holds."""
    tuning, split = tuning_of(LENGTHS, dropout=0.1)

    def trial(tuning, seed):
        finetune_glue.fit([tuning], [seed], lambda tokens: None)
        return [p.detach().clone() for p in tuning.model.parameters()]

    def places():
        return [t.data_ptr() for t in [*tuning.model.state_dict().values(), *(
            t for state in tuning.optimizer.state.values() for t in state.values())]]

    first, at = trial(tuning, 0), places()
    second = trial(tuning, 1)
    assert same(trial(tuning, 0), first) and places() == at
    assert not same(first, second) and same(trial(tuning_of(LENGTHS, dropout=0.1)[0], 1), second)


def test_steps_are_recorded_with_dropout_each_length_once(monkeypatch):
    """What a card would record, without one."""
    tuning, _ = tuning_of(LENGTHS, dropout=0.1)
    tuning.records, tuning.generator, tuning.stream, recorded = True, Mock(), Mock(), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)

    def record(T):
        assert all(module.training for module in tuning.model.modules())
        assert tuning.scaler  # a step needs it
        recorded.append(T)
        tuning.graphs[T] = None

    tuning.record = record
    for seed in (0, 1):
        tuning.model.eval()  # as load_checkpoint and predict leave it
        tuning.start(seed)
        assert recorded == sorted(set(tuning.lengths)) and len(recorded) > 1
        tuning.generator.manual_seed.assert_called_with(seed)


def test_trials_side_by_side_are_the_trials_alone():
    alone, tokens = {}, []
    for seed in (0, 1):
        tuning = tuning_of(LENGTHS)[0]
        finetune_glue.fit([tuning], [seed], lambda tokens: None)
        alone[seed] = [*tuning.model.parameters()]
    tunings = [tuning_of(LENGTHS)[0] for _ in range(2)]
    finetune_glue.fit(tunings, [0, 1], tokens.append)
    for tuning, weights in zip(tunings, alone.values()):
        assert same([*tuning.model.parameters()], weights)
    assert not same(*alone.values())
    assert sum(tokens) == sum(4 * sum(tuning.lengths) for tuning in tunings)


@pytest.mark.parametrize("device, dtype, expected", [
    ("cuda", torch.bfloat16, {32, 128}), ("cuda", torch.float16, set()),
    ("cpu", torch.float32, set())])
def test_blocks_are_compiled_only_for_lengths_with_many_steps(monkeypatch, device, dtype, expected):
    monkeypatch.setattr(finetune_glue, "can_compile", lambda device: True)
    few = finetune_glue.COMPILE_STEPS - 1
    steps = {32: few + 1, 64: few, 96: 1, 128: 100_000}
    assert finetune_glue.lengths_to_compile(steps, torch.device(device), dtype) == expected
    monkeypatch.setattr(finetune_glue, "can_compile", lambda device: False)
    assert not finetune_glue.lengths_to_compile(steps, torch.device(device), dtype)


def test_blocks_share_one_compiled_code_for_each_length():
    """Sixteen blocks would otherwise take sixteen times as long to compile."""
    from torch._dynamo.utils import counters

    model = finetune_glue.Classifier(model_of(seq_len=96, layers=3), 2, 0.1).bert.float().train()
    torch.compiler.reset()
    counters.clear()
    for block in model.blocks:
        block.compile(dynamic=False, backend="aot_eager")
    for T in (32, 64, 32):
        model.encode(torch.full((2, T), 7), torch.ones(2, T, dtype=torch.bool)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


# --- Bad input


@pytest.mark.parametrize("task, columns, flags, words", [
    ("cola", {"label": 2}, (), "label 2 is not from 0 to 1"),
    ("cola", {"label": -1}, (), "label -1 is not from 0 to 1"),
    ("stsb", {"label": 5.5}, (), "label 5.5 is not from 0 to 5"),
    ("cola", {"label": "1"}, (), "label '1' is not from 0 to 1"),
    ("cola", {"label": None}, (), "label None"),
    ("cola", {"sentence": 3}, (), "not a string"),
    ("cola", {"idx": 0}, ("--test",), "idx is not 0 to 15"),
    ("cola", {}, ("--batch-size", 100), "fewer training rows than --batch-size 100"),
    ("cola", {}, ("--seed", -1), "--seed must be from 0"),
    ("cola", {}, ("--dropout", 1), "--dropout must be from 0 to below 1"),
    ("nli", {}, (), "invalid choice"),
    ("mrpc", {}, (), "no train.jsonl"),
])
def test_glue_says_what_is_wrong(train, tmp_path, complaint, task, columns, flags, words):
    train(steps=2)
    if task in ("cola", "stsb"):
        write_glue(tmp_path / "glue", task, **columns)
    assert words in complaint(finetune_glue, "--task", task, "--ckpt", tmp_path / "out/ckpt.pt",
                              "--data", tmp_path / "glue", *flags)


def test_glue_needs_its_columns_and_its_splits(glue, tmp_path):
    folder = write_glue(tmp_path / "glue", "cola") / "cola"
    (folder / "test.jsonl").unlink()
    glue("--task", "cola", "--trials", 1, "--epochs", 1)  # needed by --test only
    with pytest.raises(cram.CramError, match="no test.jsonl"):
        glue("--task", "cola", "--trials", 1, "--epochs", 1, "--test")
    assert not (tmp_path / "out/glue_test").exists()
    (folder / "train.jsonl").write_text("\n".join([json.dumps({"text": "x", "label": 0})] * 20))
    with pytest.raises(cram.CramError, match="needs the columns sentence and label"):
        glue("--task", "cola")
    (tmp_path / "out/glue.json").write_text('{"runs": 3}')
    write_glue(tmp_path / "glue", "cola")
    with pytest.raises(cram.CramError, match="glue.json is not a results file"):
        glue("--task", "cola")
