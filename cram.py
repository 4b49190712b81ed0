"""Train a BERT from scratch on one GPU in one day.

    python prepare.py                         # once: text -> data/
    python cram.py --hours 24                 # data/ -> out/ckpt.pt
    python cram.py --resume                   # go on where a stopped run is
    python cram.py --fill "paris is the <mask> of france."

The model and recipe are those of "Cramming: Training a Language Model on a Single GPU in One Day"
(Geiping & Goldstein, arXiv 2212.14034, version 2). What differs from an ordinary BERT:

- pre-norm blocks, no biases, a gated FFN, fixed sinusoid positions with one learned scale, no head;
- rows without padding; a quarter of the tokens is masked, and only that quarter is decoded;
- one clock: learning rate and batch size follow the share of the time budget that is spent.

Read from the top: settings, model, masking and schedules, data, checkpoints, training, the rest.
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer

# -------------------------------------------------------------------------------- 1. Settings


@dataclass
class Settings:
    """Every setting of a run. Each is a flag of the same name, its comment the flag's help."""

    # Budget
    hours: float = 24.0  # wall-clock budget in hours, compilation included
    steps: int = 0  # budget in optimizer steps instead, which makes a run repeatable; 0 = --hours
    recipe: str = "crammed"  # crammed: the paper's

    # Folders
    data: str = "data"  # what prepare.py wrote
    out: str = "out"  # where last.pt, ckpt.pt and log.jsonl go

    # Model: paper section 4.2
    layers: int = 16  # transformer blocks
    width: int = 768  # C, channels
    heads: int = 12  # attention heads of width / heads channels

    # Optimization: paper section 4.3
    batch: int = 8192  # rows per optimizer step after the ramp, which starts at 1/16 of it
    lr: float = 1e-3  # peak learning rate, at 3/4 of the budget
    beta1: float = 0.9  # AdamW
    beta2: float = 0.98  # AdamW
    eps: float = 1e-12  # AdamW
    weight_decay: float = 0.01  # on matrices, embeddings and the position scale, not on norms
    clip: float = 0.5  # largest norm of the gradient
    mask_rate: float = 0.25  # share of tokens to guess: above BERT's 15 %, rows are seen about once

    # Machine: none of these changes what is learned, but for rounding
    microbatch: int = 512  # rows per forward pass; halved until it fits into the card's memory
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "auto"  # auto, bf16, fp16 or fp32; auto: bf16 if the card has it, else fp16
    compile: bool | None = None  # torch.compile; by itself on for CUDA only
    save_minutes: float = 5.0  # between saves of last.pt; longer if saving costs over 1 % of time
    seed: int = 0  # of the initial weights, the masks and the order of later passes


# A resumed run may change these; all others belong to the run.
FREE_ON_RESUME = {"hours", "steps", "data", "out", "microbatch", "device", "precision", "compile",
                  "save_minutes"}

PEAK_TFLOPS = {  # dense bf16 (fp16 before Ampere) with fp32 accumulation, NVIDIA's data sheets
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70,
    "A10": 125, "RTX A6000": 154.8, "RTX A4000": 76.7, "RTX 4090": 165.2, "RTX 3090": 71,
    "RTX 2080 Ti": 53.8, "V100": 125, "T4": 65,
}

PAD, UNK, CLS, SEP, MASK = range(5)  # prepare.py puts the special tokens first
VAL_ROWS = 4096  # validation looks at the first so many rows of val.bin ...
VAL_MASK_RATE = 0.15  # ... with this share masked, whatever the recipe masks
MAX_BAD_STEPS = 30  # in a row; fp16 may skip some 16 at first while its loss scale comes down


class Interrupted(Exception):
    """A stop was asked for while a step was under way."""


class CramError(Exception):
    """Something the user can mend; the message says what and how."""


