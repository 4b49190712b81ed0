"""Fine-tune a crammed BERT on GLUE and score it.

    python finetune_glue.py --task cola               # out/ckpt.pt -> out/glue.json
    python finetune_glue.py --task all --trials 5     # the eight tasks, and the mean of nine scores
    python finetune_glue.py --task all --test         # also the files that the GLUE server takes
    python finetune_glue.py --task cola --scratch     # control: the same network, not pretrained

The settings are those of "Cramming" (arXiv 2212.14034; GLUE_sane in its code), the same for all
tasks: five epochs, scored after the last, the median of five trials. Every task starts from the
checkpoint, none from a model tuned on MNLI. Dropout can differ from the paper's, see --dropout.

A score depends only on checkpoint, task, seed, settings and data. A trial whose score is in
glue.json is not run again. After changing this script, move glue.json away: it records no code.
"""

import argparse
import copy
import gc
import hashlib
import json
import lzma
import math
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from cram import CLS, PAD, SEP, CramError, can_compile, find_device, load_checkpoint

# -------------------------------------------------------------------------------- 1. Tasks


class Task(NamedTuple):
    columns: tuple  # with text: one sentence or a pair
    labels: tuple  # names of labels 0, 1, ...; empty: regression on 0 to 5
    metric: str  # one of METRICS
    train_rows: int | None = None  # official; with others a "subset". None: not in --task all
    test: dict = {}  # split -> name of the file for the GLUE server
    validation: tuple = ("validation",)  # splits


PAIR, BINARY = ("sentence1", "sentence2"), ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")

# A task of your own is one more entry and two files, as the README shows
TASKS = {
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy",
                 392_702, {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"},
                 ("validation_matched", "validation_mismatched")),
    "sst2": Task(("sentence",), BINARY, "accuracy", 67_349, {"test": "SST-2"}),
    "stsb": Task(PAIR, (), "pearson", 5_749, {"test": "STS-B"}),
    "rte": Task(PAIR, ENTAILMENT, "accuracy", 2_490, {"test": "RTE"}),
    "qnli": Task(("question", "sentence"), ENTAILMENT, "accuracy", 104_743, {"test": "QNLI"}),
    "qqp": Task(("question1", "question2"), BINARY, "f1", 363_846, {"test": "QQP"}),
    "mrpc": Task(PAIR, BINARY, "f1", 3_668, {"test": "MRPC"}),
    "cola": Task(("sentence",), BINARY, "matthews", 8_551, {"test": "CoLA"}),
}
EIGHT = [name for name, task in TASKS.items() if task.train_rows]  # --task all

# Crammed v2 on the validation sets, two for MNLI: the best of five runs of 24 h on an A6000
PAPER = {"mnli-matched": 84.1, "mnli-mismatched": 84.6, "sst2": 92.0, "stsb": 87.4, "rte": 58.5,
         "qnli": 90.2, "qqp": 87.5, "mrpc": 88.9, "cola": 53.3}

MAX_LENGTH = 128  # tokens of an example, at most
BUCKET = 32  # batches are padded to 32, 64, 96 or 128 tokens; `record_graphs` allows no more


# -------------------------------------------------------------------------------- 2. Metrics
# Each takes predictions and labels (N,). Where a formula divides by zero the score is 0.


def accuracy(predicted, labels):
    return float((predicted == labels).mean())


def f1(predicted, labels):
    """Harmonic mean of precision and recall of class 1."""
    both = ((predicted == 1) & (labels == 1)).sum()
    total = (predicted == 1).sum() + (labels == 1).sum()
    return float(2 * both / total) if total else 0.0


def matthews(predicted, labels):
    """Correlation of two binary variables: 1 perfect, 0 no better than chance."""
    return pearson(predicted == 1, labels == 1)


def pearson(predicted, labels):
    x, y = predicted.astype(float), labels.astype(float)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (np.sqrt((x * x).sum()) * np.sqrt((y * y).sum())))


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson}


# -------------------------------------------------------------------------------- 3. Data


class Split(NamedTuple):
    ids: torch.Tensor  # (N, L) int32, padded with PAD
    labels: torch.Tensor  # (N,) int64 classes or float32 numbers; zeros in a test split
    lengths: np.ndarray  # (N,) tokens of each example, rounded up to a multiple of BUCKET


