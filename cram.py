"""Train a BERT from scratch on one GPU in one day.

    python prepare.py                         # once: text -> data/
    python cram.py --hours 24                 # data/ -> out/ckpt.pt
    python cram.py --resume                   # go on where a stopped run is
    python cram.py --fill "paris is the <mask> of france."
    python cram.py --recipe modern --hours 0.08 --out out/modern
    python cram.py --out out/modern --export bert     # a folder for Hugging Face transformers
    python cram.py --layers 2 --width 128 --heads 4 --batch 32 --steps 200 --out out/tiny
    torchrun --standalone --nproc_per_node=8 cram.py  # one process for each of eight GPUs

Model and recipe are those of "Cramming: Training a Language Model on a Single GPU in One Day"
(Geiping & Goldstein, arXiv 2212.14034, version 2), or with --recipe modern our own, which learns
faster: RECIPES has what it changes. How the paper's differs from an ordinary BERT:

- pre-norm blocks, biases only in the norms, a gated FFN, no head; fixed sinusoid positions with one
  learned scale;
- rows without padding; a quarter of the tokens is masked, and only that quarter is decoded;
- one clock: learning rate and batch size follow the share of the time budget that is spent.

One H200 trains at 730,000 tokens a second, 46 % of its peak; README.md has what comes of it, with
the commands. The sections: settings, model, recipe (masks, schedules, optimizers), data, training,
what the training loop calls, what to do with the finished model, command line.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.attention import SDPBackend, sdpa_kernel

# ------------------------------------------------------------------------------------- 1. Settings


@dataclass
class Settings:
    """Every setting of a run. Each is a flag of the same name, its comment the flag's help."""

    recipe: str = "crammed"  # crammed: the paper's; modern: ours, with other defaults below

    # Budget
    hours: float = 24.0  # wall-clock budget in hours, compilation included
    steps: int = 0  # budget in optimizer steps instead, which makes a run repeatable; 0 = --hours

    # Folders
    data: str = "data"  # what prepare.py wrote
    out: str = "out"  # where last.pt, ckpt.pt and log.jsonl go

    # Model: paper section 4.2
    model: str = "crammed"  # crammed: sinusoid positions; modernbert: rotary ones, a head
    layers: int = 16  # transformer blocks
    width: int = 768  # C, channels
    heads: int = 12  # attention heads of width / heads channels

    # Optimization: paper section 4.3
    optimizer: str = "adamw"  # adamw; muon: for the matrices of blocks and head, all else adamw
    batch: int = 8192  # rows per optimizer step after the ramp
    ramp: float = 0.6  # share of the budget in which the batch grows, by 16ths; 0: no growth
    lr: float = 1e-3  # peak learning rate
    lr_start: float = 0.25  # rate to start with, as a share of --lr
    warmup: float = 0.75  # share of the budget until the peak
    decay: float = 0.25  # last share of the budget, in which the rate falls to zero
    beta1: float = 0.9  # AdamW: decay of the mean of gradients
    beta2: float = 0.98  # AdamW: decay of the mean of their squares
    eps: float = 1e-12  # AdamW: added to the root of that
    weight_decay: float = 0.01  # on matrices, embeddings and the position scale, not on norms
    clip: float = 0.5  # largest norm of the gradient

    # Data
    mask_rate: float = 0.25  # share of tokens to guess; BERT has 15 %, but sees each row often
    mask_replace: float = 0.8  # share of these that becomes <mask>; half the rest is random tokens
    order: str = "file"  # of the first pass: file, as prepare.py sorted it; or random

    seed: int = 0  # of the initial weights, the masks and the order of random passes

    # Machine: speed and rounding only; but each type of device draws weights and masks of its own
    microbatch: int = 512  # rows per forward pass; halved until it fits into the card's memory
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "auto"  # auto, bf16, fp16, fp32; auto: on CUDA bf16 or, without it, fp16
    compile: bool | None = None  # torch.compile; if not given, on for CUDA cards from Volta on
    save_minutes: float = 5.0  # between saves of last.pt; more if saving costs over 1 % of the time


RECIPES = {  # what a recipe sets where the command line does not
    "crammed": {},
    "modern": {  # chosen at two to ten minutes; for a day see "What a day wants" in README.md
        "model": "modernbert", "optimizer": "muon", "order": "random",
        "batch": 512, "ramp": 0.0, "lr": 2e-3, "lr_start": 0.0, "warmup": 0.03, "decay": 0.7,
        "weight_decay": 0.5,  # with 0.05 the loss is the same, but the model fine-tunes badly
        "clip": 1.0, "mask_rate": 0.3, "mask_replace": 1.0,
    },
}

MILESTONES = {  # said at the start of a run that changes nothing of its recipe
    "crammed": "validation loss in ten minutes on an H200, on the text of README.md: 6.7 at 20 %, "
               "6.4 at 50 %,\n5 to 6 at 80 %, 4.1 to 4.7 at the end\n"
               "the paper's day on an A6000 ends at a training loss of 1.9 to 2.0",
    "modern": "validation loss in ten minutes on an H200, on the text of README.md: 4.7 at 5 %, "
              "3.8 at 10 %,\n3.4 at 20 %, 3.0 at 50 %, 2.5 at the end",
}

PAD, UNK, CLS, SEP, MASK = range(5)  # prepare.py puts the special tokens first


class CramError(Exception):
    """Something the user can mend; the message says what and how."""


# ---------------------------------------------------------------------------------------- 2. Model


