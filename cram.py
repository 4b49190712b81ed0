"""Train a BERT from scratch on one GPU in one day.

    python prepare.py                                 # once: text -> data/
    python cram.py --hours 24                         # data/ -> out/ckpt.pt
    python cram.py --resume                           # continue a run that was stopped
    python cram.py --fill "paris is the <mask> of france."
    python cram.py --recipe electra --minutes 10 --out out/electra
    python cram.py --out out/electra --export out/bert  # for Hugging Face transformers
    torchrun --standalone --nproc_per_node=8 cram.py  # one process for each of eight GPUs

The default recipe, `crammed`, is that of "Cramming: Training a Language Model on a Single GPU in
One Day" (Geiping & Goldstein, arXiv 2212.14034, version 2). What is special about it:

- pre-norm blocks, biases only in the norms, a gated FFN, no prediction head; fixed sinusoid
  positions with one learned scale;
- rows without padding; a quarter of the tokens is masked, and only that quarter is decoded;
- one clock: learning rate and batch size are functions of `progress`, the fraction of the budget
  that is spent.

`modern` and `electra` are our own recipes and learn faster (RECIPES has what they change, README.md
what they reach): rotary positions and Muon; `electra` also trains on replaced-token detection.
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
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from numpy.random import SeedSequence, default_rng
from tokenizers import Tokenizer, decoders
from tokenizers.processors import TemplateProcessing
from torch.nn.attention import SDPBackend, sdpa_kernel

# ------------------------------------------------------------------------------------- 1. Settings


@dataclass
class Settings:
    """All settings of a run, by default those of --recipe crammed. Each is a flag of the same name,
    and its comment is the flag's help."""

    recipe: str = "crammed"  # crammed: the paper's; modern, electra: ours (README.md)

    # Budget
    hours: float = 24.0  # wall-clock budget in hours, compilation included
    steps: int = 0  # budget in optimizer steps, so that speed changes nothing; 0: use --hours

    # Folders
    data: str = "data"  # what prepare.py wrote
    out: str = "out"  # where last.pt, ckpt.pt and log.jsonl go

    # Model: paper section 4.2
    model: str = "crammed"  # crammed: sinusoid positions; modernbert: rotary positions, a head
    layers: int = 16  # transformer blocks
    width: int = 768  # C, channels
    heads: int = 12  # attention heads, each of width / heads channels

    # Objective
    objective: str = "mlm"  # mlm: masked language modelling; rtd: replaced-token detection
    generator_layers: int = 6  # rtd: blocks of the generator, which proposes the replacements
    generator_width: int = 256  # rtd: its channels, in heads of 64; one head below 128
    rtd_weight: float = 50.0  # rtd: weight of the discriminator's loss (ELECTRA)

    # Optimization: paper section 4.3
    optimizer: str = "adamw"  # adamw; muon: for all matrices but the embedding, adamw elsewhere
    batch: int = 8192  # rows per optimizer step after the ramp
    ramp: float = 0.6  # fraction of the budget in which the batch grows by sixteenths; 0: no ramp
    lr: float = 1e-3  # peak learning rate
    lr_start: float = 0.25  # initial learning rate as a fraction of --lr
    warmup: float = 0.75  # fraction of the budget until the peak
    decay: float = 0.25  # last fraction of the budget, in which the rate falls to zero
    beta1: float = 0.9  # AdamW: decay of the mean of the gradients
    beta2: float = 0.98  # AdamW: decay of the mean of their squares
    eps: float = 1e-12  # AdamW: added to the square root of that mean
    weight_decay: float = 0.01  # on matrices, embeddings and the position scale, not on vectors
    clip: float = 0.5  # largest norm of the gradient

    # Data
    mask_rate: float = 0.25  # fraction of the tokens to predict
    mask_replace: float = 0.8  # share of these shown as <mask>; of the rest half are random tokens
    order: str = "file"  # of the first pass: file (as prepare.py sorted it) or random

    seed: int = 0  # of the initial weights, the masks and the order of random passes

    # Machine: changes speed and rounding. (Two types of card draw other numbers from one seed.)
    microbatch: int = 0  # rows per forward pass, on CUDA halved until it fits; 0: 512, on CPU 32
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "auto"  # bf16, fp16, fp32; auto: on CUDA bf16 or, if slow, fp16; else fp32
    compile: bool | None = None  # torch.compile; None: on for CUDA cards from Volta on
    save_minutes: float = 5.0  # between saves of last.pt


MODERN = {  # chosen in runs of two to ten minutes
    "model": "modernbert", "optimizer": "muon", "order": "random",
    "batch": 512, "ramp": 0.0, "lr": 2e-3, "lr_start": 0.0, "decay": 0.7,
    "warmup": 0.03,  # a short run has none: compilation takes longer, and counts
    "weight_decay": 0.5,  # at 0.05 the loss is the same, but the model fine-tunes badly
    "clip": 1.0, "mask_rate": 0.3, "mask_replace": 1.0,
}
RECIPES = {  # what a recipe sets where the command line does not
    "crammed": {},
    "modern": MODERN,
    "electra": {**MODERN, "objective": "rtd", "mask_rate": 0.15, "lr": 1e-3,
                "layers": 12, "width": 512, "heads": 8},  # in six minutes better than 16 x 768
}

PAD, UNK, CLS, SEP, MASK = range(5)  # prepare.py puts the special tokens first

# torchrun starts a process for each GPU. All hold the same weights and go through the same steps,
# each with its share of the rows; rank 0 prints, logs and saves. my_rows and all_sum: section 6.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


class CramError(Exception):
    """An error the user can fix; the message says how."""


# ---------------------------------------------------------------------------------------- 2. Model