def read_split(name, split, folder):
    """The rows of a split, from <folder>/<task>/<split>.jsonl[.xz] or, without a folder, from
    nyu-mll/glue on the hub. Raises CramError or OSError if they cannot be read or used."""
    if folder is None:
        import datasets  # only here: local data needs neither it nor a network

        where = f"nyu-mll/glue {name} {split}"
        try:
            rows = list(datasets.load_dataset("nyu-mll/glue", name, split=split))
        except Exception as error:  # its type depends on the HTTP library
            raise CramError(f"cannot load {where} from the hub ({error!r:.120}); without a "
                            "network, give --data") from None
    else:
        where, open_file, rows = Path(folder, name, f"{split}.jsonl.xz"), lzma.open, []
        if not where.exists():
            where, open_file = where.with_suffix(""), open
        try:
            with open_file(where, "rt", encoding="utf-8-sig") as f:  # -sig skips a byte order mark
                for line in filter(str.strip, f):  # not the blank ones
                    rows.append(json.loads(line))
        except (ValueError, EOFError, lzma.LZMAError) as error:  # not JSON, not UTF-8, cut off
            raise CramError(f"{where}, after {len(rows)} rows: {error}") from None

    if not rows:
        raise CramError(f"{where} has no rows")
    task, classes = TASKS[name], len(TASKS[name].labels)
    for i, row in enumerate(rows):
        good = isinstance(row, dict) and all(isinstance(row.get(c), str) for c in task.columns)
        if split in task.test:
            good, needs = good and row.get("idx", i) == i, "idx counting from 0 for the GLUE server"
        elif classes:
            good, needs = good and row.get("label") in range(classes), f"a label below {classes}"
        else:
            label = row.get("label") if good else None
            good, needs = isinstance(label, (int, float)) and 0 <= label <= 5, "a label from 0 to 5"
        if not good:
            raise CramError(f"{where}, row {i + 1}, needs {' and '.join(task.columns)} as text, "
                            f"{needs}: {json.dumps(row)[:300]}")
    return rows


def load_task(name, args, tokenizer, device):
    """{name: Split} of a task, on the device, and a hash of its training and validation data."""
    task, splits, hashed = TASKS[name], {}, []
    for split in ("train", *task.validation, *(task.test if args.test else ())):
        rows = read_split(name, split, args.data)
        # "ignore" drops halves of surrogate pairs (broken JSON), which the tokenizer refuses
        texts = [[row[column].encode("utf-8", "ignore").decode() for row in rows]
                 for column in task.columns]
        labels = [0 if split in task.test else row["label"] for row in rows]
        if split not in task.test:
            hashed += [texts, labels]

        tokens = [tokenizer.encode_batch_fast(column, add_special_tokens=False) for column in texts]
        examples = [build_example([part.ids for part in parts], args.max_length)
                    for parts in zip(*tokens)]
        lengths = np.array([math.ceil(len(example) / BUCKET) * BUCKET for example in examples])
        lengths = lengths.clip(max=args.max_length)
        ids = np.full((len(rows), lengths.max()), PAD, np.int32)
        for row, example in zip(ids, examples):
            row[: len(example)] = example
        labels = torch.tensor(labels, dtype=torch.int64 if task.labels else torch.float32)
        splits[split] = Split(torch.from_numpy(ids).to(device), labels.to(device), lengths)

    n_rows = len(splits["train"].ids)
    if n_rows < args.batch_size:
        raise CramError(f"{name} has {n_rows} training rows: give a smaller --batch-size")
    if task.train_rows not in (None, n_rows):
        print(f"{name}: a subset, {n_rows:,} training rows, not the official {task.train_rows:,}")
    return splits, hashlib.sha256(json.dumps(hashed).encode()).hexdigest()


def build_example(parts, max_length):
    """Token ids <cls> A <sep> or <cls> A <sep> B <sep>. The longer part is cut first."""
    parts = [list(ids) for ids in parts]
    while 1 + sum(len(ids) + 1 for ids in parts) > max_length:
        max(parts, key=len).pop()
    return [CLS] + [token for ids in parts for token in (*ids, SEP)]