class CrammedBERT(nn.Module):
    """encode: token ids (B, T) -> hidden states (B, T, C); logits: -> (B, T, V); forward: -> the
    loss of masked rows. 119.6 M parameters at the paper's size.

    With --model modernbert it is what Hugging Face transformers calls ModernBERT, with global
    attention everywhere: rotary positions instead of the sinusoid, norms without bias, no norm at
    the entrance of the first block (the embedding's has just done it), a head before the decoder.
    """

    def __init__(self, s, vocab_size, seq_len):
        super().__init__()
        self.modernbert = modernbert = s.model == "modernbert"
        norm = functools.partial(
            nn.LayerNorm, s.width, eps=1e-5 if modernbert else 1e-12, bias=not modernbert)
        self.seq_len = seq_len
        self.embed = nn.Embedding(vocab_size, s.width)
        if modernbert:
            self.register_buffer("rotary", rotary(seq_len, s.width // s.heads), persistent=False)
        else:
            self.position_scale = nn.Parameter(torch.empty(()))
            self.register_buffer("sinusoid", sinusoid(seq_len, s.width), persistent=False)
        self.embed_norm = norm()
        self.dropout = nn.Dropout(0.0)  # off in pretraining; finetune_glue.py turns all on
        self.blocks = nn.ModuleList(Block(s, norm) for _ in range(s.layers))
        if modernbert:
            self.blocks[0].norm1 = nn.Identity()
        self.final_norm = norm()
        self.head = (nn.Sequential(nn.Linear(s.width, s.width, bias=False), nn.GELU(), norm())
                     if modernbert else nn.Identity())
        self.init_weights()

    def init_weights(self):
        """N(0, 0.02) for every matrix; norms begin as 1 and 0, the position scale as 1/sqrt(C).
        With --model modernbert each block begins as the identity: what it adds to x is zero."""
        for name, p in self.named_parameters():
            if self.modernbert and name.endswith(("attention.out.weight", "ffn.down.weight")):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif p.ndim == 0:
                nn.init.constant_(p, self.embed.embedding_dim**-0.5)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)

    def encode(self, ids, keep=None, positions=None):
        """Hidden states (B, T, C) of ids (B, T); keep (B, T) is False where there is padding.
        With positions (B, M), only theirs: (B, M, C)."""
        T = ids.shape[1]
        if T > self.seq_len:
            raise CramError(f"{T} tokens, but this model reads at most {self.seq_len}")
        x, cos_sin = self.embed(ids), None
        if self.modernbert:
            cos_sin = self.rotary[:, :T]
        else:
            x = x + self.position_scale * self.sinusoid[:T]
        x = self.dropout(self.embed_norm(x))
        if torch.is_autocast_enabled(x.device.type):  # half the memory traffic between the blocks
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if keep is not None:
            keep = keep[:, None, None, :]  # for every head and every query
        for block in self.blocks[:-1]:
            x = block(x, keep, cos_sin)
        x = self.blocks[-1](x, keep, cos_sin, positions)  # what is not decoded stops there
        return self.final_norm(x)

    def decode(self, x):
        """Logits (..., V) of hidden states (..., C), with the embedding as the last matrix."""
        return F.linear(self.head(x), self.embed.weight)

    def logits(self, ids, keep=None):
        """Logits (B, T, V) at every position; keep as in `encode`."""
        return self.decode(self.encode(ids, keep))

    def forward(self, ids, positions, targets):
        """Mean cross-entropy, in nats, of targets (B, M) at positions (B, M) of rows ids (B, T).

        Only these are decoded: 6 % of all work, where decoding every position would be 20 %.
        """
        logits = self.decode(self.encode(ids, positions=positions))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """Pre-norm: the sum x runs through all blocks without a norm in its way."""

    def __init__(self, s, norm):
        super().__init__()
        self.norm1 = norm()
        self.attention = Attention(s.width, s.heads)
        self.norm2 = norm()
        self.ffn = GatedFFN(s.width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, keep, cos_sin, positions=None):
        y = self.attention(self.norm1(x), keep, cos_sin)
        if positions is not None:  # in the last block: nobody looks at the others any more
            positions = positions[:, :, None].expand(-1, -1, x.shape[2])
            x, y = x.gather(1, positions), y.gather(1, positions)  # (B, M, C)
        x = x + self.dropout(y)
        return x + self.dropout(self.ffn(self.norm2(x)))


class Attention(nn.Module):
    """Every token looks at every token of its row, also across documents (as in the paper)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(0.0)  # only its p: the attention kernel drops
        self.q, self.k, self.v, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x, keep, cos_sin):
        B, T, C = x.shape
        q, k, v = (linear(x).view(B, T, self.heads, C // self.heads).transpose(1, 2)
                   for linear in (self.q, self.k, self.v))
        if cos_sin is not None:
            q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        x = F.scaled_dot_product_attention(  # each (B, heads, T, D), D = C / heads
            q, k, v, attn_mask=keep, dropout_p=self.dropout.p if self.training else 0.0
        )
        return self.out(x.transpose(1, 2).reshape(B, T, C))


class GatedFFN(nn.Module):
    """up(x) · GELU(gate(x)): one half of the inner layer opens and closes the other.

    Two matrices, where others split the output of one: the backward pass then has no gradients to
    copy together.
    """

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.down(self.up(x) * F.gelu(self.gate(x)))


def sinusoid(seq_len, width):
    """Fixed positions (T, C) of "Attention is all you need": sine in even channels, cosine in odd,
    so that sinusoid(2, 4)[1] is sin 1, cos 1, sin 0.01, cos 0.01."""
    angles = torch.arange(seq_len)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


ROPE_THETA = 10_000.0  # RoFormer's base: pair i turns by THETA**(-2i/D) radians a position


def rotary(seq_len, D):
    """Cosine and sine (2, T, D / 2) of the angle that each pair of channels turns by (RoFormer)."""
    angles = torch.arange(seq_len)[:, None] * ROPE_THETA ** (-torch.arange(0, D, 2) / D)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, cos_sin):
    """x (B, heads, T, D) with the pairs of channels (i, i + D / 2) turned by their position, so
    that the product of a query and a key depends on how far apart they are."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos_sin  # float32, where x may be bf16
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def flops_per_token(model, s, seq_len):
    """Floating-point operations to train on one token, forward and backward.

    6 for each weight of the blocks, 12·T·C a layer for the two products of attention, and the
    decoder for the share of tokens it sees: 623 M at the paper's size. (The last FFN is counted
    in full, 2.6 % more than is computed; the head of modernbert, 0.2 %, is not.)
    """
    weights = sum(p.numel() for p in model.blocks.parameters())
    decoder = model.embed.weight.numel() * round(s.mask_rate * seq_len) / seq_len
    return 6 * weights + 12 * s.layers * seq_len * s.width + 6 * decoder


# --------------------------------------------------------------------------------------- 3. Recipe


def mask_tokens(rows, mask_rate, mask_replace, vocab_size, generator):
    """Choose tokens to guess, as many in every row, which keeps shapes static: with the paper's
    settings 32 of 128, of which 26 become <mask>, 3 a random token, and 3 stay (80/10/10 of BERT).
    All rows of a step are drawn at once, so that the masks do not depend on how the step is cut
    into microbatches. (Validation has masks of its own, see validation_set.)

    rows (B, T) -> inputs (B, T), positions (B, M), targets (B, M); M = round(mask_rate * T)
    """
    B, T = rows.shape
    M = max(1, round(mask_rate * T))
    n_mask = round(mask_replace * M)
    n_random = (M - n_mask) // 2

    noise = torch.rand(B, T, device=rows.device, generator=generator)
    positions = noise.topk(M, dim=1).indices  # in random order, so that slices are random too
    targets = rows.gather(1, positions)

    shown = targets.clone()
    shown[:, :n_mask] = MASK
    shown[:, n_mask : n_mask + n_random] = torch.randint(
        vocab_size, (B, n_random), device=rows.device, generator=generator
    )
    return rows.scatter(1, positions, shown), positions, targets


def mask_seed(seed, step):
    """Seed of a step's masks. Mixed, because the CPU's generator reads the lowest 32 bits only."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]) >> 1  # int64


def lr_at(f, s):
    """Learning rate at the share f of the budget: up, flat, down to zero.

    The paper's (config bert-o4) is lr · min(0.25 + f, 4 (1 - f)), with its peak at f = 0.75.
    """
    up = s.lr_start + (1 - s.lr_start) * f / s.warmup if s.warmup else 1.0
    down = (1 - f) / s.decay if s.decay else 1.0
    return s.lr * max(0.0, min(up, 1.0, down))


def batch_at(f, s):
    """Rows per step at the share f of the budget; the paper's: 512, 1024, ... 8192 at f = 0.5625
    (15/16 of the ramp).

    Small batches learn more per token at first, large ones at the end. In the original the size of
    a stair is the microbatch, a hidden setting; here it is 1/16 of the batch, whatever the card.
    """
    stairs = min(1 + int(16 * f / s.ramp), 16) if s.ramp else 16
    return max(1, s.batch * stairs // 16)


def build_optimizers(model, s, team):
    """AdamW for everything; with --optimizer muon, Muon for the matrices of blocks and head (Q, K
    and V one by one), AdamW for the rest: norms, and the embedding, which is also the decoder.
    Muon's work is shared among the team, the processes of the run (section 6)."""
    matrices = []
    if s.optimizer == "muon":
        matrices = [p for p in model.parameters() if p.ndim == 2 and p is not model.embed.weight]
    taken = set(matrices)
    others = [p for p in model.parameters() if p not in taken]
    groups = [{"params": [p for p in others if p.ndim != 1], "weight_decay": s.weight_decay},
              {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0}]  # norms
    adamw = torch.optim.AdamW(groups, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, fused=True)
    return [adamw, Muon(matrices, s.lr, s.weight_decay, team)] if matrices else [adamw]


class Muon(torch.optim.Optimizer):
    """Momentum with all its singular values made about equal (Jordan et al., 2024), for matrices.

    The same update as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", which scales it to the
    size of AdamW's so that both share a learning rate ("Muon is Scalable for LLM Training", 2.2).
    This one takes all matrices of a shape in one batch and 7 ms a step on an H200, that one takes
    them one by one and 51 ms. Each process of a team orthogonalizes its share of them.
    """

    def __init__(self, matrices, lr, weight_decay, team, momentum=0.95):
        self.team = team
        shapes = {}
        for p in matrices:
            shapes.setdefault(p.shape, []).append(p)
        super().__init__([{"params": same} for same in shapes.values()],
                         {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, beta, lr = group["params"], group["momentum"], group["lr"]
            grad = torch.stack([p.grad for p in params])
            state = self.state[params[0]]  # one momentum for the whole group
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - beta)
            ahead = grad.lerp(state["momentum"], beta)  # as Nesterov
            update = self.team.gather(orthogonalize(self.team.share(ahead)), len(params))
            size = 0.2 * max(params[0].shape) ** 0.5  # root mean square 0.2, as AdamW's
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, list(update.to(grad.dtype)), alpha=-lr * size)


def orthogonalize(x):
    """Bring the singular values of matrices x (N, rows, columns) near 1: five Newton-Schulz steps
    x <- a x + b (x x') x + c (x x')² x with Jordan's coefficients. bf16 is good enough for them,
    but very slow where the chip has no bf16."""
    tall = x.shape[1] > x.shape[2]
    if has_bf16(x.device):
        x = x.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# ----------------------------------------------------------------------------------------- 4. Data

VAL_ROWS = 4096  # validation looks at the first so many rows of val.bin ...
VAL_MASK_RATE = 0.15  # ... with this share masked, whatever the recipe masks


class Data:
    """What prepare.py wrote: rows (N, T) uint16 to train and validate on, and their tokenizer."""

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "meta.json").exists():
            raise CramError(f"no prepared data in {folder}: run prepare.py --out {folder} first")
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.vocab_size, self.seq_len = meta["vocab_size"], meta["seq_len"]
            self.source = meta["source"]
            self.unigram_entropy = meta["unigram_entropy"]
            self.identity = {key: meta[key] for key in ("train_sha256", "tokenizer_sha256")}
        except (ValueError, KeyError, TypeError):
            raise CramError(f"{folder}/meta.json is damaged: copy it again, or delete {folder} and "
                            "run prepare.py again") from None
        self.tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
        if hashlib.sha256(self.tokenizer_json.encode()).hexdigest() != meta["tokenizer_sha256"]:
            raise CramError(f"{folder}/tokenizer.json is not the one the tokens were made with")
        self.train = self.open_rows(folder / "train.bin", meta["train_rows"])
        self.val = self.check_ids(self.open_rows(folder / "val.bin", meta["val_rows"])[:VAL_ROWS])

    def open_rows(self, path, count):
        size, expected = path.stat().st_size, count * self.seq_len * 2
        if size != expected or not count:
            raise CramError(f"{path} has {size:,} bytes and should have {expected:,} ({count:,} "
                            f"rows of {self.seq_len}): copy it again, or run prepare.py again")
        return np.memmap(path, "<u2", "r").reshape(count, self.seq_len)

    def check_ids(self, rows):
        """The rows, if the embedding has a vector for each id: a GPU would die of it without saying
        why."""
        if rows.max() >= self.vocab_size:
            raise CramError(f"token id {rows.max()} in the data, but its tokenizer ends at "
                            f"{self.vocab_size - 1}: run prepare.py again")
        return rows