def check(s):
    """Raise CramError for settings that cannot work together."""
    if not (math.isfinite(s.hours) and s.hours > 0):
        raise CramError(f"--hours must be a positive number of hours, not {s.hours}")
    if s.steps < 0:
        raise CramError(f"--steps must be a positive number of steps, not {s.steps}")
    if s.recipe != "crammed":
        raise CramError(f'unknown recipe "{s.recipe}": there is crammed')
    for name in ("layers", "width", "heads", "batch", "microbatch", "lr", "clip", "save_minutes"):
        if not getattr(s, name) > 0:
            raise CramError(f"--{name.replace('_', '-')} must be positive, not {getattr(s, name)}")
    if s.width % s.heads or s.width % 2:
        raise CramError(f"--width {s.width} must be even and a multiple of --heads {s.heads}")
    if not 0 < s.mask_rate < 1:
        raise CramError(f"--mask-rate must be between 0 and 1, not {s.mask_rate}")
    if s.precision not in ("auto", "bf16", "fp16", "fp32"):
        raise CramError(f"--precision must be auto, bf16, fp16 or fp32, not {s.precision}")
    if not 0 <= s.seed < 2**31:
        raise CramError(f"--seed must be from 0 to 2**31 - 1, not {s.seed}")


# -------------------------------------------------------------------------------- 2. Model