def epoch_batches(split, seed, args):
    """Row numbers (steps, B) and padded length (steps,) of each step of a trial. Every epoch
    shuffles the rows and drops an incomplete last batch."""
    rng, N, B = np.random.default_rng(seed), len(split.lengths), args.batch_size
    rows = [rng.permutation(N)[: N // B * B] for _ in range(args.epochs)]
    rows = np.concatenate(rows).reshape(-1, B)
    return rows, split.lengths[rows].max(1)


# -------------------------------------------------------------------------------- 4. Classifier


class Classifier(nn.Module):
    """BERT, then a tanh layer and an output layer on the final state of the first token, <cls>.

    Their biases and the width 1024 are the paper's, also for ModernBERT. A CUDA graph records
    forward, so there is no .item() and no shape that depends on values.
    """

    def __init__(self, bert, classes, dropout):
        super().__init__()
        self.bert = bert
        self.pool = nn.Linear(bert.embed.embedding_dim, 1024)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(1024, classes)
        for module in bert.modules():  # built with p = 0, as pretraining has none
            if isinstance(module, nn.Dropout):
                module.p = dropout

    def forward(self, ids, attention_mask):
        """ids (B, T), attention_mask (B, T) False at padding -> logits (B, classes)."""
        first = self.bert.encode(ids, attention_mask)[:, 0]
        return self.out(self.dropout(torch.tanh(self.pool(first))))


def lr_at(step, steps, peak):
    """Linear warm-up over the first 10 % of the task's steps, then a cosine to zero."""
    warmup = max(1, round(0.1 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# -------------------------------------------------------------------------------- 5. A trial

COMPILE_ROWS = 50_000  # with fewer training rows, compiling (seconds per length) does not pay
OVERHEAD = 48  # for the bar: a step takes time like its padded length + 48, as timed on an H200


def trials_at_once(model, device, dtype, batch_size):
    """How many trials run side by side: as many as fit in memory, at most eight. A rule of thumb:
    per parameter, a trial needs 16 bytes for weight, gradient and two moments, and another 24 for
    the activations of 16 rows in bf16."""
    if device.type != "cuda":
        return 1
    bytes_each = 16 + 12 * dtype.itemsize * max(1, batch_size / 16)
    needed = sum(p.numel() for p in model.parameters()) * bytes_each
    return min(8, max(1, int(torch.cuda.mem_get_info(device)[0] / needed)))


class Trial:
    """Fine-tunes a copy of a model on one task with one seed: run_step(0), (1), ..., then scores().

    A step on 16 short rows launches about a thousand small kernels, which takes longer than running
    them. On CUDA it is therefore recorded once, as a CUDA graph, and replayed. A graph reads and
    writes fixed addresses, so new values are copied into existing tensors: row numbers and learning
    rate before every step, the initial weights after recording.

    One step does not fill the card, so trials run side by side. Each has its own stream and, for
    dropout, its own random generator: its result does not depend on the others.
    """

    def __init__(self, bert, task, train, seed, dtype, args):
        self.task, self.train, self.device = task, train, train.ids.device
        rows, lengths = epoch_batches(train, seed, args)
        self.rows, self.lengths = torch.from_numpy(rows).to(self.device), lengths.tolist()
        self.lrs = torch.tensor([lr_at(k, len(rows), args.lr) for k in range(len(rows))],
                                device=self.device)
        self.chosen = torch.zeros(args.batch_size, dtype=torch.int64, device=self.device)
        self.lr = torch.zeros((), device=self.device)

        classes = len(task.labels) or 1
        self.model = Classifier(copy.deepcopy(bert), classes, args.dropout).to(self.device).train()
        self.autocast = torch.autocast(
            self.device.type, dtype=dtype, enabled=dtype != torch.float32,
            cache_enabled=False)  # a cached cast would be in one graph and missing in the next
        self.use_graphs = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0,
            fused=True, capturable=self.use_graphs)
        self.stream = None
        if self.use_graphs:
            self.record_graphs()
        self.set_weights(bert, seed, args.scratch)  # last, as recording takes real steps

    def set_weights(self, bert, seed, scratch):
        """Pretrained or random weights, a new head, zero moments, all in the existing tensors."""
        torch.manual_seed(seed)
        self.model.bert.load_state_dict(bert.state_dict())
        if scratch:
            self.model.bert.init_weights()
        for linear in (self.model.pool, self.model.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        if self.use_graphs:
            self.generator.manual_seed(seed)
            self.stream.wait_stream(torch.cuda.current_stream())

    def step(self, T):
        """Update the weights once, on the rows `chosen`, padded to T tokens."""
        ids, labels = self.train.ids[self.chosen, :T], self.train.labels[self.chosen]
        with self.autocast:
            logits = self.model(ids, ids != PAD).float()
            loss = (F.cross_entropy(logits, labels) if self.task.labels
                    else F.mse_loss(logits[:, 0], labels))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # to None: each graph allocates its own gradients

    def record_graphs(self):
        """Record step(T) as a CUDA graph for each length T of the trial."""
        # Compiled code rounds differently: if this depended on more than the task, so would scores
        if can_compile(self.device) and len(self.train.ids) >= COMPILE_ROWS:
            # Blocks and trials share a compiled version per length, four at most; modernbert has
            # twice as many, as its first block has no norm: eight, torch.compile's recompile_limit.
            # Evaluation has many more shapes and runs eagerly
            torch.compiler.set_stance("force_eager")
            for block in self.model.bert.blocks:
                block.compile(dynamic=False)

        self.graphs, memory = {}, None
        self.stream = torch.cuda.Stream(self.device)
        default = torch.cuda.default_generators[self.device.index]
        default_state = default.graphsafe_get_state()
        self.generator = default.clone_state()
        self.stream.wait_stream(torch.cuda.current_stream())
        for T in sorted(set(self.lengths)):
            graph = self.graphs[T] = torch.cuda.CUDAGraph()
            with torch.compiler.set_stance("default"), warnings.catch_warnings():
                # Three steps first, to do what must not be recorded: compile, create the
                # optimizer's state, let cuBLAS choose kernels
                warnings.filterwarnings("ignore", ".*capturable=True")  # for steps not recorded
                with torch.cuda.stream(self.stream):
                    for _ in range(3):
                        self.step(T)
                default.graphsafe_set_state(self.generator)  # dropout draws from this trial's
                # torch.cuda.graph synchronizes first. The lengths share a memory pool, as no replay
                # needs what another left there
                with torch.cuda.graph(graph, pool=memory, stream=self.stream):
                    self.step(T)
                default.graphsafe_set_state(default_state)
            memory = graph.pool()

    def run_step(self, k):
        """Run step k of the trial. On CUDA this only enqueues it on the trial's stream."""
        T = self.lengths[k]
        with torch.cuda.stream(self.stream):  # None, without graphs, changes nothing
            self.chosen.copy_(self.rows[k])
            self.lr.copy_(self.lrs[k])
            if self.use_graphs:
                self.graphs[T].replay()
            else:
                self.step(T)

    @torch.inference_mode()
    def predict(self, split):
        """Predictions (N,) for a split: classes, or numbers in a regression."""
        self.model.eval()
        order, outputs = torch.from_numpy(np.argsort(split.lengths, kind="stable")), []
        for chosen in order.split(256):  # in order of length, so that little is padded
            ids = split.ids[chosen.to(self.device), : split.lengths[chosen].max()]
            with self.autocast:
                outputs.append(self.model(ids, ids != PAD).float())
        logits = torch.cat(outputs).cpu()[order.argsort()].numpy()
        if not np.isfinite(logits).all():
            print("this trial diverged and scores as a constant: try a smaller --lr", flush=True)
            logits = np.zeros_like(logits)
        return logits.argmax(1) if self.task.labels else logits[:, 0]

    def scores(self, splits):
        """The metric of each validation split, in percent."""
        metric = METRICS[self.task.metric]
        return {split: 100 * metric(self.predict(splits[split]), splits[split].labels.cpu().numpy())
                for split in self.task.validation}


def run_trials(trials, bar):
    """Run trials of one task side by side: a step of each, then the next step of each."""
    for k in range(len(trials[0].lengths)):  # the same number of steps for all
        for trial in trials:
            trial.run_step(k)
            bar.update(trial.lengths[k] + OVERHEAD)
    if trials[0].use_graphs:
        torch.cuda.synchronize()


# -------------------------------------------------------------------------------- 6. Results
# glue.json is a list with one line per trial. {task, seed, checkpoint, settings, data, rows} is its
# key; {scores, torch, card} are recorded beside it and never compared.


def update_results(path, key=None, scores=None):
    """Add a trial to glue.json, or replace it, and return all trials; without a key only these. The
    file is read again each time, as another command may have added to it. (If two write at the same
    instant, one trial is lost.)"""
    try:  # dict() fails on entries of another version
        results = [*map(dict, json.loads(path.read_text()))] if path.exists() else []
    except (ValueError, TypeError):
        raise CramError(f"{path} is not a results file of this version: move it away") from None
    if key:
        results = [result for result in results if not key.items() <= result.items()]
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        results.append({**key, "scores": scores, "torch": torch.__version__, "card": card})
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    os.replace(part, path)  # an interrupt leaves the old file or the new one
    return results


def write_test_files(folder, trial, splits):
    """Write predictions of the test splits in the GLUE server's format."""
    labels = trial.task.labels
    files = {"AX": ["entailment"] * 1104, "WNLI": ["0"] * 146}  # the server wants these as well
    for split, file in trial.task.test.items():
        predicted = trial.predict(splits[split])
        files[file] = ([labels[i] for i in predicted] if labels
                       else [f"{x:.3f}" for x in predicted.clip(0, 5)])
    folder.mkdir(exist_ok=True)
    for file, lines in files.items():
        rows = "".join(f"{i}\t{line}\n" for i, line in enumerate(lines))
        (folder / f"{file}.tsv").write_text("index\tprediction\n" + rows, newline="\n")


def print_table(results):
    """Median and spread of each task's trials, beside the paper's scores. All trials of a task must
    have the same checkpoint, settings and data."""
    print(f"\n{'task':16} {'metric':8} median  lowest highest trials  paper")
    medians = {}
    for name, task in TASKS.items():
        trials = [result for result in results if result["task"] == name]
        if not trials:
            continue
        subset = "" if task.train_rows in (None, trials[0]["rows"]) else "  subset"
        for split in task.validation:
            row = name + split.removeprefix("validation").replace("_", "-")
            scores = [trial["scores"][split] for trial in trials]
            medians[row] = np.median(scores)
            print(f"{row:16} {task.metric:8} {medians[row]:6.1f} {min(scores):7.1f} "
                  f"{max(scores):7.1f} {len(scores):6} {PAPER.get(row, ''):6}{subset}")
    rows = [row for row in PAPER if row in medians]
    if len(rows) > 1:
        ours, papers = (np.mean([scores[row] for row in rows]) for scores in (medians, PAPER))
        print(f"{f'mean of {len(rows)}':25} {ours:6.1f}{'':23} {papers:6.1f}")


# -------------------------------------------------------------------------------- 7. The command


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--task", required=True, nargs="+", choices=[*TASKS, "all"], metavar="TASK",
        help=f"one or more of {', '.join(TASKS)}; or all, the eight of GLUE")
    add("--ckpt", default="out/ckpt.pt", help="what cram.py wrote" + default)
    add("--data", help="folder with <task>/<split>.jsonl[.xz] in the columns of nyu-mll/glue "
        "(default: nyu-mll/glue on the hub)")
    add("--out", help="folder for the results (default: that of --ckpt)")
    add("--trials", type=int, default=5, help="runs with different seeds" + default)
    add("--epochs", type=int, default=5, help="passes over the training rows" + default)
    add("--batch-size", type=int, default=16, help="examples per step" + default)
    add("--lr", type=float, default=4e-5, help="peak learning rate" + default)
    add("--dropout", type=float, help="fraction of values set to zero while training (default: the "
        "paper's 0.1; for a modern or electra checkpoint 0, as in transformers)")
    add("--seed", type=int, default=0, help="of the first trial; each further one adds 1" + default)
    add("--scratch", action="store_true", help="random weights of the same size, as a control")
    add("--test", action="store_true", help="also run the first trial, again if need be, and write "
        "its predictions of the test splits for the GLUE server")
    add("--device", default="auto", help="auto, cuda, mps or cpu" + default)
    args = parser.parse_args()
    if not (min(args.trials, args.epochs, args.batch_size) > 0 and 0 < args.lr < math.inf
            and 0 <= (args.dropout or 0) < 1 and 0 <= args.seed < 2**31):
        parser.error("--trials, --epochs, --batch-size and --lr must be positive, --dropout from 0 "
                     "to below 1, --seed from 0 to 2**31 - 1")
    return args


def plan_trials(data, args, common, results, at_once):
    """[(task, its splits, keys of trials to run side by side)] for all trials without a result."""
    groups = []
    for name, (splits, data_hash) in data.items():
        keys = [{"task": name, "seed": args.seed + i, **common, "data": data_hash,
                 "rows": len(splits["train"].ids)} for i in range(args.trials)]
        todo = [key for key in keys if not any(key.items() <= result.items() for result in results)]
        if args.test and TASKS[name].test and keys[0] not in todo:
            todo.insert(0, keys[0])  # runs again, as its weights were not kept
        if not todo:
            print(f"{name}: glue.json has all these trials, none is run")
        groups += [(name, splits, todo[i : i + at_once]) for i in range(0, len(todo), at_once)]
    return groups


def main():
    args = parse_arguments()
    device, dtype, _ = find_device(args.device, "auto")
    if dtype == torch.float16:
        dtype = torch.float32  # fp16's loss scaler skips steps, which a graph cannot
    bert, tokenizer = load_checkpoint(args.ckpt, device)
    tokenizer.encode_special_tokens = True  # a literal "<mask>" in a sentence is text
    if args.dropout is None:
        args.dropout = 0.0 if bert.modernbert else 0.1
    args.max_length = min(MAX_LENGTH, bert.seq_len)
    # What the keys of all trials of this command have in common
    settings = ("epochs", "batch_size", "lr", "dropout", "scratch", "max_length")
    common = {"checkpoint": hashlib.sha256(Path(args.ckpt).read_bytes()).hexdigest(),
              "settings": {name: getattr(args, name) for name in settings}}

    # All errors in files are found before the first step
    path = Path(args.out or Path(args.ckpt).parent) / "glue.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = update_results(path)  # also shows that it can be written
    names = args.task + (EIGHT if "all" in args.task else [])
    data = {name: load_task(name, args, tokenizer, device) for name in TASKS if name in names}
    groups = plan_trials(data, args, common, results,
                         trials_at_once(bert, device, dtype, args.batch_size))
    # One folder per checkpoint, settings and seed, so that no submission is a mixture
    run_hash = hashlib.sha256(json.dumps([common, args.seed]).encode()).hexdigest()
    test_folder = path.parent / f"glue_test_{run_hash[:8]}"

    work = sum((epoch_batches(splits["train"], key["seed"], args)[1] + OVERHEAD).sum()
               for _, splits, keys in groups for key in keys)
    bar = tqdm(total=int(work), disable=not groups, mininterval=0.1 if sys.stderr.isatty() else 10,
               bar_format="{desc}{percentage:3.0f}% |{bar}| {remaining} left for all tasks",
               smoothing=0)  # at the mean speed so far
    for name, splits, keys in groups:
        task = TASKS[name]
        trials = [Trial(bert, task, splits["train"], key["seed"], dtype, args) for key in keys]
        bar.set_description(name)
        bar.unpause()  # the time left leaves out compiling and recording
        run_trials(trials, bar)
        bar.clear()
        for trial, key in zip(trials, keys):
            scores = trial.scores(splits)
            update_results(path, key, scores)
            print(f"{name} seed {key['seed']}: {task.metric} "
                  + " / ".join(f"{score:.1f}" for score in scores.values()), flush=True)
            if args.test and task.test and key["seed"] == args.seed:  # the first, not the best
                write_test_files(test_folder, trial, splits)
        del trials, trial
        gc.collect()  # frees compiled models, which are reference cycles
        torch.cuda.empty_cache()
    bar.close()
    hashes = [data_hash for _, data_hash in data.values()]
    print_table([result for result in update_results(path)  # also those of earlier commands
                 if common.items() <= result.items() and result["data"] in hashes])
    has_test = args.test and any(TASKS[name].test for name in data)
    print(f"written to {path}" + (f" and {test_folder}" if has_test else ""))


if __name__ == "__main__":
    try:
        main()
    except (CramError, OSError) as error:
        sys.exit(f"finetune_glue.py: {error}")
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes with the unfinished trials", flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # end by it, so that a shell's loop ends, too
        signal.raise_signal(signal.SIGINT)