class CrammedBERT(nn.Module):
    """A BERT of 119.6 M parameters at the paper's size.

    With --model modernbert this is what Hugging Face transformers calls ModernBERT, with global
    attention in every layer: rotary positions instead of the sinusoid, norms without bias, no norm
    before the first attention (the embedding's is there), a head before the decoder.

    The generator of `Electra` borrows the discriminator's embedding, with E channels: `project`
    maps them to C, and the head maps back.
    """

    metric_names = ("loss",)  # names of the numbers forward returns; the first is minimised

    def __init__(self, s, vocab_size, seq_len, embed=None):
        super().__init__()
        self.modernbert = modernbert = s.model == "modernbert"
        norm = functools.partial(nn.LayerNorm, eps=1e-5 if modernbert else 1e-12,
                                 bias=not modernbert)
        self.seq_len = seq_len
        self.objective = s.objective
        C = s.width
        if C % (2 * s.heads):
            raise CramError(f"a width of {C} must be an even multiple of its {s.heads} heads "
                            "(a generator has one for every 64 of its width)")
        self.embed = nn.Embedding(vocab_size, C) if embed is None else embed
        E = self.embed.embedding_dim
        if modernbert:
            self.register_buffer("rope", rope_table(seq_len, C // s.heads), persistent=False)
        else:
            self.position_scale = nn.Parameter(torch.empty(()))
            self.register_buffer("sinusoid", sinusoid(seq_len, C), persistent=False)
        self.project = nn.Identity() if E == C else nn.Linear(E, C, bias=False)
        self.embed_norm = norm(C)
        self.dropout = nn.Dropout(0.0)  # off in pretraining; finetune_glue.py turns it on
        self.blocks = nn.ModuleList(Block(C, s.heads, norm) for _ in range(s.layers))
        if modernbert:
            self.blocks[0].norm1 = nn.Identity()
        self.final_norm = norm(C)
        self.head = (nn.Sequential(nn.Linear(C, E, bias=False), nn.GELU(), norm(E))
                     if modernbert or E != C else nn.Identity())
        if s.objective == "rtd":
            self.score = nn.Parameter(torch.empty(C))  # a vector, so neither Muon nor weight decay
            self.score_bias = nn.Parameter(torch.empty(1))
        self.init_weights()

    def init_weights(self):
        """N(0, 0.02) for every matrix; norms start at 1 and 0, the position scale at 1/sqrt(C).
        With --model modernbert each block starts as the identity: what it adds to x is zero."""
        for name, p in self.named_parameters():
            if self.modernbert and name.endswith(("attention.out.weight", "ffn.down.weight")):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif p.ndim == 0:
                nn.init.constant_(p, len(self.final_norm.weight) ** -0.5)
            else:
                nn.init.constant_(p, 0.0 if name.endswith(("bias", "score")) else 1.0)

    def encode(self, ids, attention_mask=None, where=None):
        """Hidden states (B, T, C) of ids (B, T). attention_mask (B, T) is False at padding.
        With indices `where` (B, M) only the states there: (B, M, C)."""
        T = ids.shape[1]
        if T > self.seq_len:
            raise CramError(f"{T} tokens, but this model reads at most {self.seq_len}")
        x, rope = self.project(self.embed(ids)), None
        if self.modernbert:
            rope = self.rope[:, :T]
        else:
            x = x + self.position_scale * self.sinusoid[:T]
        x = self.dropout(self.embed_norm(x))
        if torch.is_autocast_enabled(x.device.type):  # the residual stream, too, is in 16 bits
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :]  # for every head and every query
        for block in self.blocks[:-1]:
            x = block(x, attention_mask, rope)
        x = self.blocks[-1](x, attention_mask, rope, where)
        return self.final_norm(x)

    def decode(self, x):
        """Logits (..., V) of hidden states (..., C). The embedding is also the last matrix."""
        if self.objective == "rtd":
            raise CramError("a model trained with --objective rtd guesses no tokens: it has no "
                            "logits, but `replaced` says which tokens do not fit")
        return F.linear(self.head(x), self.embed.weight)

    def logits(self, ids, attention_mask=None):
        """Logits (B, T, V) at every position; attention_mask as in `encode`."""
        return self.decode(self.encode(ids, attention_mask))

    def forward(self, ids, where, targets, uniform=None):
        """Inputs (B, T), indices (B, M) of the targets, targets (B, M) -> (1,): mean cross-entropy
        in nats. (`Electra` returns several means; it needs uniform, which is ignored here.)

        Decoding only the targets is 6 % of the work of `crammed`; all positions would be 20 %.
        """
        logits = self.decode(self.encode(ids, where=where))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())[None]

    def replaced(self, ids, attention_mask=None):
        """Probability (B, T) that each token of ids (B, T) was replaced (--objective rtd)."""
        return self.replaced_logits(self.head(self.encode(ids, attention_mask))).sigmoid()

    def replaced_logits(self, x):
        """Logits (B, T) that a token was replaced, of the head's output x (B, T, C)."""
        return (x.float() * self.score).sum(-1) + self.score_bias

    def flops_per_token(self, decoded):
        """Floating-point operations to train on one token, where the decoder sees the fraction
        `decoded` of the tokens: 623 M at the paper's size and a quarter decoded."""
        weights = sum(p.numel() for p in self.blocks.parameters())  # each: 2 forward, 4 backward
        # QK' and AV: 2 products, each 2 forward, 4 backward
        attention = 12 * len(self.blocks) * self.seq_len * len(self.final_norm.weight)
        return 6 * weights + attention + 6 * decoded * self.embed.weight.numel()


class Block(nn.Module):
    """Pre-norm: the residual stream x passes through all blocks without a norm."""

    def __init__(self, width, heads, norm):
        super().__init__()
        self.norm1 = norm(width)
        self.attention = Attention(width, heads)
        self.norm2 = norm(width)
        self.ffn = GatedFFN(width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, attention_mask, rope, where=None):
        y = self.attention(self.norm1(x), attention_mask, rope)
        if where is not None:  # in the last block: the other states are no longer needed
            x, y = take(x, where), take(y, where)
        x = x + self.dropout(y)
        return x + self.dropout(self.ffn(self.norm2(x)))


def take(x, where):
    """The states (B, M, C) of x (B, T, C) at the indices where (B, M)."""
    return x.gather(1, where[:, :, None].expand(-1, -1, x.shape[2]))