class CrammedBERT(nn.Module):
    """Token ids (B, T) in, hidden states (B, T, C) out; 119.6 M parameters at the paper's size."""

    def __init__(self, s, vocab_size, seq_len, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, s.width)
        self.position_scale = nn.Parameter(torch.empty(()))
        self.register_buffer("positions", sinusoid(seq_len, s.width), persistent=False)
        self.embed_norm = nn.LayerNorm(s.width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)  # 0 in pretraining: no row is seen often enough
        self.blocks = nn.ModuleList(Block(s.width, s.heads, dropout) for _ in range(s.layers))
        self.final_norm = nn.LayerNorm(s.width, eps=1e-12)
        self.init_weights()

    def init_weights(self):
        """N(0, 0.02) for every matrix; norms begin as 1 and 0, the position scale as 1/sqrt(C)."""
        nn.init.constant_(self.position_scale, self.embed.embedding_dim**-0.5)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def encode(self, ids, keep=None):
        """Hidden states (B, T, C) of ids (B, T); keep (B, T) is False where there is padding."""
        T = ids.shape[1]
        if T > len(self.positions):
            raise CramError(f"{T} tokens, but this model reads at most {len(self.positions)}")
        x = self.embed(ids) + self.position_scale * self.positions[:T]
        x = self.dropout(self.embed_norm(x))
        mask = None if keep is None else keep[:, None, None, :]  # of every head and every query
        for block in self.blocks:
            x = block(x, mask)
        return self.final_norm(x)

    def decode(self, x):
        """Logits (..., V) of hidden states (..., C), with the embedding as the matrix: no head."""
        return F.linear(x, self.embed.weight)

    def logits(self, ids, keep=None):
        """Logits (B, T, V) at every position; keep as in `encode`."""
        return self.decode(self.encode(ids, keep))

    def forward(self, ids, places, targets):
        """Mean cross-entropy, in nats, of targets (B, M) at places (B, M) of the rows ids (B, T).

        Only these places are decoded. The decoder is a fifth of all work even so.
        """
        x = self.encode(ids)
        x = x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))  # (B, M, C)
        return F.cross_entropy(self.decode(x).flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """Pre-norm: the sum x runs through all blocks without a norm in its way."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.ffn = GatedFFN(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask):
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        return x + self.dropout(self.ffn(self.norm2(x)))


class Attention(nn.Module):
    """Every token looks at every token of its row, also across documents (as in the paper)."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, mask):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(  # each (B, heads, T, C / heads)
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(x.transpose(1, 2).reshape(B, T, C))


class GatedFFN(nn.Module):
    """x · GELU(gate): the second half of the inner layer opens and closes the first."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        x, gate = self.up(x).chunk(2, dim=-1)
        return self.down(x * F.gelu(gate))


def sinusoid(seq_len, width):
    """Fixed positions (T, C) of "Attention is all you need": sine in even channels, cosine in odd.

    >>> sinusoid(2, 4)[1]  # sin 1, cos 1, sin 0.01, cos 0.01
    """
    angles = torch.arange(seq_len)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def flops_per_token(model, s, seq_len):
    """Floating-point operations to train on one token, forward and backward.

    6 for each weight of the blocks, 12·T·C a layer for the two products of attention, and the
    decoder for the share of tokens it sees: 623 M at the paper's size.
    """
    weights = sum(p.numel() for p in model.blocks.parameters())
    decoder = model.embed.weight.numel() * round(s.mask_rate * seq_len) / seq_len
    return 6 * weights + 12 * s.layers * seq_len * s.width + 6 * decoder


# ------------------------------------------------------------------- 3. Masking and schedules


def mask_tokens(rows, mask_rate, vocab_size, generator):
    """Choose tokens to guess: exactly 32 of a row of 128, of which 26 become <mask>, 3 a random
    token, and 3 stay (80/10/10 of BERT). All rows of a step are drawn at once, so that the masks
    do not depend on how the step is cut into microbatches. A fixed count keeps shapes static.

    rows (B, T) -> inputs (B, T), places (B, M), targets (B, M); M = round(mask_rate * T)
    """
    B, T = rows.shape
    M = max(1, round(mask_rate * T))
    n_mask, n_random = round(0.8 * M), round(0.1 * M)

    noise = torch.rand(B, T, device=rows.device, generator=generator)
    places = noise.topk(M, dim=1).indices  # M places of each row, in random order
    targets = rows.gather(1, places)

    guesses = targets.clone()
    guesses[:, :n_mask] = MASK
    guesses[:, n_mask : n_mask + n_random] = torch.randint(
        vocab_size, (B, n_random), device=rows.device, generator=generator
    )
    return rows.scatter(1, places, guesses), places, targets


def lr_at(f, peak):
    """Learning rate at the share f of the budget (config bert-o4): up from 1/4, down from 3/4."""
    f = min(max(f, 0.0), 1.0)
    return peak * min(0.25 + f, 4 * (1 - f))


def batch_at(f, batch):
    """Rows per step at the share f of the budget: 512, 1024, ... up to 8192 at f = 0.5625.

    Small batches learn more per token at first, large ones at the end. In the original the size of
    a stair is the microbatch, a hidden setting; here it is 1/16 of the batch on every card.
    """
    stair = max(1, batch // 16)
    return min(stair * (1 + int(16 * f / 0.6)), batch)


# -------------------------------------------------------------------------------- 4. Data


class Data:
    """What prepare.py wrote: rows (N, T) uint16 to train and validate on, and their tokenizer."""

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "meta.json").exists():
            raise CramError(f"no prepared data in {folder}: run prepare.py --out {folder} first")
        meta = json.loads((folder / "meta.json").read_text())
        self.tokenizer_json = (folder / "tokenizer.json").read_text()
        self.vocab_size, self.seq_len = meta["vocab_size"], meta["seq_len"]
        self.unigram_entropy = meta.get("unigram_entropy", math.nan)
        self.identity = {"train_sha256": meta["train_sha256"],
                         "tokenizer_sha256": meta["tokenizer_sha256"]}
        if hashlib.sha256(self.tokenizer_json.encode()).hexdigest() != meta["tokenizer_sha256"]:
            raise CramError(f"{folder}/tokenizer.json is not the one the tokens were made with")
        self.train = self.rows(folder / "train.bin", meta["train_rows"])
        self.val = self.rows(folder / "val.bin", meta["val_rows"])
        self.check_ids(self.val[:VAL_ROWS])

    def rows(self, path, count):
        size, expected = path.stat().st_size, count * self.seq_len * 2
        if size != expected or not count:
            raise CramError(f"{path} has {size:,} bytes and should have {expected:,} ({count:,} "
                             f"rows of {self.seq_len}): copy it again, or run prepare.py again")
        return np.memmap(path, "<u2", "r").reshape(count, self.seq_len)

    def check_ids(self, rows):
        if rows.max() >= self.vocab_size:
            raise CramError(f"token id {rows.max()} in the data, but its tokenizer ends at "
                             f"{self.vocab_size - 1}: run prepare.py again")
        return rows


class RowOrder:
    """Which row comes at which place of a run.

    The first pass reads the file in its order, the paper's curriculum, in steps of `stride` if the
    budget is too short for all rows. Each later pass is a new random order.
    """

    def __init__(self, n_rows, seed):
        self.n_rows, self.seed = n_rows, seed
        self.start, self.start_row, self.stride = 0, 0, 1.0
        self.permutation = functools.lru_cache(1)(self.permutation)  # 8 bytes a row

    def permutation(self, pass_number):
        return np.random.default_rng((self.seed, pass_number)).permutation(self.n_rows)

    def spread(self, place, rows_left):
        """From `place` on, take so long strides that `rows_left` rows reach the end of the file."""
        row = int(self.rows_at(place, 1)[0])
        if place < self.first_pass_end():
            self.start, self.start_row = place, row
            self.stride = max(1.0, (self.n_rows - row) / max(1, rows_left))

    def first_pass_end(self):
        return self.start + math.ceil((self.n_rows - self.start_row) / self.stride)

    def rows_at(self, place, count):
        """Row numbers of the places place ... place + count - 1."""
        places = np.arange(place, place + count)
        rows = self.start_row + ((places - self.start) * self.stride).astype(np.int64)
        rows = np.minimum(rows, self.n_rows - 1)
        later = np.maximum(0, places - self.first_pass_end())
        for n in np.unique(later[places >= self.first_pass_end()] // self.n_rows):
            of_pass = (places >= self.first_pass_end()) & (later // self.n_rows == n)
            rows[of_pass] = self.permutation(int(n) + 1)[later[of_pass] % self.n_rows]
        return rows


def validation_set(data, device):
    """Rows, places and targets that are the same on every machine and for every recipe."""
    rows = torch.from_numpy(data.val[:VAL_ROWS].astype(np.int64))
    noise = np.random.default_rng(0).random(rows.shape)
    places = torch.from_numpy(noise.argsort(1)[:, : max(1, round(VAL_MASK_RATE * rows.shape[1]))])
    inputs = rows.scatter(1, places, MASK)
    return [x.to(device) for x in (inputs, places, rows.gather(1, places))]


# -------------------------------------------------------------------------------- 5. Checkpoints


def save_whole(path, content):
    """Write beside the place, flush to the disk, rename: there whole or not at all.

    Raises OSError if it cannot be written; what was there before is then still there.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports some write errors as RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error


def load_file(path, device):
    """A dictionary that save_whole wrote. Never runs code that a stranger put into the file."""
    if not Path(path).is_file():
        raise CramError(f"no checkpoint {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CramError(f"{path} is not a checkpoint of cram.py, or holds code, which is not run "
                         f"({type(error).__name__})") from None
    if not isinstance(content, dict) or not {"model", "settings"} <= set(content):
        raise CramError(f"{path} is not a checkpoint of cram.py")
    return content


def settings_for(given):
    """The settings of this run, and the state of last.pt that it resumes from, or None."""
    resume = given.pop("resume", False)
    s, out = Settings(**given), Path(given.get("out", Settings.out))
    state = None
    if resume:
        if not (out / "last.pt").exists():
            raise CramError(f"nothing to resume: no last.pt in {out}")
        state = load_file(out / "last.pt", "cpu")
        saved = state["settings"]
        differs = [f"--{key.replace('_', '-')} {given[key]} (was {saved[key]})" for key in given
                   if key not in FREE_ON_RESUME and given[key] != saved[key]]
        if differs:
            raise CramError(f"{out} cannot be resumed with other settings: {', '.join(differs)}")
        if given.get("hours") and saved["steps"] or given.get("steps") and not saved["steps"]:
            raise CramError(f"{out} was begun with a budget in "
                             f"{'steps' if saved['steps'] else 'hours'}; resume it with the same")
        s = Settings(**{**saved, **given})
    elif (out / "last.pt").exists() or (out / "ckpt.pt").exists():
        raise CramError(f"{out} holds a run already: go on with it with --resume, or give another "
                         "--out")
    check(s)
    return s, state


# -------------------------------------------------------------------------------- 6. Training


class Clock:
    """The one clock of a run: seconds since its start, all earlier sessions included.

    It starts before the model is built and stops after the last update. `parts` says where the
    time went: what is not compilation, validation or saving is training.
    """

    def __init__(self, parts=None, elapsed=0.0):
        self.started = time.monotonic() - elapsed
        self.parts = parts or {"compile": 0.0, "validate": 0.0, "save": 0.0}

    def elapsed(self):
        return time.monotonic() - self.started

    def training(self):
        return self.elapsed() - sum(self.parts.values())

    @contextlib.contextmanager
    def part(self, name):
        start = time.monotonic()
        try:
            yield
        finally:
            self.parts[name] += time.monotonic() - start


class Stop:
    """Ctrl-C and SIGTERM ask for a stop, at the next microbatch; a second one leaves at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("\nstopping: saving last.pt (once more to leave at once)", flush=True)


def find_device(name, precision):
    """The device, the dtype of matrix products on it, and its peak in FLOP/s if known."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CramError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    native_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        precision = "fp32" if device.type != "cuda" else "bf16" if native_bf16 else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]

    peak = None
    if device.type == "cuda" and precision != "fp32":
        card = torch.cuda.get_device_name(device)
        peak = next((1e12 * tflops for key, tflops in PEAK_TFLOPS.items() if key in card), None)
    return device, dtype, peak


def build_optimizer(model, s):
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    groups = [{"params": others, "weight_decay": s.weight_decay},
              {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, fused=True)


@torch.no_grad()
def validate(model, autocast, val_set, rows_at_once):
    """Mean cross-entropy, in nats, over the masked tokens of the validation set."""
    total = 0.0
    n = len(val_set[0])
    for i in range(0, n, rows_at_once):
        part = [x[i : i + rows_at_once] for x in val_set]
        with autocast():
            total += model(*part).double() * len(part[0]) / n
    return total.item()


class Log:
    """log.jsonl, and the same lines in columns on the screen."""

    def __init__(self, path, step):
        """A new file, or the one of the resumed run up to the step it goes on from."""
        kept = []
        if step:
            for line in path.read_text().splitlines() if path.exists() else ():
                with contextlib.suppress(ValueError):  # the last line of a killed run may be torn
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        part = path.with_suffix(".part")
        part.write_text("".join(kept))
        os.replace(part, path)
        self.file = open(path, "a", buffering=1)

    def header(self):
        print("    time   done     step  batch        lr    loss     val    tokens/s     MFU")

    def line(self, e):
        self.file.write(json.dumps(e) + "\n")
        hours, rest = divmod(int(e["elapsed_s"]), 3600)
        val = f"{e['val_loss']:7.3f}" if "val_loss" in e else " " * 7
        mfu = "    n/a" if e["mfu"] is None else f"{e['mfu']:7.1%}"
        print(f"{hours:2}:{rest // 60:02}:{rest % 60:02} {e['progress']:6.1%} {e['step']:8} "
              f"{e['batch']:6} {e['lr']:9.2e} {e['loss']:7.3f} {val} {e['tokens_per_s']:11,.0f} "
              f"{mfu}", flush=True)


def train(s, state=None):
    """Train by the settings s from the start, or go on from the state that last.pt holds."""
    clock = Clock() if state is None else Clock(state["clock"], state["run"]["elapsed_s"])

    # The data, the model, the optimizer
    data = Data(s.data)
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    device, dtype, peak_flops = find_device(s.device, s.precision)
    use_compile = device.type == "cuda" if s.compile is None else s.compile
    autocast = functools.partial(
        torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32
    )
    torch.manual_seed(s.seed)
    model = CrammedBERT(s, data.vocab_size, data.seq_len).to(device)
    compiled = torch.compile(model) if use_compile else model
    optimizer = build_optimizer(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator(device)
    order = RowOrder(len(data.train), s.seed)
    val_set = validation_set(data, device)

    # Where the run stands: all that changes from step to step, and so all that a resume needs
    run = {"step": 0, "rows": 0, "elapsed_s": 0.0, "skipped": 0, "bad_in_a_row": 0,
           "s_per_row": 0.0, "spread": False, "loss": math.nan, "loss_sum": 0.0, "loss_steps": 0,
           "logged": {"rows": 0, "training_s": 0.0, "interval": 0, "val": 0}}
    if state is not None:
        differs = [key for key in data.identity if state["data"][key] != data.identity[key]]
        if differs:
            raise CramError(f"{s.data} is not what the run in {out} was trained on: other "
                            + " and ".join(differs))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        order.start, order.start_row, order.stride = state["order"]
        run = state["run"]
        print(f"resuming after step {run['step']:,}, {run['elapsed_s'] / 3600:.2f} h")
        if (s.hours, s.steps) != (state["settings"]["hours"], state["settings"]["steps"]):
            print("another budget: the schedule continues at what is spent / the new budget")
            run["spread"] = False
            run["logged"].update(interval=0, val=0)
        del state  # 1.4 GB

    budget_s = s.hours * 3600
    interval = min(0.02, 100 / s.steps if s.steps else 60 / budget_s)  # of the budget, to a line
    flops = flops_per_token(model, s, data.seq_len)

    def progress():
        return run["step"] / s.steps if s.steps else clock.elapsed() / budget_s

    def save_last():
        run["elapsed_s"] = clock.elapsed()
        save_whole(out / "last.pt", {
            "settings": asdict(s), "data": data.identity, "run": run, "clock": clock.parts,
            "order": (order.start, order.start_row, order.stride), "model": model.state_dict(),
            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})

    # The next rows are read in a thread while the card computes. How many a step takes is known
    # only when it begins, so as many are read as it can take.
    reader = ThreadPoolExecutor(1)

    def read(place):
        rows = data.check_ids(data.train[order.rows_at(place, s.batch)])
        rows = torch.from_numpy(rows.astype(np.int32))
        rows = rows.pin_memory() if device.type == "cuda" else rows
        return rows.to(device, non_blocking=True)

    def spread(rows_left):
        """Fit the reading order to the budget, once it is known how many rows it will take."""
        order.spread(run["rows"], rows_left)
        run["spread"] = True
        passes = (run["rows"] + rows_left) / len(data.train)
        print(f"the budget will read {run['rows'] + rows_left:,.0f} rows, {passes:.2f} passes over "
              + ("the data" if order.stride == 1 else
                 f"the data: every {order.stride:.1f}th row, so that its order spans the run"))

    if s.steps and not run["spread"]:
        spread(sum(batch_at(k / s.steps, s.batch) for k in range(run["step"], s.steps)))

    def report(f, lr, batch, measure):
        """Write a line of the log, with the validation loss if `measure`; returns its fields."""
        if run["loss_steps"]:
            run["loss"] = run["loss_sum"] / run["loss_steps"]
        rows = run["rows"] - run["logged"]["rows"]
        speed = rows * data.seq_len / (clock.training() - run["logged"]["training_s"])
        entry = {"step": run["step"], "tokens": run["rows"] * data.seq_len,
                 "elapsed_s": clock.elapsed(), "progress": f, "lr": lr, "batch": batch,
                 "loss": run["loss"], "tokens_per_s": speed,
                 "mfu": speed * flops / peak_flops if peak_flops else None}
        if measure:
            with clock.part("validate"):
                entry["val_loss"] = validate(model, autocast, val_set, s.microbatch)
        log.line(entry)
        run["loss_sum"], run["loss_steps"] = 0.0, 0
        run["logged"] = {"rows": run["rows"], "training_s": clock.training(),
                         "interval": int(f / interval), "val": int(20 * f)}
        return entry

    # Forward and backward of one step. Nothing in here waits for the card.
    stop = None
    sizes_compiled = set()

    def accumulate(rows):
        """The mean loss over the rows of a step, its gradient left in the parameters."""
        generator.manual_seed((s.seed << 32) + run["step"])
        rows = rows.long()
        batch = mask_tokens(rows, s.mask_rate, data.vocab_size, generator)
        total = torch.zeros((), device=device)
        for i in range(0, len(rows), s.microbatch):
            if stop and stop.asked:
                raise Interrupted
            part = [x[i : i + s.microbatch] for x in batch]
            share = len(part[0]) / len(rows)
            new = use_compile and len(part[0]) not in sizes_compiled
            with clock.part("compile") if new else contextlib.nullcontext():
                with autocast():
                    loss = compiled(*part) * share
                scaler.scale(loss).backward()
                total += loss.detach()
                if new:
                    total.item()  # waits, once for each size: compilation is to be told apart
                    sizes_compiled.add(len(part[0]))
        return total

    weights = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{weights:,} parameters on {name}, {str(dtype)[6:]}{', compiled' * use_compile}; "
          f"{len(data.train):,} rows of {data.seq_len}\n"
          f"a model that knows only how frequent each token is has loss {data.unigram_entropy:.3f} "
          f"(unigram entropy)")
    log = Log(out / "log.jsonl", run["step"])
    log.header()
    fetched = reader.submit(read, run["rows"])
    saved_at, save_took = time.monotonic(), 0.0

    while True:
        f = progress()
        batch, lr = batch_at(f, s.batch), lr_at(f, s.lr)
        if f >= 1 or not s.steps and clock.elapsed() + batch * run["s_per_row"] > budget_s:
            break  # the budget is spent, or the step would end behind it
        began = clock.training()
        rows = fetched.result()[:batch]
        fetched = reader.submit(read, run["rows"] + batch)

        try:
            loss = accumulate(rows)
        except Interrupted:
            break  # a stop inside an accumulation: this step is done again on resume
        except torch.OutOfMemoryError:
            loss = None
        if loss is None:  # out here, because the exception holds on to the memory
            if s.microbatch == 1:
                raise CramError("a single row at a time does not fit into the card's memory")
            s.microbatch = min(s.microbatch, batch) // 2
            print(f"out of memory: {s.microbatch} rows at a time from here on, the same recipe")
            optimizer.zero_grad()
            torch.compiler.reset()
            sizes_compiled.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            fetched = reader.submit(read, run["rows"])
            continue

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        loss, norm = torch.stack([loss, norm]).tolist()  # the one wait for the card in a step
        if math.isfinite(loss) and math.isfinite(norm):
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.step(optimizer)
            run["loss_sum"] += loss
            run["loss_steps"] += 1
            run["bad_in_a_row"] = 0
        else:
            run["skipped"] += 1
            run["bad_in_a_row"] += 1
            if run["bad_in_a_row"] == MAX_BAD_STEPS:
                raise CramError(f"loss or gradient were not finite {MAX_BAD_STEPS} times in a row: "
                                "the run has broken down. Resume it from last.pt, or start again "
                                "with a smaller --lr")
        scaler.update()
        optimizer.zero_grad()
        run["step"] += 1
        run["rows"] += batch
        run["s_per_row"] = (clock.training() - began) / batch
        stop = stop or Stop()  # from here on there is something to save

        f = progress()
        if not run["spread"] and f > 0.01 and run["step"] >= 5:  # now the speed is known
            spread(run["rows"] / clock.training() * (budget_s - clock.elapsed()))
            fetched = reader.submit(read, run["rows"])

        measure = int(20 * f) > run["logged"]["val"]
        if f < 1 and (measure or int(f / interval) > run["logged"]["interval"]):
            report(f, lr, batch, measure)

        if time.monotonic() - saved_at > max(60 * s.save_minutes, 110 * save_took):
            saved_at = time.monotonic()
            with clock.part("save"):
                try:
                    save_last()
                except OSError as error:
                    print(f"{error}; training goes on, the last.pt from before is kept")
            save_took = time.monotonic() - saved_at

    spent = {**clock.parts, "train": clock.training()}
    elapsed = clock.elapsed()  # the clock stops here: what follows is not counted
    reader.shutdown(cancel_futures=True)
    if stop and stop.asked:
        save_last()
        print(f"stopped after step {run['step']:,} and saved; go on with --resume")
        return

    last = report(progress(), lr, batch, measure=True)
    save_whole(out / "ckpt.pt", {
        "settings": asdict(s), "vocab_size": data.vocab_size, "seq_len": data.seq_len,
        "tokenizer": data.tokenizer_json, "model": model.state_dict(),
        "result": {key: last[key] for key in ("step", "tokens", "loss", "val_loss")}})
    save_last()

    tokens = run["rows"] * data.seq_len
    memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if (
        device.type == "cuda") else "n/a"
    exaflop = f"{elapsed * peak_flops / 1e18:.3f}" if peak_flops else "n/a"
    print(f"""
tokens           {tokens:,} in {run['rows']:,} rows, {run['rows'] / len(data.train):.2f} passes
steps            {run['step']:,}, of which {run['skipped']:,} skipped
wall clock       {elapsed:.1f} s of {'--steps' if s.steps else f'{budget_s:.1f} s'}: """
          + ", ".join(f"{part} {seconds:.1f} s ({seconds / elapsed:.1%})"
                      for part, seconds in spent.items()) + f"""
after the clock  {clock.elapsed() - elapsed:.1f} s for the final validation and checkpoint
peak memory      {memory}
exaFLOP          {exaflop} as the paper counts (peak of the card x time), {tokens * flops / 1e18:.3f} used
training loss    {last['loss']:.3f}
validation loss  {last['val_loss']:.3f} (unigram entropy {data.unigram_entropy:.3f})
wrote            {out / 'ckpt.pt'}""")


# -------------------------------------------------------------------------------- 7. Using it


def load_checkpoint(path, device="cpu", dropout=0.0):
    """The finished model in evaluation mode, and its tokenizer, from a ckpt.pt.

    model, tokenizer = load_checkpoint("out/ckpt.pt")
    Raises CramError if the file is missing or something else.
    """
    content = load_file(path, device)
    if "tokenizer" not in content:
        raise CramError(f"{path} is a run in progress, not a finished model: give its ckpt.pt")
    s = Settings(**content["settings"])
    model = CrammedBERT(s, content["vocab_size"], content["seq_len"], dropout)
    model.load_state_dict(content["model"])
    tokenizer = Tokenizer.from_str(content["tokenizer"])
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def fill(path, text, device="cpu"):
    """Print the five likeliest tokens for each <mask> of the text."""
    model, tokenizer = load_checkpoint(path, device)
    ids = [CLS, *tokenizer.encode(text, add_special_tokens=False).ids, SEP]
    if MASK not in ids:
        raise CramError('--fill needs a text with at least one <mask>, as in "paris is <mask>."')
    logits = model.logits(torch.tensor([ids], device=device))[0]
    for place in (i for i, token in enumerate(ids) if token == MASK):
        best = logits[place].float().softmax(0).topk(5)
        guesses = [f"{tokenizer.id_to_token(i)} {p:.1%}"
                   for p, i in zip(best.values.tolist(), best.indices.tolist())]
        print(f"<mask> -> {', '.join(guesses)}")


def parse_arguments(argv=None):
    """A flag for each setting, its help the comment behind it. Only what was given is returned."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Settings), re.M))
    parser = argparse.ArgumentParser(
        description="Train a BERT from scratch on one GPU in one day.",
        epilog="Examples: cram.py --hours 24;  cram.py --layers 2 --width 128 --heads 4 --batch 32 "
               "--steps 200 --out out/tiny;  cram.py --resume;  cram.py --fill 'a <mask> sentence'",
        argument_default=argparse.SUPPRESS,
    )
    for f in fields(Settings):
        boolean = isinstance(f.default, bool) or f.default is None
        kind = {"action": argparse.BooleanOptionalAction} if boolean else {"type": f.type}
        default = "" if f.default is None else f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), **kind,
                            help=comments[f.name].replace("%", "%%") + default)
    parser.add_argument("--resume", action="store_true",
                        help="go on where the run in --out stopped, with its settings")
    parser.add_argument("--fill", metavar="TEXT",
                        help="print the model's best guesses for each <mask> in TEXT, then exit")
    return vars(parser.parse_args(argv))


def main():
    given = parse_arguments()
    text = given.pop("fill", None)
    if text is not None:
        out = given.get("out", Settings.out)
        device = given.get("device", "cpu")
        fill(Path(out) / "ckpt.pt", text, device)
    else:
        train(*settings_for(given))


if __name__ == "__main__":
    try:
        main()
    except (CramError, OSError) as error:
        sys.exit(f"cram.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ncram.py: stopped before the first step")