class RowOrder:
    """Which row of train.bin comes at which position of a run.

    The first pass reads the file in its order, the paper's curriculum; a budget too short for all
    of it takes every `stride`-th row, so as to get to its end. Later passes are random orders, and
    with --order random there are no others. (prepare.py has sorted the file; train sets the
    stride.)

    In the first pass, row = start_row + (position - start) * stride.
    """

    def __init__(self, n_rows, s):
        self.n_rows, self.seed = n_rows, s.seed
        self.start, self.start_row, self.stride = 0, 0, 1.0
        if s.order == "random":
            self.start_row = n_rows  # the first pass has nothing left to read

    def first_pass_end(self):
        return self.start + math.ceil((self.n_rows - self.start_row) / self.stride)

    def fit(self, position, rows_left):
        """From `position` on, stride so that the rows that the budget still takes end with the
        file."""
        if position < self.first_pass_end():
            self.start_row = int(self.rows_at(position, 1)[0])
            self.start = position
            self.stride = max(1.0, (self.n_rows - self.start_row) / max(1, rows_left))

    def rows_at(self, position, count):
        """Row numbers of the positions from `position` on."""
        parts = []
        while count:
            left = self.first_pass_end() - position  # of the first pass; below 0 it is long over
            if left > 0:
                offsets = np.arange(position, position + min(left, count)) - self.start
                rows = self.start_row + (offsets * self.stride).astype(np.int64)
                parts.append(np.minimum(rows, self.n_rows - 1))  # a product may round up
            else:
                later_pass, offset = divmod(-left, self.n_rows)
                order = permutation(self.n_rows, self.seed, later_pass)
                parts.append(order[offset : offset + count])
            position += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts)