class Attention(nn.Module):
    """Every token attends to every token of its row, also across documents (as in the paper)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(0.0)  # holds p; scaled_dot_product_attention applies it
        self.q, self.k, self.v, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x, attention_mask, rope):
        B, T, C = x.shape
        q, k, v = (linear(x).view(B, T, self.heads, C // self.heads).transpose(1, 2)
                   for linear in (self.q, self.k, self.v))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        x = F.scaled_dot_product_attention(  # each (B, heads, T, D), D = C / heads
            q, k, v, attn_mask=attention_mask, dropout_p=self.dropout.p if self.training else 0.0)
        return self.out(x.transpose(1, 2).reshape(B, T, C))


class GatedFFN(nn.Module):
    """GeGLU: up(x) · GELU(gate(x)). One matrix for both, split, would cost a copy of gradients."""

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


def rope_table(seq_len, D):
    """Cosine and sine (2, T, D / 2) of the angle that each pair of channels turns by (RoFormer)."""
    angles = torch.arange(seq_len)[:, None] * ROPE_THETA ** (-torch.arange(0, D, 2) / D)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rope(x, rope):
    """x (B, heads, T, D) with the pairs of channels (i, i + D / 2) rotated by their position, so
    that the product of a query and a key depends on how far apart they are."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = rope  # float32, where x may be bf16
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Electra(nn.Module):
    """Replaced-token detection (ELECTRA, Clark et al. 2020, arXiv 2003.10555).

    A small generator learns to guess the masked tokens. What it guesses replaces them, and the
    discriminator, the model we want, learns to tell for *every* token whether it was replaced. A
    correct guess counts as original. Both read one embedding, which gets the gradients of both.

    Where the generator guessed, the discriminator also learns which token was there, whether it was
    replaced or not (COCO-LM, Meng et al. 2021, arXiv 2102.08473). With this it fine-tunes better;
    `decode` still refuses, as a model that has seen no <mask> fills in none.
    """

    metric_names = ("loss", "loss_generator", "loss_discriminator", "loss_correction",
                    "found", "replaced")

    def __init__(self, s, vocab_size, seq_len):
        super().__init__()
        self.rtd_weight = s.rtd_weight
        self.discriminator = CrammedBERT(s, vocab_size, seq_len)
        self.generator = CrammedBERT(
            replace(s, objective="mlm", layers=s.generator_layers, width=s.generator_width,
                    heads=max(1, s.generator_width // 64)),
            vocab_size, seq_len, embed=self.discriminator.embed)

    def forward(self, ids, where, targets, uniform):
        """What `mask_tokens` returns -> (6,): the loss to minimise; its parts, which are means in
        nats; the fractions of all tokens that were replaced and noticed, and that were replaced."""
        guesses = self.generator.decode(self.generator.encode(ids, where=where))
        generator_loss = F.cross_entropy(guesses.flatten(0, 1), targets.flatten())

        sampled = sample_tokens(guesses, uniform)
        shown = ids.scatter(1, where, sampled)
        labels = torch.zeros_like(ids).scatter(1, where, (sampled != targets).long())

        model = self.discriminator
        x = model.head(model.encode(shown))
        logits = model.replaced_logits(x)
        rtd_loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

        corrected = F.linear(take(x, where), model.embed.weight)
        correction_loss = F.cross_entropy(corrected.flatten(0, 1), targets.flatten())

        loss = generator_loss + self.rtd_weight * rtd_loss + correction_loss
        found = (logits.detach() > 0) * labels
        return torch.stack([
            loss, generator_loss.detach(), rtd_loss.detach(), correction_loss.detach(),
            found.float().mean(), labels.float().mean()])

    def flops_per_token(self, decoded):
        return (self.generator.flops_per_token(decoded)
                + self.discriminator.flops_per_token(decoded))


@torch.no_grad()
def sample_tokens(logits, uniform):
    """Token ids (B, M), drawn from softmax(logits (B, M, V)) by the uniform numbers (B, M) in
    [0, 1): where uniform falls in the cumulative distribution.

    In float32: sums in bf16 are far too coarse. The last sum may fall short of 1; without the
    scaling by it and the clamp, V, which is no id, comes up some 6 times in a million.
    """
    cdf = logits.float().softmax(-1).cumsum(-1)
    at = uniform.float()[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, at, right=True).squeeze(-1).clamp(max=cdf.shape[-1] - 1)


def build_model(s, vocab_size, seq_len):
    return (Electra if s.objective == "rtd" else CrammedBERT)(s, vocab_size, seq_len)


# --------------------------------------------------------------------------------------- 3. Recipe


def mask_tokens(rows, mask_rate, mask_replace, vocab_size, rng):
    """Choose the tokens to predict, equally many in every row, which keeps shapes static: with the
    paper's settings 32 of 128, of which 26 become <mask>, 3 a random token, and 3 stay (BERT's
    80/10/10). All rows of a step are drawn at once, so that masks do not depend on the microbatch.

    rows (B, T) -> inputs (B, T); of the M = round(mask_rate * T) chosen tokens of each row the
    indices `where` (B, M), the targets (B, M), and uniform numbers (B, M) for `Electra`
    """
    B, T = rows.shape
    M = max(1, round(mask_rate * T))
    n_mask = round(mask_replace * M)
    n_random = (M - n_mask) // 2
    draw = {"device": rows.device, "generator": rng}

    noise = torch.rand(B, T, **draw)
    where = noise.topk(M, dim=1).indices  # in random order, as are the first n_mask
    targets = rows.gather(1, where)

    shown = targets.clone()
    shown[:, :n_mask] = MASK
    shown[:, n_mask : n_mask + n_random] = torch.randint(vocab_size, (B, n_random), **draw)
    uniform = torch.rand(B, M, **draw)
    return rows.scatter(1, where, shown), where, targets, uniform


def mask_seed(seed, step):
    """Seed of a step's masks, 63 bits. Hashed, as the CPU's generator reads only the lowest 32."""
    return int(SeedSequence((seed, step)).generate_state(1, np.uint64)[0]) >> 1


def progress_at(elapsed, step, s):
    """The fraction of the budget that is spent: of its time, or with --steps of its steps."""
    return step / s.steps if s.steps else elapsed / (3600 * s.hours)


def lr_at(progress, s):
    """Learning rate when the fraction `progress` of the budget is spent.

    The paper's (config bert-o4) is lr · min(0.25 + f, 4 (1 - f)), with its peak at f = 0.75.
    """
    up = s.lr_start + (1 - s.lr_start) * progress / s.warmup if s.warmup else 1.0
    down = (1 - progress) / s.decay if s.decay else 1.0
    return s.lr * max(0.0, min(up, 1.0, down))


def batch_at(progress, s):
    """Rows per step when the fraction `progress` of the budget is spent. The paper's: 512, 1024,
    ... 8192 from progress 0.5625 on (15/16 of the ramp)."""
    sixteenths = min(1 + int(16 * progress / s.ramp), 16) if s.ramp else 16
    return max(1, s.batch * sixteenths // 16)


def build_optimizers(model, s):
    """AdamW; with --optimizer muon, Muon for the matrices of blocks, heads and projection (Q, K and
    V one by one), and AdamW for the rest: vectors, and the embedding, which is also the decoder.
    Their learning rate is zero until `train` sets it for a step."""
    def takes_muon(name, p):
        return s.optimizer == "muon" and p.ndim == 2 and not name.endswith("embed.weight")

    matrices = [p for name, p in model.named_parameters() if takes_muon(name, p)]
    others = [p for name, p in model.named_parameters() if not takes_muon(name, p)]
    groups = [{"params": [p for p in others if p.ndim != 1], "weight_decay": s.weight_decay},
              {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(s.beta1, s.beta2), eps=s.eps, fused=True)
    return [adamw, Muon(matrices, 0.0, s.weight_decay)] if matrices else [adamw]


class Muon(torch.optim.Optimizer):
    """Momentum SGD whose update is orthogonalized (Jordan et al., 2024), for matrices.

    The same update as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", which scales it to the
    size of AdamW's so that both share a learning rate ("Muon is Scalable for LLM Training", 2.2).
    torch's takes one matrix at a time, which leaves a large card idle; this one takes all of a
    shape at once. Every process does all of the work: exchanging shares of it takes as long.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        by_shape = {}
        for p in matrices:
            by_shape.setdefault(p.shape, []).append(p)
        super().__init__([{"params": same} for same in by_shape.values()],
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
            update = orthogonalize(grad.lerp(state["momentum"], beta))  # Nesterov
            scale = 0.2 * max(params[0].shape) ** 0.5  # root mean square 0.2, as AdamW's
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, list(update.to(grad.dtype)), alpha=-lr * scale)


def orthogonalize(x):
    """Bring the singular values of matrices x (N, rows, columns) near 1: five Newton-Schulz steps
    x <- a x + b (x x') x + c (x x')² x with Jordan's coefficients. bf16 is precise enough, but
    very slow where the chip has no bf16."""
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

VAL_ROWS = 4096  # of val.bin, the first
VAL_MASK_RATE = 0.15  # BERT's, whatever the recipe masks


class Data:
    """What prepare.py wrote: rows (N, T) uint16 for training and validation, and the tokenizer."""

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "meta.json").exists():
            raise CramError(f"no prepared data in {folder}: name its folder with --data, or make "
                            f"it with prepare.py --out {folder}")
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.vocab_size, self.seq_len = meta["vocab_size"], meta["seq_len"]
            self.unigram_entropy = meta["unigram_entropy"]
            self.hashes = {key: meta[key] for key in ("train_sha256", "tokenizer_sha256")}
            self.train, self.val = (  # reshape notices a file that was copied in part
                np.memmap(folder / f"{name}.bin", "<u2", "r").reshape(
                    meta[f"{name}_rows"], self.seq_len) for name in ("train", "val"))
            self.tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
        except (ValueError, KeyError, TypeError) as error:
            raise CramError(f"a file in {folder} is damaged ({error}): copy the folder again"
                            ) from None
        if hashlib.sha256(self.tokenizer_json.encode()).hexdigest() != meta["tokenizer_sha256"]:
            raise CramError(f"{folder}/tokenizer.json is not the one the tokens were made with")

    def read(self, position, s, pin):
        """The s.batch rows (B, T), int32, from `position` in the run's order on. Pinned memory is
        copied to a card without waiting."""
        numbers = row_numbers(position, s.batch, len(self.train), s)
        rows = torch.from_numpy(self.train[numbers].astype(np.int32))
        return rows.pin_memory() if pin else rows


def row_numbers(position, count, n_rows, s):
    """Which rows of train.bin are at the positions from `position` on.

    The first pass over the data is in the order of the file, the paper's curriculum (short
    sentences first); later passes, and all with --order random, are random permutations.
    """
    passes, numbers = np.divmod(np.arange(position, position + count), n_rows)
    file_passes = int(s.order == "file")
    for n in range(max(file_passes, passes[0]), passes[-1] + 1):
        here = passes == n
        numbers[here] = permutation(n_rows, s.seed, n - file_passes)[numbers[here]]
    return numbers


@functools.lru_cache(2)  # 8 bytes a row each; two, because a batch may span two passes
def permutation(n_rows, seed, pass_number):
    return default_rng((seed, pass_number)).permutation(n_rows)


def next_position(position, batch, rows_left, n_rows, s):
    """Where the next batch begins.

    If the budget takes fewer rows (rows_left, this batch included) than the file still has, each
    batch leaves a gap, so that a short run sees the whole curriculum. The last batch ends before
    the file does, so of the last fifth up to a tenth less is read.
    """
    if s.order == "random" or position >= n_rows:
        return position + batch
    return position + max(batch, int(batch * (n_rows - position) / max(rows_left, batch)))


def validation_set(data, device):
    """What `mask_tokens` returns, but the same on every machine and for every recipe."""
    rows = torch.from_numpy(data.val[:VAL_ROWS].astype(np.int64))
    rng = default_rng(0)
    M = max(1, round(VAL_MASK_RATE * data.seq_len))
    where = torch.from_numpy(rng.random(rows.shape).argsort(1)[:, :M])
    uniform = torch.from_numpy(rng.random(where.shape)).float()
    inputs, targets = rows.scatter(1, where, MASK), rows.gather(1, where)
    return [x.to(device) for x in (inputs, where, targets, uniform)]


# ------------------------------------------------------------------------------------- 5. Training

PARTS = ("start", "compile", "train", "validate", "save")  # of the wall clock
MAX_SKIPPED = 30  # steps in a row; fp16 skips some 16 at first, until its loss scale is found
DIVERGED = "not finite: the run has diverged. Start again with a smaller --lr and another --out"


@dataclass
class TrainState:
    """Where a run stands, beside its weights and optimizers."""

    seconds: dict  # of the budget, by what took them: `Clock`
    step: int = 0
    rows: int = 0  # trained on
    position: int = 0  # of the next row: rows plus those that next_position skipped
    lr: float = 0.0  # of the last step
    batch: int = 0  # of the last step
    skipped: int = 0  # steps whose loss or gradient was not finite
    log_bytes: int = 0  # length of log.jsonl
    metrics: list = field(default_factory=list)  # means since the last line of the log ...
    metric_steps: int = 0  # ... over so many steps; 0: the next step replaces them

    def add(self, metrics):
        """Update the means by those of one more step."""
        self.metric_steps += 1
        self.metrics = [mean + (x - mean) / self.metric_steps
                        for mean, x in zip(self.metrics or metrics, metrics)]


# The kernels for all attention of a run, the fastest first
@sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
              SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)
def train(s, saved):
    """Train by the settings s. `saved` is what last.pt holds, or {}. Returns the number of the
    signal that asked it to stop, or 0."""
    state = saved.get("state") or TrainState(dict.fromkeys(PARTS, 0.0))
    clock = Clock(state.seconds)  # the budget counts from here to the last update
    device, dtype, peak_flops = find_device(s.device, s.precision)
    on_card = device.type == "cuda"
    data, out, budget_s = Data(s.data), Path(s.out), 3600 * s.hours
    val_set = validation_set(data, device)
    torch.manual_seed(s.seed)
    with device:  # the CPU would take seconds to draw 120 M weights
        model = build_model(s, data.vocab_size, data.seq_len)
    join_processes(s, device, model)
    check_free_disk(out, model)
    optimizers = build_optimizers(model, s)
    use_compile = can_compile(device) if s.compile is None else s.compile
    compiled = torch.compile(model) if use_compile else model
    warnings.filterwarnings("ignore", r"\s*Online softmax")  # from the compiler; harmless
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    mask_rng = torch.Generator(device)

    def forward_backward(rows, microbatch):
        """Forward and backward of this process's share of rows (B, T). Gradients (in p.grad) and
        metrics (returned) are weighted so that all_sum gives their means over all B rows."""
        mask_rng.manual_seed(mask_seed(s.seed, state.step))
        ids = rows.to(device, non_blocking=True).long()
        inputs = mask_tokens(ids, s.mask_rate, s.mask_replace, data.vocab_size, mask_rng)
        total = 0.0
        for micro in zip(*(my_rows(x).split(microbatch) for x in inputs)):
            with autocast:
                metrics = compiled(*micro) * (len(micro[0]) / len(rows))
            scaler.scale(metrics[0]).backward()
            total = total + metrics.detach()
        return total

    clock.lap("start")
    microbatch = s.microbatch or (512 if on_card else 32)
    if use_compile or on_card:
        microbatch = find_microbatch(
            microbatch, s, data.seq_len, model, optimizers, forward_backward)
        # The last microbatch of a step may be smaller: compile that size now, too
        batch = batch_at(progress_at(clock.elapsed(), state.step, s), s)
        forward_backward(torch.zeros(batch, data.seq_len, dtype=torch.int32), microbatch)
        model.zero_grad()
    clock.lap("compile")

    if saved:
        restore(saved, s, data, model, optimizers, scaler)
        say(f"resuming after step {state.step:,}")

    print_header(data, model, device, dtype, use_compile, microbatch)
    progress = progress_at(all_max(clock.elapsed())[0], state.step, s)
    log = Log(s, data, model, state, progress, peak_flops)

    # Rows that the budget still takes: with --steps counted, with --hours estimated in every step
    rows_left = math.inf
    if s.steps:
        rows_left = sum(batch_at(k / s.steps, s) for k in range(state.step, s.steps))
    # A thread reads the next s.batch rows while the card computes. How many of them the step takes
    # is decided later, by the clock
    reader = ThreadPoolExecutor(1)
    fetched = reader.submit(data.read, state.position, s, on_card)
    save_last = functools.partial(save_run, s, data, state, model, optimizers, scaler)
    first_step, skipped_in_a_row, saved_at = state.step, 0, time.monotonic()
    stop = Stop()  # before this there is nothing to save, and Ctrl-C just leaves
    clock.lap("start")

    while True:
        # 1. The processes agree on the time, the pace, and whether to stop. The pace is the mean of
        # the whole run, so that a pause in one step decides little; 0: not known yet
        s_per_row = state.seconds["train"] / state.rows if state.rows else 0.0
        elapsed, s_per_row, stopping = all_max(clock.elapsed(), s_per_row, stop.asked)

        # 2. The fraction of the budget that is spent decides batch, learning rate, and the end
        progress = progress_at(elapsed, state.step, s)
        batch, lr = batch_at(progress, s), lr_at(progress, s)
        too_late = not s.steps and elapsed + batch * s_per_row > budget_s
        if stopping or progress >= 1 or too_late:
            break

        # 3. Rows; those of the next step are read meanwhile
        rows = fetched.result()[:batch]
        if not s.steps and s_per_row:
            rows_left = (budget_s - elapsed) / s_per_row
        position = next_position(state.position, batch, rows_left, len(data.train), s)
        rows_left -= batch
        fetched = reader.submit(data.read, position, s, on_card)

        # 4. Gradients, summed over the processes
        metrics = forward_backward(rows, microbatch)
        all_sum([p.grad for p in model.parameters()] + [metrics])

        # 5. Update the weights
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        *means, norm = torch.cat([metrics, norm[None]]).tolist()  # waits for the card
        if math.isfinite(means[0]) and math.isfinite(norm):
            for optimizer in optimizers:
                scaler.step(optimizer)
            state.add(means)
            skipped_in_a_row = 0
        else:
            state.skipped += 1
            skipped_in_a_row += 1
            if skipped_in_a_row == MAX_SKIPPED:
                raise CramError(f"the gradients of {MAX_SKIPPED} steps in a row are {DIVERGED}")
        scaler.update()
        model.zero_grad()

        # 6. Count, log, validate, save
        state.step, state.rows, state.position = state.step + 1, state.rows + batch, position
        state.lr, state.batch = lr, batch
        clock.lap("train")
        elapsed = all_max(clock.elapsed())[0]  # again, as all processes validate, or none
        progress = progress_at(elapsed, state.step, s)
        line_due, validation_due = log.due(progress)
        if line_due:
            val = validate(model, autocast, val_set, microbatch) if validation_due else {}
            log.write(elapsed, progress, val)
            state.log_bytes, state.metric_steps = log.file.tell(), 0
            clock.lap("validate")
        if time.monotonic() - saved_at > 60 * s.save_minutes:
            save_last()
            saved_at = time.monotonic()
            clock.lap("save")

    reader.shutdown(cancel_futures=True)
    if stopping:
        if not save_last():
            raise CramError(f"stopped after step {state.step:,}, which could not be saved: "
                            "--resume goes on from an older last.pt, if there is one")
        say(f"stopped after step {state.step:,}; continue with --resume")
        return int(stopping)
    if not state.step:
        raise CramError("the budget was over before the first step")

    # A resume with a larger budget cuts this line off, as `log_bytes` does not count it
    result = log.write(elapsed, progress, validate(model, autocast, val_set, microbatch))
    if not math.isfinite(result["val_loss"]):
        raise CramError(f"the validation loss is {DIVERGED}")
    # Before last.pt: if the disk holds only one more file, it should be the model
    save_atomic(out / "ckpt.pt", {
        "settings": asdict(s), "vocab_size": data.vocab_size, "seq_len": data.seq_len,
        "tokenizer": data.tokenizer_json, "result": result,
        **{name: network.state_dict() for name, network in networks_of(model).items()}})
    if state.step > first_step:
        save_last()
    else:  # last.pt stays, or each such resume would use up budget by its start
        say("no step fits in what is left of the budget: the model is written as it stands")
    print_summary(s, data, model, state, result, device, peak_flops)
    return stop.asked  # after the last step: all is done, and a shell's loop goes no further


# --------------------------------------------------------------------- 6. What train and main call


class Clock:
    """Adds to seconds[part] the time since the part before it ended. What comes after the last lap
    costs no budget: the final validation and checkpoints, and the time until a resume."""

    def __init__(self, seconds):
        self.seconds, self.lap_began = seconds, time.monotonic()

    def lap(self, part):
        now = time.monotonic()
        self.seconds[part] += now - self.lap_began
        self.lap_began = now

    def elapsed(self):
        return sum(self.seconds.values()) + time.monotonic() - self.lap_began


PEAK_TFLOPS = {  # dense bf16 (fp16 before Ampere) with fp32 accumulation, NVIDIA's data sheets
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "L4": 121, "A10": 125, "RTX A6000": 154.8, "RTX A4000": 76.7, "RTX 4090": 165.2,
    "RTX 3090": 71, "RTX 2080 Ti": 53.8, "V100": 125, "T4": 65,
    # An unlisted card's MFU is n/a; a variant (Ti, Laptop) counts as the card it is named after
}


def find_device(name, precision):
    """The device, the dtype of matrix products on it, and the peak FLOP/s of all cards or None."""
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
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((1e12 * tflops * WORLD_SIZE for key, tflops in PEAK_TFLOPS.items()
                 if re.search(rf"\b{key}\b", card) and dtype != torch.float32), None)
    return device, dtype, peak


def has_bf16(device):
    """Whether the card has bf16 itself: torch emulates it on Turing, very slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def can_compile(device):
    """Whether torch.compile has what it needs: Triton, and a card from Volta on."""
    return (device.type == "cuda" and importlib.util.find_spec("triton") is not None
            and torch.cuda.get_device_capability(device) >= (7, 0))


def join_processes(s, device, model):
    """Connect the processes of torchrun. All begin with rank 0's weights, as cards of two models
    draw different ones from a seed."""
    if WORLD_SIZE == 1:
        return
    if device.type == "mps":
        raise CramError("torchrun needs CUDA cards, or --device cpu")
    if batch_at(0, s) < WORLD_SIZE:
        raise CramError(f"{batch_at(0, s)} rows in a step, too few for {WORLD_SIZE} processes")
    # gloo carries the numbers of all_max, NCCL what is on the cards
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    for p in model.parameters():
        dist.broadcast(p.detach(), 0)


def my_rows(x):
    """This process's share of the first dimension."""
    return x[len(x) * RANK // WORLD_SIZE : len(x) * (RANK + 1) // WORLD_SIZE]


def all_max(*numbers):
    """For each number the largest of all processes; for booleans: whether any is True."""
    if WORLD_SIZE == 1:
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.float64)
    all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def all_sum(tensors):
    """Replace the tensors by their sums over the processes, all in one message. A compiled backward
    pass hands over all gradients at once, so DDP's overlap would gain nothing."""
    if WORLD_SIZE > 1:
        vector = nn.utils.parameters_to_vector(tensors)
        all_reduce(vector)
        nn.utils.vector_to_parameters(vector, tensors)


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError as error:
        raise CramError(f"rank {RANK} has lost another process of the run ({error}). When the "
                        "cause is fixed, continue with --resume") from None


def say(text):
    """Print, in the process of rank 0. A screen that cannot be written never ends a run: the
    terminal was closed, a disk behind nohup is full, `| head` has seen enough."""
    if RANK == 0:
        try:
            print(text, flush=True)
        except (OSError, ValueError):  # what waits in the stream would fail again at exit
            sys.stdout = open(os.devnull, "w")


def lock_folder(out):
    """Make the folder, and let one run at a time write there. Returns a file to keep open: the lock
    ends with the process, however that ends, or when the file is closed, here or elsewhere."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "lock", "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise CramError(f"another run is writing to {out}: wait for it to end, or give another "
                        "--out") from None
    except (ImportError, OSError) as error:  # Windows, or a file system without locks
        say(f"{out} cannot be locked ({error}): start no other run there")
    return file


def check_free_disk(out, model):
    """Refuse to start where the checkpoints will not fit. 28 bytes a parameter: 12 for last.pt
    (weights, two moments at most), an old and a new one while saving, and 4 for ckpt.pt."""
    room = shutil.disk_usage(out).free + sum(path.stat().st_size for path in out.glob("*.pt*"))
    needed = 28 * sum(p.numel() for p in model.parameters())
    if RANK == 0 and room < needed:
        raise CramError(f"{out} has room for {room / 1e6:,.0f} MB of checkpoints, and they need "
                        f"{needed / 1e6:,.0f} MB: make room, or give another --out")


def find_microbatch(microbatch, s, seq_len, model, optimizers, forward_backward):
    """The rows per forward pass that fit in memory: microbatch, or a half, a quarter, ... of it.

    Tries two microbatches of zeros, which also compiles the code, beside as much memory as the
    optimizers' moments will take: one of each weight in Muon, two in AdamW.
    """
    moments = [torch.empty_like(p) for optimizer in optimizers  # noqa: F841
               for group in optimizer.param_groups for p in group["params"]
               for _ in range(1 if isinstance(optimizer, Muon) else 2)]
    while microbatch:
        out_of_memory = False
        rows = min(s.batch, 2 * microbatch * WORLD_SIZE)
        try:
            forward_backward(torch.zeros(rows, seq_len, dtype=torch.int32), microbatch).tolist()
        except torch.OutOfMemoryError:
            out_of_memory = True
        model.zero_grad()  # not in the except clause: there the traceback holds the activations
        if not all_max(out_of_memory)[0]:
            return microbatch
        say(f"{microbatch} rows per forward pass do not fit in memory: trying half, which changes "
            "no result")
        microbatch //= 2
        torch.compiler.reset()  # or the next size is compiled for any size, which is slower
        torch.cuda.empty_cache()
    raise CramError("a single row per forward pass does not fit in the card's memory")


def print_header(data, model, device, dtype, use_compile, microbatch):
    parameters = sum(p.numel() for p in model.parameters())
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    say(f"{parameters:,} parameters on {WORLD_SIZE} x {card}, {dtype}{', compiled' * use_compile}; "
        f"{microbatch} rows per forward pass\n"
        f"{len(data.train):,} rows of {data.seq_len} tokens; always predicting the token "
        f"frequencies gives loss {data.unigram_entropy:.3f}, the unigram entropy\n"
        "    time   done     step  batch        lr    loss     val    tokens/s     MFU")


class Log:
    """A line every 2 % of the budget or every minute (with --steps: 100 steps), whichever comes
    first; validation every 5 %. Rank 0 writes the lines to the screen and to log.jsonl."""

    def __init__(self, s, data, model, state, progress, peak_flops):
        self.lines = max(50, s.steps / 100 if s.steps else 60 * s.hours)
        self.state, self.progress = state, progress
        self.rows, self.train_s, self.tokens_per_s = state.rows, state.seconds["train"], 0.0
        self.seq_len, self.metric_names = data.seq_len, model.metric_names
        self.flops_per_token, self.peak_flops = model.flops_per_token(s.mask_rate), peak_flops
        self.file = open(os.devnull if RANK else Path(s.out) / "log.jsonl", "ab", buffering=0)
        if RANK == 0:  # a resume cuts off what was written after last.pt
            self.file.truncate(min(self.file.tell(), state.log_bytes))

    def due(self, progress):
        """Whether a line is due, and whether with a validation."""
        def crossed(parts):  # + 1e-9: 0.29 * 100 is 28.999...
            return int(progress * parts + 1e-9) > int(self.progress * parts + 1e-9)

        validation = crossed(20)
        line = validation or crossed(self.lines)
        self.progress = progress
        return line and progress < 1, validation  # the last line of a run comes after the loop

    def write(self, elapsed, progress, val_metrics):
        state, train_s = self.state, self.state.seconds["train"]
        if state.rows > self.rows:
            tokens = (state.rows - self.rows) * self.seq_len
            self.tokens_per_s = tokens / (train_s - self.train_s)
        self.rows, self.train_s = state.rows, train_s
        flops = self.tokens_per_s * self.flops_per_token
        entry = {"step": state.step, "tokens": state.rows * self.seq_len, "elapsed_s": elapsed,
                 "progress": progress, "lr": state.lr, "batch": state.batch,
                 **dict.fromkeys(self.metric_names),  # None until a step is finite
                 **dict(zip(self.metric_names, state.metrics)),
                 "tokens_per_s": self.tokens_per_s,
                 "mfu": flops / self.peak_flops if self.peak_flops else None, **val_metrics}
        say(log_row(entry))
        try:
            line = json.dumps(entry).encode() + b"\n"
            written = self.file.write(line)
            if written < len(line):  # a disk that is just becoming full takes a part
                self.file.truncate(self.file.tell() - written)
                raise OSError("no space left")
        except OSError as error:
            say(f"log.jsonl: {error}; training continues")
        return entry


def log_row(e):
    """A line of the log for the screen. Of `Electra` loss and val are the generator's."""
    minutes, seconds = divmod(round(e["elapsed_s"]), 60)
    elapsed = f"{minutes // 60:2}:{minutes % 60:02}:{seconds:02}"
    loss = e.get("loss_generator", e["loss"])
    loss = "-" if loss is None else f"{loss:.3f}"
    val = f"{e['val_loss']:.3f}" if "val_loss" in e else ""
    mfu = "n/a" if e["mfu"] is None else f"{e['mfu']:.1%}"
    return (f"{elapsed} {e['progress']:6.1%} {e['step']:8} {e['batch']:6} {e['lr']:9.2e} "
            f"{loss:>7} {val:>7} {e['tokens_per_s']:11,.0f} {mfu:>7}")


class Stop:
    """Ctrl-C, SIGTERM or a closed terminal ask for a stop after the current step; a second Ctrl-C
    ends the process at once. A second SIGTERM does not: a cluster and torchrun may send one each.
    Ignored signals stay ignored: nohup relies on it."""

    def __init__(self):
        self.asked = 0  # number of the signal
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if RANK == 0:
            with contextlib.suppress(OSError):  # the terminal may be gone; print may be under way
                os.write(1, b"\nstopping after this step; a second Ctrl-C leaves at once\n")


@torch.no_grad()
def validate(model, autocast, val_set, rows_at_once):
    """The model's means over the validation set, as entries of the log. Not compiled: that would
    take longer than it saves."""
    total = torch.zeros(len(model.metric_names), dtype=torch.float64)
    for micro in zip(*(my_rows(x).split(rows_at_once) for x in val_set)):
        if len(micro[0]):  # a share is empty if there are fewer rows than processes
            with autocast:
                total += model(*micro).cpu() * (len(micro[0]) / len(val_set[0]))
    all_sum([total])
    mean = dict(zip(model.metric_names, total.tolist()))
    if not isinstance(model, Electra):
        return {"val_loss": mean["loss"]}
    return {"val_loss": mean["loss_generator"], "val_rtd_loss": mean["loss_discriminator"],
            "val_rtd_recall": mean["found"] / max(mean["replaced"], 1e-9)}


def save_run(s, data, state, model, optimizers, scaler):
    """Write last.pt, all that a resume needs. False if it cannot be written: a full disk ends no
    run. Weights that are not finite end it, and do not replace last.pt."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise CramError(f"the weights are {DIVERGED}")
    try:
        save_atomic(Path(s.out) / "last.pt", {
            "settings": asdict(s), "data": data.hashes, "state": asdict(state),
            "model": model.state_dict(), "scaler": scaler.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
    except OSError as error:
        say(f"{error} last.pt stays as it was")
        return False
    return True


def restore(saved, s, data, model, optimizers, scaler):
    """Put the weights, moments and loss scale of last.pt where they belong."""
    differs = [key for key in data.hashes if saved["data"][key] != data.hashes[key]]
    if differs:
        raise CramError(f"{s.data} is not what the run in {s.out} was trained on: other "
                        + " and ".join(differs))
    model.load_state_dict(saved["model"])
    for optimizer, moments in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(moments)
    if saved["scaler"]:  # empty if the run had another precision
        scaler.load_state_dict(saved["scaler"])
    saved.clear()  # frees 1.4 GB


def save_atomic(path, content):
    """Rank 0 saves atomically: temporary file, fsync, rename. Raises OSError if that fails; what
    was there before is then still there."""
    if RANK:
        return
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports some write errors as RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}): is the disk full?") from error


def load_file(path, needed):
    """What save_atomic wrote, if `needed` is in it. With weights_only no code in it is run."""
    if not Path(path).is_file():
        raise CramError(f"no checkpoint {path}: a finished run has a ckpt.pt, and one that was "
                        "stopped needs --resume")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["settings"] = Settings(**content["settings"])  # what is missing takes its default
        if "state" in content:
            content["state"] = TrainState(**content["state"])
        if needed not in content:
            raise KeyError(needed)
    except TypeError as error:
        raise CramError(f"{path} is not from this version of cram.py: {error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise CramError(f"{path} is not a checkpoint of cram.py, or not the right one (last.pt is "
                        "a run to resume, ckpt.pt a finished model), or holds code, which is not "
                        f"run ({type(error).__name__})") from None
    return content


def print_summary(s, data, model, state, result, device, peak_flops):
    elapsed, tokens = sum(state.seconds.values()), result["tokens"]
    parts = ", ".join(f"{name} {t:.1f} s ({t / elapsed:.1%})" for name, t in state.seconds.items())
    budget = f"{s.steps:,} steps" if s.steps else f"{3600 * s.hours:.1f} s"
    memory = (f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
              if device.type == "cuda" else "n/a")
    peak = f"{elapsed * peak_flops / 1e18:.3f}" if peak_flops else "n/a"
    used = tokens * model.flops_per_token(s.mask_rate) / 1e18
    say(f"""
tokens           {tokens:,} in {state.rows:,} rows, {state.rows / len(data.train):.2f} passes
steps            {state.step:,}, of which {state.skipped:,} skipped
wall clock       {elapsed:.1f} s of {budget}
                 {parts}
peak memory      {memory}
exaFLOP          {peak} as the paper counts (peak x time), {used:.3g} used
training loss    {result.get('loss_generator', result['loss']) or math.nan:.3f}
validation loss  {result['val_loss']:.3f} (unigram entropy {data.unigram_entropy:.3f})
wrote            {Path(s.out) / 'ckpt.pt'}""")


# --------------------------------------------------------------------------- 7. The finished model


def networks_of(model):
    """The networks that ckpt.pt holds. Of `Electra` the model is the discriminator."""
    if isinstance(model, Electra):
        return {"model": model.discriminator, "generator": model.generator}
    return {"model": model}


def load_checkpoint(path, device="cpu", generator=False):
    """The finished model, in evaluation mode, and its tokenizer. With generator=True, of `Electra`
    the generator instead of the discriminator.

        model, tokenizer = load_checkpoint("out/ckpt.pt", device="cuda")

    Raises CramError if the file is missing, is something else, or holds code.
    """
    content = load_file(path, "tokenizer")
    name = "generator" if generator and "generator" in content else "model"
    whole = build_model(content["settings"], content["vocab_size"], content["seq_len"])
    model = networks_of(whole)[name]
    model.load_state_dict(content[name])
    return model.to(device).eval(), Tokenizer.from_str(content["tokenizer"])


@torch.no_grad()
def fill(path, text, device):
    """Print the five likeliest tokens for each <mask> of the text; for a text without, if the model
    has learned that, the probability of each word to be a replaced one."""
    model, tokenizer = load_checkpoint(path, device, generator="<mask>" in text)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids = torch.tensor([[CLS, *encoding.ids, SEP]], device=device)
    if MASK in encoding.ids:
        for logits in model.logits(ids)[ids == MASK]:
            say("<mask>: " + ", ".join(f"{tokenizer.id_to_token(int(i))} {p:.1%}"
                                       for p, i in zip(*logits.softmax(0).topk(5))))
    elif model.objective == "rtd":
        words = {}  # a word is as suspicious as its most suspicious piece
        for word, p in zip(encoding.word_ids, model.replaced(ids)[0, 1:-1].tolist()):
            words[word] = max(p, words.get(word, 0.0))
        for word, p in words.items():
            start, end = encoding.word_to_chars(word)
            say(f"{p:6.1%}  {text[start:end]}")
    else:
        raise CramError('--fill needs a text with a <mask> in it, as "paris is in <mask>."')


@torch.no_grad()
def export(path, folder):
    """Write a finished model as a folder that Hugging Face transformers loads as ModernBERT.
    Raises CramError if it is not of that architecture, or the folder is not empty."""
    model, tokenizer = load_checkpoint(path)
    if not model.modernbert:
        raise CramError(f"{path} has the paper's architecture, for which transformers has no class "
                        "(sinusoid positions): only --model modernbert can be exported")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise CramError(f"{folder} is not empty: give --export a new folder")

    joined = {"model.embeddings.tok_embeddings": [model.embed], "head.dense": [model.head[0]],
              "model.embeddings.norm": [model.embed_norm], "model.final_norm": [model.final_norm],
              "head.norm": [model.head[2]]}
    for i, block in enumerate(model.blocks):
        layer, attention, ffn = f"model.layers.{i}", block.attention, block.ffn
        joined |= {f"{layer}.attn.Wqkv": [attention.q, attention.k, attention.v],
                   f"{layer}.attn.Wo": [attention.out], f"{layer}.mlp.Wi": [ffn.gate, ffn.up],
                   f"{layer}.mlp.Wo": [ffn.down], f"{layer}.mlp_norm": [block.norm2]}
        if i:
            joined[f"{layer}.attn_norm"] = [block.norm1]
    weights = {f"{name}.weight": torch.cat([module.weight for module in modules])
               for name, modules in joined.items()}
    kind, labels = "ForMaskedLM", {}
    if model.objective == "rtd":  # softmax of (0, z) is the sigmoid of z
        weights["classifier.weight"] = torch.stack([0 * model.score, model.score])
        weights["classifier.bias"] = F.pad(model.score_bias, (1, 0))
        kind, labels = "ForTokenClassification", {
            "id2label": {0: "original", 1: "replaced"}, "label2id": {"original": 0, "replaced": 1}}
    save_atomic(folder / "pytorch_model.bin", weights)

    V, C = model.embed.weight.shape
    theta = {"rope_type": "default", "rope_theta": ROPE_THETA}
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["ModernBert" + kind], "model_type": "modernbert", **labels,
        "vocab_size": V, "hidden_size": C, "intermediate_size": 2 * C, "norm_eps": 1e-5,
        "num_attention_heads": model.blocks[0].attention.heads, "decoder_bias": False,
        "max_position_embeddings": model.seq_len, "num_hidden_layers": len(model.blocks),
        "global_attn_every_n_layers": 1, "layer_types": ["full_attention"] * len(model.blocks),
        "rope_parameters": {"full_attention": theta, "sliding_attention": theta},
        "global_rope_theta": ROPE_THETA, "local_rope_theta": ROPE_THETA,  # before transformers 5
        "pad_token_id": PAD, "cls_token_id": CLS, "sep_token_id": SEP,
        "bos_token_id": CLS, "eos_token_id": SEP}, indent=2))

    tokenizer.decoder = decoders.WordPiece()  # "un ##hash ##able" -> "unhashable"
    tokenizer.post_processor = TemplateProcessing(
        "<cls> $A <sep>", "<cls> $A <sep> $B:1 <sep>:1", [("<cls>", CLS), ("<sep>", SEP)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.seq_len,
        "model_input_names": ["input_ids", "attention_mask"], "pad_token": "<pad>",
        "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>"}))
    say(f"wrote {folder}: AutoModel{kind}.from_pretrained({str(folder)!r}) loads it")


# --------------------------------------------------------------------------------- 8. Command line

# A resume may change these; all others define the run.
MAY_CHANGE_ON_RESUME = {"hours", "steps", "data", "out", "microbatch", "device", "precision",
                        "compile", "save_minutes"}

CHOICES = {"recipe": RECIPES, "model": ("crammed", "modernbert"), "objective": ("mlm", "rtd"),
           "optimizer": ("adamw", "muon"), "order": ("file", "random"),
           "precision": ("auto", "bf16", "fp16", "fp32")}


def check(s):
    """Raise CramError for numbers that cannot work; argparse knows the CHOICES."""
    rules = [
        ("hours layers width heads generator_layers generator_width batch lr eps clip", "above 0",
         lambda x: 0 < x < math.inf),
        ("steps microbatch weight_decay rtd_weight save_minutes seed", "from 0 to 2**63",
         lambda x: 0 <= x < 2**63),
        ("ramp lr_start warmup decay mask_rate mask_replace", "from 0 to 1",
         lambda x: 0 <= x <= 1),
        ("beta1 beta2", "from 0 to below 1", lambda x: 0 <= x < 1)]
    for names, what, holds in rules:
        for name in names.split():
            value = getattr(s, name)
            if not holds(value):
                raise CramError(f"--{name.replace('_', '-')} must be {what}, not {value}")


def resolve_settings(given, saved):
    """What was given on the command line, over the settings of last.pt or of the recipe."""
    if "minutes" in given:
        given["hours"] = given.pop("minutes") / 60
    if "hours" in given:
        given["steps"] = 0
    recipe = RECIPES[given.get("recipe", Settings.recipe)]
    base = saved["settings"] if saved else Settings(**recipe)
    s = replace(base, **given)
    check(s)
    if saved:
        differs = [f"--{key.replace('_', '-')} {value} (was {getattr(base, key)})"
                   for key, value in given.items()
                   if value != getattr(base, key) and key not in MAY_CHANGE_ON_RESUME]
        if differs:
            raise CramError(f"a run cannot be resumed with other settings: {', '.join(differs)}")
        if (s.hours, s.steps) != (base.hours, base.steps):
            say("another budget: the schedule continues at the fraction of it that is spent")
    return s


def parse_arguments():
    """What the command line gives: name -> value, without the flags that are not on it."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Settings), re.M))
    parser = argparse.ArgumentParser(
        usage="cram.py [--flag value ...]", description=__doc__, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    budget = parser.add_mutually_exclusive_group()
    for f in fields(Settings):
        kind = ({"action": argparse.BooleanOptionalAction} if f.name == "compile" else
                {"type": f.type, "metavar": f.type.__name__, "choices": CHOICES.get(f.name)})
        values = [f"default: {f.default}", *(
            f"{name}: {recipe[f.name]}" for name, recipe in RECIPES.items() if f.name in recipe)]
        help = f"{comments[f.name]} ({'; '.join(values)})".replace("%", "%%")
        group = budget if f.name in ("hours", "steps") else parser
        group.add_argument("--" + f.name.replace("_", "-"), **kind, help=help)
    budget.add_argument("--minutes", type=float, metavar="float",
                        help="wall-clock budget in minutes instead of --hours")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true",
                      help="continue the run in --out where it stopped, with its settings")
    mode.add_argument("--fill", metavar="TEXT", help="print the model's best guesses for each "
                      "<mask> in TEXT, or with rtd the probability of each word to be replaced; on "
                      "the CPU unless --device is given")
    mode.add_argument("--export", metavar="DIR", help="write the finished model for Hugging Face "
                      "transformers into the new folder DIR, then exit")
    return vars(parser.parse_args())


def main():
    if hasattr(sys.stdout, "reconfigure"):  # an ASCII terminal shows é as \xe9
        sys.stdout.reconfigure(errors="backslashreplace")
    given = parse_arguments()
    resume, text, folder = (given.pop(name, None) for name in ("resume", "fill", "export"))
    out = Path(given.get("out", Settings.out))
    if text is not None:
        return fill(out / "ckpt.pt", text, find_device(given.get("device", "cpu"), "fp32")[0])
    if folder is not None:
        return export(out / "ckpt.pt", Path(folder))

    if resume and not (out / "last.pt").exists():
        raise CramError(f"there is no {out}/last.pt to resume")
    lock = lock_folder(out) if RANK == 0 else None  # noqa: F841, held until this function ends
    if not resume and ((out / "last.pt").exists() or (out / "ckpt.pt").exists()):
        raise CramError(f"{out} holds a run: give another --out, or continue it with --resume")
    saved = load_file(out / "last.pt", "state") if resume else {}
    given["out"] = str(out)  # it may have been moved since
    stopped_by = train(resolve_settings(given, saved), saved)
    if dist.is_initialized():
        with contextlib.suppress(CramError):  # another process may have left: all is saved by now
            all_max(0)  # rank 0 may still be writing
        dist.destroy_process_group()
    return stopped_by if WORLD_SIZE == 1 else 0  # torchrun would report a failure


if __name__ == "__main__":
    try:
        asked = main()
    except KeyboardInterrupt:  # before the first step
        asked = signal.SIGINT
        print("\ncram.py: interrupted", file=sys.stderr)
    except (CramError, OSError) as error:
        sys.exit(f"cram.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("cram.py: out of memory: is another program on the card? Go on with --resume, or "
                 "begin again if there is no last.pt, and give a smaller --microbatch")
    if asked:  # end by the signal, so that a shell's && or loop goes no further
        signal.signal(asked, signal.SIG_DFL)
        signal.raise_signal(asked)