@functools.lru_cache(2)  # 8 bytes a row each; two, as what is read may span two passes
def permutation(n_rows, seed, later_pass):
    return np.random.default_rng((seed, later_pass)).permutation(n_rows)


def validation_set(data, device):
    """Rows, positions and targets that are the same on every machine and for every recipe."""
    rows = torch.from_numpy(data.val.astype(np.int64))
    M = max(1, round(VAL_MASK_RATE * data.seq_len))
    positions = torch.from_numpy(np.random.default_rng(0).random(rows.shape).argsort(1)[:, :M])
    inputs, targets = rows.scatter(1, positions, MASK), rows.gather(1, positions)
    return [x.to(device) for x in (inputs, positions, targets)]


# ------------------------------------------------------------------------------------- 5. Training

SAVE_SHARE = 0.01  # of the time may go into saving last.pt
MAX_SKIPPED = 30  # steps in a row; fp16 may skip some 16 at first while its loss scale comes down


@dataclass
class Run:
    """Where a run stands: its numbers, beside weights, optimizer and clock."""

    step: int = 0
    rows: int = 0  # taken so far, which is the position in the data
    elapsed_s: float = 0.0  # on the clock, when last.pt was written
    lr: float = 0.0  # of the last step
    batch: int = 0
    s_per_row: float = 0.0
    skipped: int = 0  # steps whose loss or gradient was not finite ...
    skipped_in_a_row: int = 0  # ... since the last good one
    loss: float | None = None  # what the last line of the log said
    tokens_per_s: float = 0.0
    loss_sum: float = 0.0  # since that line
    loss_steps: int = 0
    timed_rows: int = 0  # rows and seconds of training until that line
    timed_s: float = 0.0


@sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,  # the fastest comes first
              SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)
def train(s, saved=None):
    """Train by the settings s from the start, or go on from what last.pt holds."""
    clock = Clock(saved["run"]["elapsed_s"], saved["clock"]) if saved else Clock()

    with clock.part("start"):
        data, out = Data(s.data), Path(s.out)
        out.mkdir(parents=True, exist_ok=True)
        device, dtype, peak_flops = find_device(s.device, s.precision)
        team = Team(device)
        if batch_at(0, s) < team.size:
            raise CramError(f"{batch_at(0, s)} rows in a step, too few for {team.size} processes")
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        torch.manual_seed(s.seed)
        with device:  # the CPU would take seconds to draw 120 M weights
            model = CrammedBERT(s, data.vocab_size, data.seq_len)
        use_compile = can_compile(device) if s.compile is None else s.compile
        compiled = torch.compile(model) if use_compile else model
        warnings.filterwarnings("ignore", r"\s*Online softmax")  # the compiler's; nothing to mend
        optimizers = build_optimizers(model, s, team)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        generator = torch.Generator(device)  # of the masks
        val_set = validation_set(data, device)
        order = RowOrder(len(data.train), s)
        run, budget_changed, resumed_at = Run(), True, 0
        if saved:
            before = saved["settings"]
            budget_changed = (s.hours, s.steps) != (before["hours"], before["steps"])
            run = restore(saved, s, data, model, optimizers, scaler, order)
            resumed_at = run.step
            print(f"resuming after step {run.step:,}, at {clock.elapsed() / 3600:.2f} h")

    budget_s = s.hours * 3600
    # A line of the log at least every 2 % of the budget, and with --steps every 100 steps, with
    # --hours every minute
    interval = min(0.02, 100 / s.steps if s.steps else 60 / budget_s)
    flops = flops_per_token(model, s, data.seq_len)
    if peak_flops:
        peak_flops *= team.size
    microbatch = s.microbatch
    log = open_log(out / "log.jsonl", run.step) if team.rank == 0 else None
    stop = Stop()

    def progress(elapsed):
        return run.step / s.steps if s.steps else elapsed / budget_s

    def save_last():
        lost = run.skipped_in_a_row and not scaler.is_enabled()  # fp16 skips a step now and then
        if lost or not all(p.isfinite().all() for p in model.parameters()):
            raise CramError("loss or weights are not finite: the run has broken down, and is not "
                            "saved. Resume a last.pt from before, or start again with a smaller "
                            "--lr and another --out")
        if team.rank:
            return
        with clock.part("save"):
            run.elapsed_s = clock.elapsed()
            save_whole(out / "last.pt", {
                "settings": asdict(s), "data": data.identity, "run": asdict(run),
                "clock": clock.parts, "order": (order.start, order.start_row, order.stride),
                "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                "scaler": scaler.state_dict()})

    # A thread reads the next rows while the card computes. How many a step takes is known only
    # when it begins, so as many are read as it can take. In pinned memory they can be copied to the
    # card without waiting for it.
    reader = ThreadPoolExecutor(1)

    def read(position):
        rows = data.check_ids(data.train[order.rows_at(position, s.batch)])
        rows = torch.from_numpy(rows.astype(np.int32))
        return rows.pin_memory() if device.type == "cuda" else rows

    def forward_backward(rows):
        """Forward and backward of this process's share of a step. Returns its part of the mean loss
        over all rows, and leaves its part of the gradient in the parameters; None if a stop was
        asked for. The masks are drawn for the rows of all processes."""
        generator.manual_seed(mask_seed(s.seed, run.step))
        rows = rows.to(device, non_blocking=device.type == "cuda").long()
        masked = mask_tokens(rows, s.mask_rate, s.mask_replace, data.vocab_size, generator)
        share = [team.share(x) for x in masked]
        total = torch.zeros((), device=device)
        for i in range(0, len(share[0]), microbatch):
            if stop.asked and team.size == 1:  # several stop together, between steps
                return None
            micro = [x[i : i + microbatch] for x in share]
            with autocast:
                loss = compiled(*micro) * (len(micro[0]) / len(rows))
            scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def forward_backward_that_fits(rows):
        """The same, with half as many rows at a time until the card's memory holds them."""
        nonlocal microbatch
        while True:
            full = False
            try:
                total = forward_backward(rows)
            except RuntimeError as error:  # each kind of device has a class of its own for this
                full = "out of memory" in str(error).lower()
                if not full:
                    raise
            # Not in the except clause: there the traceback still holds the tensors of the step
            if not any(team.agree(full)):
                return total
            tried = min(microbatch, -(-len(rows) // team.size))  # a step may be smaller
            microbatch = tried // 2
            if not microbatch:
                raise CramError("a single row at a time does not fit into the card's memory")
            print(f"out of memory: {microbatch} rows at a time from here on, the same recipe")
            model.zero_grad()
            torch.compiler.reset()  # knowing both sizes it would write slower code, for any size
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def log_line(elapsed, with_validation):
        """Write a line of the log; returns it."""
        if run.loss_steps:
            run.loss, run.loss_sum, run.loss_steps = run.loss_sum / run.loss_steps, 0.0, 0
        if run.rows > run.timed_rows:
            seconds = clock.training_s() - run.timed_s
            run.tokens_per_s = (run.rows - run.timed_rows) * data.seq_len / seconds
            run.timed_rows, run.timed_s = run.rows, run.timed_s + seconds
        entry = {"step": run.step, "tokens": run.rows * data.seq_len,
                 "elapsed_s": elapsed, "progress": progress(elapsed), "lr": run.lr,
                 "batch": run.batch, "loss": run.loss, "tokens_per_s": run.tokens_per_s,
                 "mfu": run.tokens_per_s * flops / peak_flops if peak_flops else None}
        if with_validation:
            with clock.part("validate"):
                entry["val_loss"] = validate(model, autocast, val_set, microbatch, team)
        if team.rank == 0:
            print(log_row(entry), flush=True)
            try:
                log.write(json.dumps(entry) + "\n")
            except OSError as error:
                print(f"log.jsonl: {error}; training goes on")
        return entry

    def set_stride(rows_left):
        order.fit(run.rows, rows_left)
        total = run.rows + rows_left
        print(f"the budget takes {total:,.0f} rows, {total / len(data.train):.2f} passes over the "
              "data" + (f": one row in {order.stride:.1f}" if order.stride > 1.05
                        and run.rows < order.first_pass_end() else ""))

    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    card = f"{team.size} x {card}" if team.size > 1 else card
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {card}, "
          f"{str(dtype).removeprefix('torch.')}{', compiled' if use_compile else ''}; "
          f"{len(data.train):,} rows of {data.seq_len} tokens\n"
          f"knowing only how frequent each token is gives loss {data.unigram_entropy:.3f}, the "
          "unigram entropy")
    recipe = Settings(**{"recipe": s.recipe, **RECIPES[s.recipe]})
    if all(getattr(s, f.name) == getattr(recipe, f.name) for f in fields(s)
           if f.name not in {"seed", *FREE_ON_RESUME}):
        print(MILESTONES[s.recipe])
    # With --steps the rows to come are known now, and only a new budget changes them; with --hours
    # they depend on the speed, and are planned once that is known, again in each session
    stride_is_set = bool(s.steps)
    if s.steps and budget_changed:
        set_stride(sum(batch_at(k / s.steps, s) for k in range(run.step, s.steps)))
    if run.step and budget_changed:
        print("another budget: the schedule goes on at what is spent / the new budget")
    if use_compile:
        # A step on zeros, without an update, compiles what it runs. Where microbatches are of
        # several sizes a second one follows: then the compiler writes code for any size
        with clock.part("compile"):
            sizes = microbatch_sizes(s, microbatch, team)
            for size in sorted({min(sizes), max(sizes)}):
                rows = torch.zeros(size * team.size, data.seq_len, dtype=torch.int32)
                forward_backward_that_fits(rows).item()
                model.zero_grad()

    fetched = reader.submit(read, run.rows)
    saved_at = time.monotonic()
    first_rows, first_s = run.rows, clock.training_s()  # of this session
    logged_at = progress(team.agree(clock.elapsed())[0])
    print(LOG_HEADER)
    stop.listen()  # before this there is nothing to save, and Ctrl-C just leaves

    # --- The loop

    while True:
        save_due = (team.rank == 0 and clock.parts["save"] < SAVE_SHARE * clock.elapsed()
                    and time.monotonic() - saved_at > 60 * s.save_minutes
                    and not run.skipped_in_a_row)  # it may be breaking down
        elapsed, run.s_per_row, save_due, stop_asked = team.agree(
            clock.elapsed(), run.s_per_row, save_due, stop.asked)
        f = progress(elapsed)
        validation_due = int(20 * f) > int(20 * logged_at)
        log_due = validation_due or int(f / interval) > int(logged_at / interval)
        if log_due and f < 1 and run.step:
            logged_at = f
            log_line(elapsed, validation_due)
        if stop_asked:
            break
        if save_due:
            try:
                save_last()
            except OSError as error:
                print(f"{error}; training goes on, the last.pt from before is kept")
            saved_at = time.monotonic()
        if log_due or save_due:  # that took time, and what follows goes by the clock
            elapsed = team.agree(clock.elapsed())[0]
            f = progress(elapsed)

        lr, batch = lr_at(f, s), batch_at(f, s)
        too_late = not s.steps and elapsed + batch * run.s_per_row > budget_s
        if f >= 1 or too_late:
            break

        if not stride_is_set and f > 0.01 and run.rows - first_rows >= 5 * batch:
            stride_is_set = True
            seconds = team.agree(clock.training_s() - first_s)[0]
            set_stride(max(0, budget_s - elapsed) * (run.rows - first_rows) / seconds)
            fetched = reader.submit(read, run.rows)  # what was read by the old order is dropped

        # The step
        began = clock.training_s()
        rows = fetched.result()[:batch]  # the rest will be read again
        fetched = reader.submit(read, run.rows + batch)
        loss = forward_backward_that_fits(rows)
        if loss is None:
            stop_asked = True  # nothing of this step has reached the weights: it will come again
            break
        team.sum([p.grad for p in model.parameters()] + [loss])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        loss, norm = torch.stack([loss, norm]).tolist()  # the one wait for the card, fp16 aside
        if math.isfinite(loss) and math.isfinite(norm):  # the scaler looks for itself, in fp16
            for optimizer in optimizers:
                scaler.step(optimizer)
            run.loss_sum += loss
            run.loss_steps += 1
            run.skipped_in_a_row = 0
        else:
            run.skipped += 1
            run.skipped_in_a_row += 1
            if run.skipped_in_a_row == MAX_SKIPPED:
                raise CramError(f"loss or gradient was not finite in {MAX_SKIPPED} steps in a row: "
                                "the run has broken down. Resume it from last.pt, or start again "
                                "with a smaller --lr and another --out")
        scaler.update()
        model.zero_grad()
        run.step += 1
        run.rows += batch
        run.lr, run.batch = lr, batch
        run.s_per_row = (clock.training_s() - began) / batch

    # --- The end

    elapsed = clock.elapsed()  # what follows is not counted, and a resume does not pay for it
    parts = {"train": clock.training_s(), **clock.parts}
    reader.shutdown(cancel_futures=True)
    if not run.step and not stop_asked:
        raise CramError("the budget was over before the first step")
    if run.step == resumed_at and not stop_asked and step_of_checkpoint(out) == run.step:
        print(f"the budget holds no further step: {out / 'ckpt.pt'} stays as it is")
        return
    try:
        save_last()
    except OSError as error:
        if stop_asked:
            raise
        print(f"{error}; the run cannot be extended later")  # the model itself may still fit
    if stop_asked:
        print(f"stopped after step {run.step:,} and saved; go on with --resume")
        return

    last = log_line(elapsed, with_validation=True)
    if not math.isfinite(last["val_loss"]):
        raise CramError(f"the validation loss is {last['val_loss']}: the run has broken down, no "
                        "ckpt.pt is written. Start again with a smaller --lr and another --out")
    if team.rank == 0:
        save_whole(out / "ckpt.pt", {
            "settings": asdict(s), "vocab_size": data.vocab_size, "seq_len": data.seq_len,
            "tokenizer": data.tokenizer_json, "model": model.state_dict(), "result": last,
            "card": card, "source": data.source})

    tokens, cuda = run.rows * data.seq_len, device.type == "cuda"
    memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if cuda else "n/a"
    exaflop = f"{elapsed * peak_flops / 1e18:.3f}" if peak_flops else "n/a"
    print(f"""
tokens           {tokens:,} in {run.rows:,} rows, {run.rows / len(data.train):.2f} passes
steps            {run.step:,}, of which {run.skipped:,} skipped
wall clock       {elapsed:.1f} s of {f'{s.steps:,} steps' if s.steps else f'{budget_s:.1f} s'}
                 {', '.join(f'{name} {t:.1f} s ({t / elapsed:.1%})' for name, t in parts.items())}
after the clock  {clock.elapsed() - elapsed:.1f} s for the final validation and checkpoint
peak memory      {memory}
exaFLOP          {exaflop} as the paper counts (peak x time), {tokens * flops / 1e18:.3g} used
training loss    {'n/a' if last['loss'] is None else f"{last['loss']:.3f}"}
validation loss  {last['val_loss']:.3f} (unigram entropy {data.unigram_entropy:.3f})
wrote            {out / 'ckpt.pt'}""")


# -------------------------------------------------------------------------- 6. What the loop calls


@torch.no_grad()
def validate(model, autocast, val_set, rows_at_once, team):
    """Mean cross-entropy, in nats, over the masked tokens of the validation set. The model is not
    the compiled one: to compile what validation runs would take longer than that saves."""
    total, n = torch.zeros((), dtype=torch.float64), len(val_set[0])
    mine = [team.share(x) for x in val_set]
    for i in range(0, len(mine[0]), rows_at_once):
        part = [x[i : i + rows_at_once] for x in mine]
        with autocast:
            total += model(*part).item() * len(part[0]) / n
    team.sum([total])
    return total.item()


def microbatch_sizes(s, microbatch, team):
    """The sizes of all microbatches of the run, up to a row; the same in every process."""
    batches = {batch_at(s.ramp * (k + 0.5) / 16, s) // team.size for k in range(16)}  # each stair
    return {n for b in batches for n in (min(b, microbatch), (b - 1) % microbatch + 1)}


def restore(saved, s, data, model, optimizers, scaler, order):
    """Put what last.pt holds in its places; returns the Run."""
    differs = [key for key in data.identity if saved["data"][key] != data.identity[key]]
    if differs:
        raise CramError(f"{s.data} is not what the run in {s.out} was trained on: other "
                        + " and ".join(differs))
    order.start, order.start_row, order.stride = saved["order"]
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    if saved["scaler"]:  # empty if the run was in another precision
        scaler.load_state_dict(saved["scaler"])
    run = Run(**saved["run"])
    saved.clear()  # 1.4 GB
    return run


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


def step_of_checkpoint(out):
    """The step at which ckpt.pt was written; None where there is none that can be read."""
    with contextlib.suppress(CramError, KeyError):
        return load_whole(out / "ckpt.pt")["result"]["step"]


def load_whole(path):
    """A dictionary that save_whole wrote. Code that a stranger put into the file is not run."""
    if not Path(path).is_file():
        raise CramError(f"no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise CramError(f"{path} is not a checkpoint of cram.py, or holds code, which is not run "
                        f"({type(error).__name__})") from None
    if not isinstance(content, dict) or not {"model", "settings"} <= set(content):
        raise CramError(f"{path} is not a checkpoint of cram.py")
    differs = set(content["settings"]) ^ {f.name for f in fields(Settings)}
    if differs:
        raise CramError(f"{path} was made by another version of cram.py: {', '.join(differs)}")
    return content


class Clock:
    """Seconds since the run began, time between sessions left out.

    It starts before the data is opened and the model built; the budget counts it up to the last
    update. What is not start-up, compilation, validation or saving is training.
    """

    def __init__(self, elapsed=0.0, parts=None):
        self.zero = time.monotonic() - elapsed
        self.parts = parts or {"start": 0.0, "compile": 0.0, "validate": 0.0, "save": 0.0}

    def elapsed(self):
        return time.monotonic() - self.zero

    def training_s(self):
        return self.elapsed() - sum(self.parts.values())

    @contextlib.contextmanager
    def part(self, name):
        began = time.monotonic()
        try:
            yield
        finally:
            self.parts[name] += time.monotonic() - began


class Team:
    """The processes of a run, one for each GPU, when torchrun starts several; else one, alone.

    All hold the same weights and go through the same steps, each with its share of the rows. The
    one of rank 0 prints, logs and saves.
    """

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            if device.type == "mps":
                raise CramError("torchrun needs CUDA cards, or --device cpu")
            if self.rank:
                sys.stdout = open(os.devnull, "w")
            # gloo carries numbers of this program, NCCL what is on the cards
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            self.sum([torch.zeros(1, device=device)])  # NCCL takes its memory now, not at step 1

    def share(self, rows):
        """This process's part of something that can be sliced."""
        n = len(rows)
        return rows[n * self.rank // self.size : n * (self.rank + 1) // self.size]

    def agree(self, *numbers):
        """For each number the largest of all processes; for booleans: whether any is True."""
        if self.size == 1:
            return numbers
        numbers = torch.tensor(numbers, dtype=torch.float64)
        self.call(dist.all_reduce, numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def sum(self, tensors):
        """Replace the tensors by their sums over the processes, all in one message.

        DistributedDataParallel would send the first gradients while the last are still computed,
        but a compiled backward pass hands them over all at once.
        """
        if self.size > 1:
            vector = nn.utils.parameters_to_vector(tensors)
            self.call(dist.all_reduce, vector)
            nn.utils.vector_to_parameters(vector, tensors)

    def gather(self, mine, n):
        """All n of something, of which each process has computed its share."""
        if self.size == 1:
            return mine
        whole = mine.new_zeros(n, *mine.shape[1:])
        self.share(whole).copy_(mine)
        self.call(dist.all_reduce, whole)  # the others have zeros there
        return whole

    def call(self, collective, *arguments):
        try:
            collective(*arguments)
        except RuntimeError as error:
            raise CramError(f"rank {self.rank} has lost another process of the run ({error}). When "
                            "what ended it is mended, go on with --resume") from None


class Stop:
    """Ctrl-C and the like ask for a stop before the next microbatch (of several processes: the next
    step); a second one leaves at once.

    Signals that are ignored stay so: nohup and the shell's & count on it.
    """

    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
               if hasattr(signal, name)]  # Windows has no SIGHUP

    def __init__(self):
        self.asked = False

    def listen(self):
        self.heard = [n for n in self.SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        for number in self.heard:
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = True
        for number in self.heard:
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal may be gone; print may be under way
            os.write(1, b"\nstopping; once more to leave at once\n")


class Screen:
    """sys.stdout, and nowhere once it cannot be written: a run under nohup whose disk is full, one
    with `| head` behind it, or one that saves because its terminal was closed, goes on."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # what could not be written waits in the stream, and would fail at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def open_log(path, step):
    """log.jsonl to append to: new, or on a resume without the lines after the step of last.pt, and
    without what is no line of a log."""
    kept = []
    for line in path.read_text().splitlines() if step and path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    part = path.with_suffix(".part")
    part.write_text("".join(line + "\n" for line in kept))
    os.replace(part, path)
    return open(path, "a", buffering=1)


LOG_HEADER = (
    "    time     left   done     step  batch        lr    loss     val    tokens/s     MFU")


def log_row(e):
    """A line of the log for the screen. With --steps the time left is a guess: steps may grow."""
    times = []
    for seconds in (e["elapsed_s"], e["elapsed_s"] * max(0, 1 / e["progress"] - 1)):
        minutes, seconds = divmod(round(seconds), 60)
        times.append(f"{minutes // 60:2}:{minutes % 60:02}:{seconds:02}")
    loss = "-" if e["loss"] is None else f"{e['loss']:.3f}"
    val = f"{e['val_loss']:.3f}" if "val_loss" in e else ""
    mfu = "n/a" if e["mfu"] is None else f"{e['mfu']:.1%}"
    return (f"{' '.join(times)} {e['progress']:6.1%} {e['step']:8} {e['batch']:6} {e['lr']:9.2e} "
            f"{loss:>7} {val:>7} {e['tokens_per_s']:11,.0f} {mfu:>7}")


PEAK_TFLOPS = {  # dense bf16 (fp16 before Ampere) with fp32 accumulation, NVIDIA's data sheets
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "L4": 121, "A10": 125, "RTX A6000": 154.8, "RTX A4000": 76.7, "RTX 4090": 165.2,
    "RTX 3090": 71, "RTX 2080 Ti": 53.8, "V100": 125, "T4": 65,
    # An unlisted card's MFU is n/a; a variant (Ti, Laptop) counts as the card it is named after
}


def find_device(name, precision):
    """The device, the dtype of matrix products on it, and its peak in FLOP/s if known."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda":  # torchrun starts a process for each
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise CramError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if precision == "auto":
        precision = "fp32" if device.type != "cuda" else "bf16" if has_bf16(device) else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    peak = None
    if device.type == "cuda" and dtype != torch.float32:
        card = torch.cuda.get_device_name(device)
        peak = next((1e12 * tflops for name, tflops in PEAK_TFLOPS.items()
                     if re.search(rf"\b{name}\b", card)), None)
    return device, dtype, peak


def has_bf16(device):
    """Whether it is a card that has bf16 itself: torch emulates it on Turing, very slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def can_compile(device):
    """Whether torch.compile has what it needs: Triton, and a card from Volta on."""
    return (device.type == "cuda" and importlib.util.find_spec("triton") is not None
            and torch.cuda.get_device_capability(device) >= (7, 0))


# --------------------------------------------------------------------------- 7. The finished model


def load_checkpoint(path, device="cpu"):
    """The finished model, in evaluation mode, and its tokenizer.

        model, tokenizer = load_checkpoint("out/ckpt.pt", device="cuda")

    Raises CramError if the file is missing, is something else, or holds code.
    """
    content = load_whole(path)
    if "tokenizer" not in content:
        raise CramError(f"{path} is a run under way, not a finished model: give a ckpt.pt")
    s = Settings(**content["settings"])
    model = CrammedBERT(s, content["vocab_size"], content["seq_len"])
    model.load_state_dict(content["model"])
    return model.to(device).eval(), Tokenizer.from_str(content["tokenizer"])


@torch.no_grad()
def fill(path, text, device):
    """Print the five likeliest tokens for each <mask> of the text."""
    model, tokenizer = load_checkpoint(path, device)
    ids = [CLS, *tokenizer.encode(text, add_special_tokens=False).ids, SEP]
    if MASK not in ids:
        raise CramError('--fill needs a text with a <mask> in it, as "paris is in <mask>."')
    ids = torch.tensor([ids], device=device)
    for logits in model.logits(ids)[ids == MASK]:
        best = logits.softmax(0).topk(5)
        print("<mask>:", ", ".join(f"{tokenizer.id_to_token(i)} {p:.1%}" for p, i in
                                   zip(best.values.tolist(), best.indices.tolist())))


def export(path, folder):
    """Write a finished model as a folder that Hugging Face transformers loads as ModernBERT.

    Raises CramError if it is not of that architecture, or the folder is not empty.
    """
    content, folder = load_whole(path), Path(folder)
    model, tokenizer = load_checkpoint(path)
    s, result = Settings(**content["settings"]), content["result"]
    if s.model != "modernbert":
        raise CramError(f"{path} has the paper's architecture, for which transformers has no class "
                        "(sinusoid positions): only --model modernbert can be exported")
    if folder.exists() and any(folder.iterdir()):
        raise CramError(f"{folder} is not empty: give --export a new folder")
    folder.mkdir(parents=True, exist_ok=True)

    names = {"embed": "model.embeddings.tok_embeddings", "embed_norm": "model.embeddings.norm",
             "final_norm": "model.final_norm", "head.0": "head.dense", "head.2": "head.norm"}
    weights = {f"{theirs}.weight": model.get_parameter(f"{ours}.weight")
               for ours, theirs in names.items()}
    for i, block in enumerate(model.blocks):
        attention, ffn, layer = block.attention, block.ffn, f"model.layers.{i}."
        joined = {"attn.Wqkv": (attention.q, attention.k, attention.v), "attn.Wo": (attention.out,),
                  "mlp.Wi": (ffn.gate, ffn.up), "mlp.Wo": (ffn.down,), "mlp_norm": (block.norm2,)}
        if i:
            joined["attn_norm"] = (block.norm1,)
        for name, modules in joined.items():
            weights[f"{layer}{name}.weight"] = torch.cat([module.weight for module in modules])

    # The safetensors format: the length of a JSON header, the header, the bytes of the tensors
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, weight in weights.items():
        start, end = end, end + 4 * weight.numel()
        header[name] = {"dtype": "F32", "shape": weight.shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for weight in weights.values():
            f.write(weight.detach().numpy().astype("<f4").tobytes())

    theta = {"rope_type": "default", "rope_theta": ROPE_THETA}
    config = {
        "architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert",
        "vocab_size": content["vocab_size"], "max_position_embeddings": content["seq_len"],
        "num_hidden_layers": s.layers, "hidden_size": s.width, "num_attention_heads": s.heads,
        "intermediate_size": 2 * s.width, "norm_eps": 1e-5, "decoder_bias": False,
        "global_attn_every_n_layers": 1, "layer_types": ["full_attention"] * s.layers,
        "rope_parameters": {"full_attention": theta, "sliding_attention": theta},
        "global_rope_theta": ROPE_THETA, "local_rope_theta": ROPE_THETA,  # before transformers 5
        "pad_token_id": PAD, "cls_token_id": CLS, "sep_token_id": SEP,
        "bos_token_id": CLS, "eos_token_id": SEP, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    tokenizer.post_processor = TemplateProcessing(
        "<cls> $A <sep>", "<cls> $A <sep> $B:1 <sep>:1", [("<cls>", CLS), ("<sep>", SEP)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": content["seq_len"],
        "model_input_names": ["input_ids", "attention_mask"], "pad_token": "<pad>",
        "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>"}))

    (folder / "README.md").write_text(f"""---
library_name: transformers
pipeline_tag: fill-mask
---
A BERT of {sum(p.numel() for p in model.parameters()):,} parameters, trained from scratch by cram.py
(after "Cramming", arXiv 2212.14034). It has seen no text but the data below, and no other model.

| | |
|---|---|
| recipe | {s.recipe} |
| budget | {f"{s.steps:,} steps" if s.steps else f"{s.hours:g} hours"} |
| time | {result["elapsed_s"] / 3600:.3g} hours |
| hardware | {content["card"]} |
| data | {content["source"]}: {result["tokens"]:,} tokens seen in rows of {content["seq_len"]} |
| loss | {result["val_loss"]:.3f} nats on its validation text, 15 % of the tokens masked |
| settings | {", ".join(f"{k} {v}" for k, v in asdict(s).items() if k not in ("data", "out"))} |
""", encoding="utf-8")
    print(f"wrote {folder}: AutoModelForMaskedLM.from_pretrained({str(folder)!r}) loads it")


# --------------------------------------------------------------------------------- 8. Command line

# A resumed run may change these. All others belong to the run and, but for the seed, to its recipe.
FREE_ON_RESUME = {"hours", "steps", "data", "out", "microbatch", "device", "precision", "compile",
                  "save_minutes"}

CHOICES = {"recipe": RECIPES, "model": ("crammed", "modernbert"), "optimizer": ("adamw", "muon"),
           "order": ("file", "random"), "precision": ("auto", "bf16", "fp16", "fp32")}


def check(s):
    """Raise CramError for settings that cannot work."""
    rules = [
        ("hours layers width heads batch microbatch lr eps clip save_minutes",
         "a positive number", lambda x: 0 < x < math.inf),
        ("steps weight_decay", "0 or more", lambda x: 0 <= x < math.inf),
        ("ramp lr_start warmup decay mask_replace", "a share, from 0 to 1", lambda x: 0 <= x <= 1),
        ("beta1 beta2", "from 0 to below 1", lambda x: 0 <= x < 1),
        ("mask_rate", "between 0 and 1", lambda x: 0 < x < 1),
        ("seed", "from 0 to 2**31 - 1", lambda x: 0 <= x < 2**31),
        *((name, " or ".join(words), words.__contains__) for name, words in CHOICES.items())]
    for names, what, holds in rules:
        for name in names.split():
            value = getattr(s, name)
            if not holds(value):
                raise CramError(f"--{name.replace('_', '-')} must be {what}, not {value}")
    if s.width % (2 * s.heads):
        raise CramError(f"--width {s.width} must be an even multiple of --heads {s.heads}")


def settings_for(given, resume):
    """The settings of a run, from what was given on the command line, and its last.pt or None."""
    out = Path(given.get("out", Settings.out))
    if {"hours", "steps"} <= set(given):
        raise CramError("give --hours or --steps, not both")
    if resume:
        saved = load_whole(out / "last.pt")
        if "run" not in saved:
            raise CramError(f"{out}/last.pt is a finished model, not a run under way")
        base = saved["settings"]
        differs = [f"--{key.replace('_', '-')} {value} (was {base[key]})"
                   for key, value in given.items() if key not in FREE_ON_RESUME
                   and value != base[key]]
        if differs:
            raise CramError(f"{out} cannot be resumed with other settings: {', '.join(differs)}")
        unit, other = ("steps", "hours") if base["steps"] else ("hours", "steps")
        if other in given or given.get("steps") == 0:  # which would mean --hours
            raise CramError(f"{out} was begun with --{unit}: resume it with that kind of budget")
    elif (out / "last.pt").exists() or (out / "ckpt.pt").exists():
        raise CramError(f"{out} holds a run: go on with it by --resume, or give another --out")
    else:
        saved, base = None, RECIPES.get(given.get("recipe", Settings.recipe), {})
    s = Settings(**{**base, **given, "out": str(out)})
    check(s)
    return s, saved


def parse_arguments():
    """A flag for each setting, with the comment behind it as its help, on one line."""
    modern = RECIPES["modern"]
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Settings), re.M))
    parser = argparse.ArgumentParser(
        usage="cram.py [--flag value ...]", description=__doc__, argument_default=argparse.SUPPRESS,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=24, width=140))
    for f in fields(Settings):
        kind = {"type": f.type, "metavar": f.type.__name__} if f.default is not None else {
            "action": argparse.BooleanOptionalAction}
        default = [f"default: {f.default}"] if f.default is not None else []
        default += [f"modern: {modern[f.name]}"] if f.name in modern else []
        help = comments[f.name].replace("%", "%%") + (f" ({'; '.join(default)})" if default else "")
        parser.add_argument("--" + f.name.replace("_", "-"), **kind, help=help)
    parser.add_argument("--resume", action="store_true",
                        help="go on where the run in --out stopped, with its settings")
    parser.add_argument("--fill", metavar="TEXT", help="print the model's best guesses for each "
                        "<mask> in TEXT, on the CPU unless --device is given, then exit")
    parser.add_argument("--export", metavar="DIR", help="write the finished model for Hugging Face "
                        "transformers into the new folder DIR, then exit")
    return vars(parser.parse_args())


def main():
    given = parse_arguments()
    resume, text, folder = (given.pop(name, None) for name in ("resume", "fill", "export"))
    ckpt = Path(given.get("out", Settings.out)) / "ckpt.pt"
    if text is not None:
        device, _, _ = find_device(given.get("device", "cpu"), "fp32")
        fill(ckpt, text, device)
    elif folder is not None:
        export(ckpt, folder)
    else:
        with contextlib.redirect_stdout(Screen(sys.stdout)):
            train(*settings_for(given, resume))
        if dist.is_initialized():
            dist.barrier()  # rank 0 may still be writing
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (CramError, OSError) as error:
        sys.exit(f"cram.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ncram.py: interrupted")
