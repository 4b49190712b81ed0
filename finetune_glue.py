"""Fine-tune a crammed BERT on GLUE and score it.

    python finetune_glue.py --task cola               # out/ckpt.pt -> out/glue.json
    python finetune_glue.py --task all --trials 5     # the eight tasks, and their average
    python finetune_glue.py --task all --test         # also the files that the GLUE server takes
    python finetune_glue.py --task cola --scratch     # control: the same network, not pretrained

The settings are GLUE_sane of "Cramming" (arXiv 2212.14034): one set of hyper-parameters for all
tasks, five epochs, the score after the last one, the median of five trials. No task trains on
another task's data. Only dropout depends on the model, see --dropout.

A step on 16 short rows is a thousand small kernels, and launching them takes longer than running
them. On a CUDA card a whole step is therefore recorded once, as a CUDA graph, and replayed. One
such step does not fill the card, so the trials of a task run side by side.

A score depends only on checkpoint, task, seed, settings and data. A trial whose score is already in
glue.json is not run again. The file does not know this code: if you change it, move the file away.

Read from the top: tasks, metrics, data, classifier, a trial, results, the command.
"""

import argparse
import copy
import functools
import gc
import hashlib
import json
import lzma
import math
import os
import sys
import tempfile
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
    columns: tuple  # of the text: one sentence, or a pair
    labels: tuple  # names of labels 0, 1, ...; empty: regression on 0 to 5
    metric: str  # one of METRICS
    train_rows: int | None = None  # of the official training set; another number is a subset
    test: dict = {}  # split -> the GLUE server's name of its file
    validation: dict = {"validation": ()}  # split -> published: no pretraining, crammed v2, BERT


PAIR, BINARY = ("sentence1", "sentence2"), ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")

# A task of your own is one more entry, and two files in the folder given as --data:
# emotion/train.jsonl and emotion/validation.jsonl, with lines like {"text": "oh no", "label": 0}.
#     "emotion": Task(("text",), ("sad", "happy", "angry"), "accuracy"),
TASKS = {
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy",
                 392_702, {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"},
                 {"validation_matched": (34.1, 84.1, 83.2),
                  "validation_mismatched": (34.1, 84.6, 83.4)}),
    "sst2": Task(("sentence",), BINARY, "accuracy", 67_349, {"test": "SST-2"},
                 {"validation": (79.9, 92.0, 91.9)}),
    "stsb": Task(PAIR, (), "pearson", 5_749, {"test": "STS-B"}, {"validation": (17.8, 87.4, 86.7)}),
    "rte": Task(PAIR, ENTAILMENT, "accuracy", 2_490, {"test": "RTE"},
                {"validation": (47.3, 58.5, 59.2)}),
    "qnli": Task(("question", "sentence"), ENTAILMENT, "accuracy", 104_743, {"test": "QNLI"},
                 {"validation": (50.0, 90.2, 90.6)}),
    "qqp": Task(("question1", "question2"), BINARY, "f1", 363_846, {"test": "QQP"},
                {"validation": (68.6, 87.5, 87.7)}),
    "mrpc": Task(PAIR, BINARY, "f1", 3_668, {"test": "MRPC"}, {"validation": (77.9, 88.9, 89.3)}),
    "cola": Task(("sentence",), BINARY, "matthews", 8_551, {"test": "CoLA"},
                 {"validation": (0.0, 53.3, 56.5)}),
}
EIGHT = [name for name, task in TASKS.items() if all(task.validation.values())]  # --task all
PLACEHOLDERS = {"AX": ["entailment"] * 1104, "WNLI": ["0"] * 146}  # the server wants these files

MAX_LENGTH = 128  # tokens of an example: cuts 12 % of RTE's pairs, 0.3 % of MNLI's
BUCKET = 32  # batches are padded to a multiple of it: four lengths to record, for two kinds of
#              block the eight codes that torch.compile keeps at most (recompile_limit)
BAR_S = 0.1 if sys.stderr.isatty() else 10  # seconds between updates of the progress bar


# -------------------------------------------------------------------------------- 2. Metrics
# Each takes predictions and labels (N,). Where a formula would divide by zero the score is 0, as is
# the convention.


def accuracy(predicted, labels):
    return float((predicted == labels).mean())


def f1(predicted, labels):
    """Harmonic mean of precision and recall of class 1."""
    hits = ((predicted == 1) & (labels == 1)).sum()
    named = (predicted == 1).sum() + (labels == 1).sum()
    return float(2 * hits / named) if named else 0.0


def matthews(predicted, labels):
    """Correlation of two binary variables: 1 perfect, 0 no better than chance."""
    return pearson(predicted == 1, labels == 1)


def pearson(predicted, labels):
    """Linear correlation."""
    x, y = predicted.astype(float), labels.astype(float)
    tiny = 1e-12 * (1 + np.abs(x).max() * np.abs(y).max())  # less is rounding
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x * x).sum()) * np.sqrt((y * y).sum())
    return float((x * y).sum() / scale) if scale > tiny else 0.0


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson}


# -------------------------------------------------------------------------------- 3. Data


class Split(NamedTuple):
    ids: torch.Tensor  # (N, L) int32, padded with PAD
    labels: torch.Tensor  # (N,) int64 classes or float32 numbers; zeros in a test split
    lengths: np.ndarray  # (N,) tokens of each example, rounded up to a multiple of BUCKET


def read_split(name, split, folder):
    """The rows of a split: of <folder>/<task>/<split>.jsonl[.xz], or of the hub without a folder.

    Raises CramError if they cannot be read, or if one of them is not what the task needs.
    """
    if folder is None:
        import datasets  # only here: local data needs neither it nor a network

        where = f"nyu-mll/glue {name} {split}"
        try:
            rows = list(datasets.load_dataset("nyu-mll/glue", name, split=split))
        except Exception as error:  # the hub's client raises whatever its HTTP library does
            raise CramError(
                f"cannot load {where} from the Hugging Face hub ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}). Without a network, give --data") from None
    else:
        where = Path(folder) / name / f"{split}.jsonl"
        if not where.exists():
            where = where.with_suffix(".jsonl.xz")
        try:
            opened = lzma.open if where.suffix == ".xz" else open
            with opened(where, "rt", encoding="utf-8-sig") as f:  # -sig: skip a byte order mark
                rows = [json.loads(line) for line in f if line.strip()]
        except FileNotFoundError:
            raise CramError(f"no {split}.jsonl or {split}.jsonl.xz in {where.parent}") from None
        except (ValueError, EOFError, lzma.LZMAError) as error:
            raise CramError(f"{where} cannot be read: {error}") from None

    if not rows:
        raise CramError(f"{where} has no rows")
    for number, row in enumerate(rows):
        if problem := find_problem(row, number, TASKS[name], split):
            raise CramError(f"{where}, row {number + 1}: {problem}")
    return rows


def find_problem(row, number, task, split):
    """What is wrong with row `number` of a split, or None. A test split needs no label, but its idx
    must count from 0: the GLUE server goes by it."""
    is_test = split in task.test
    needed = task.columns if is_test else (*task.columns, "label")
    if not isinstance(row, dict) or not set(needed) <= set(row):
        return f"needs the columns {' and '.join(needed)}"
    if not all(isinstance(row[column], str) for column in task.columns):
        return "the text is not a string"
    if is_test:
        idx = row.get("idx", number)
        return None if idx == number else f"idx is {idx!r}, not {number}"
    label, top = row["label"], len(task.labels) - 1 if task.labels else 5
    if not isinstance(label, (int, float)) or not 0 <= label <= top or (
            task.labels and label != int(label)):
        return f"label {label!r} is not from 0 to {top}"


def load_task(name, args, tokenizer, device):
    """The splits of a task as {name: Split} on the device, and a hash of train and validation."""
    task, splits, content = TASKS[name], {}, []
    for split in ("train", *task.validation, *(task.test if args.test else ())):
        rows, is_test = read_split(name, split, args.data), split in task.test
        texts = [[row[column] for row in rows] for column in task.columns]
        labels = [0 if is_test else row["label"] for row in rows]
        content += [] if is_test else [texts, labels]
        tokens = [tokenizer.encode_batch_fast(column, add_special_tokens=False) for column in texts]
        examples = [build_example([part.ids for part in parts], args.max_length)
                    for parts in zip(*tokens)]
        lengths = np.array([min(math.ceil(len(example) / BUCKET) * BUCKET, args.max_length)
                            for example in examples])
        ids = np.full((len(rows), lengths.max()), PAD, np.int32)
        for row, example in zip(ids, examples):
            row[: len(example)] = example
        labels = torch.tensor(labels, dtype=torch.int64 if task.labels else torch.float32)
        splits[split] = Split(torch.from_numpy(ids).to(device), labels.to(device), lengths)
    return splits, sha256(json.dumps(content))


def build_example(parts, max_length):
    """Token ids <cls> A <sep> or <cls> A <sep> B <sep>; if too long, the longer part is cut."""
    parts = [list(ids) for ids in parts]
    while 1 + sum(len(ids) + 1 for ids in parts) > max_length:
        max(parts, key=len).pop()
    return [CLS] + [token for ids in parts for token in (*ids, SEP)]


def epoch_batches(split, seed, epochs, batch_size):
    """The row numbers (steps, B) of each step of a trial, and the length (steps,) it is padded to.

    Each row once an epoch, in random order; the last, smaller batch of an epoch is dropped.
    """
    shuffle, N = np.random.default_rng(seed), len(split.lengths)
    rows = np.concatenate([
        shuffle.permutation(N)[: N // batch_size * batch_size] for _ in range(epochs)])
    rows = rows.reshape(-1, batch_size)
    return rows, split.lengths[rows].max(1)


def read_batch(split, chosen, T):
    """Examples `chosen` (B,) of a split: ids, attention_mask (B, T), labels (B,)."""
    ids = split.ids[chosen, :T]
    return ids, ids != PAD, split.labels[chosen]


def sha256(content):
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


# -------------------------------------------------------------------------------- 4. Classifier


class Classifier(nn.Module):
    """BERT, then a tanh layer and an output layer on the final state of the first token, <cls>.

    Both layers have biases (config crammed-bert); modernbert's own head is for <mask> and not used.
    forward is recorded as a CUDA graph: no .item(), no shape that depends on values.
    """

    def __init__(self, bert, classes, dropout):
        super().__init__()
        self.bert = bert
        self.pool = nn.Linear(bert.embed.embedding_dim, 1024)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(1024, classes)
        for module in bert.modules():  # in pretraining it was 0
            if isinstance(module, nn.Dropout):
                module.p = dropout

    def init_head(self):
        """Draw new weights for both layers, in the same tensors."""
        for linear in (self.pool, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, ids, attention_mask):
        """ids (B, T), attention_mask (B, T) False at padding -> logits (B, classes)."""
        first = self.bert.encode(ids, attention_mask)[:, 0]
        return self.out(self.dropout(torch.tanh(self.pool(first))))


def lr_at(step, steps, peak):
    """Linear warm-up over the first 10 % of the task's own steps, then a cosine to zero.

    The original code kept the first task's warm-up for all later ones, a bug.
    """
    warmup = max(1, round(0.1 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# -------------------------------------------------------------------------------- 5. A trial

COMPILE_ROWS = 50_000  # training rows from which compiling pays, 3 to 6 s for each length (H200)


def trials_at_once(model, device, dtype, batch_size):
    """How many trials run side by side: as many as fit in memory, at most eight (on an H200 3 %
    faster than five). A trial is assumed to need 40 bytes per parameter in bf16: 16 for weight,
    gradient and two moments, 24 for the activations of 16 rows. We measured 31 in all."""
    if device.type != "cuda":
        return 1
    bytes_each = 16 + 12 * dtype.itemsize * max(1, batch_size / 16)
    needed = sum(p.numel() for p in model.parameters()) * bytes_each
    return min(8, max(1, int(torch.cuda.mem_get_info(device)[0] / needed)))


class Trial:
    """Fine-tunes a copy of a model on one task with one seed: run_step(0), (1), ..., then scores().

    step() is the same code on every device. Recorded as a CUDA graph it reads and writes fixed
    addresses, so whatever changes is copied there: row numbers and learning rate before every step,
    the initial weights after recording. Each trial has its own stream and, for dropout, its own
    random generator, so that its result does not depend on what runs beside it.
    """

    def __init__(self, bert, task, train, seed, dtype, args):
        self.task, self.train, self.device = task, train, train.ids.device
        rows, lengths = epoch_batches(train, seed, args.epochs, args.batch_size)
        self.rows, self.lengths = torch.from_numpy(rows).to(self.device), lengths.tolist()
        self.lrs = torch.tensor([lr_at(k, len(rows), args.lr) for k in range(len(rows))],
                                device=self.device)
        self.chosen = torch.zeros(args.batch_size, dtype=torch.int64, device=self.device)
        self.lr = torch.zeros((), device=self.device)

        classes = len(task.labels) or 1
        self.model = Classifier(copy.deepcopy(bert), classes, args.dropout).to(self.device).train()
        self.autocast = functools.partial(
            torch.autocast, self.device.type, dtype=dtype, enabled=dtype != torch.float32,
            cache_enabled=False)  # a cached cast would be in one graph and missing in the next
        self.use_graphs = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0,
            fused=True, capturable=self.use_graphs)
        self.stream = None
        if self.use_graphs:
            self.record_graphs()
        self.set_weights(bert, seed, args.scratch)  # after recording, which updates weights

    def set_weights(self, bert, seed, scratch):
        """Pretrained or random weights, a new head, no momentum, all in the existing tensors."""
        torch.manual_seed(seed)
        self.model.bert.load_state_dict(bert.state_dict())
        if scratch:
            self.model.bert.init_weights()
        self.model.init_head()
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        if self.use_graphs:
            self.generator.manual_seed(seed)
            self.stream.wait_stream(torch.cuda.current_stream())

    def step(self, T):
        """Update the weights once, on the rows `chosen`, padded to T tokens."""
        ids, attention_mask, labels = read_batch(self.train, self.chosen, T)
        with self.autocast():
            logits = self.model(ids, attention_mask).float()
            loss = (F.cross_entropy(logits, labels) if self.task.labels
                    else F.mse_loss(logits[:, 0], labels))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # to None: the gradients of a graph lie in its own memory

    def record_graphs(self):
        """Record step(T) as a CUDA graph for each length T of the trial."""
        # Compiled code rounds differently. It depends on the task alone, so that a seed's score
        # does not change with the other tasks or the number of trials.
        if can_compile(self.device) and len(self.train.ids) >= COMPILE_ROWS:
            # Blocks are alike: those of all trials share one code per length (with modernbert two,
            # as its first block has no norm). Evaluation, with shapes of its own, runs eager.
            torch.compiler.set_stance("force_eager")
            for block in self.model.bert.blocks:
                block.compile(dynamic=False)

        self.graphs, memory = {}, None
        self.stream = torch.cuda.Stream(self.device)
        usual = torch.cuda.default_generators[self.device.index]
        usual_state = usual.graphsafe_get_state()
        self.generator = usual.clone_state()
        self.stream.wait_stream(torch.cuda.current_stream())
        for T in sorted(set(self.lengths)):
            graph = self.graphs[T] = torch.cuda.CUDAGraph()
            with torch.compiler.set_stance("default"), warnings.catch_warnings():
                # Three steps first, for what happens only once and must not be in the graph:
                # compilation, the optimizer's first state, cuBLAS's choice of kernels
                warnings.filterwarnings("ignore", ".*capturable=True")  # they are not recorded
                with torch.cuda.stream(self.stream):
                    for _ in range(3):
                        self.step(T)
                usual.graphsafe_set_state(self.generator)  # dropout draws from this trial's
                # torch.cuda.graph waits for the card first. All lengths share one memory pool, as
                # nothing in it has to last until the next replay
                with torch.cuda.graph(graph, pool=memory, stream=self.stream):
                    self.step(T)
                usual.graphsafe_set_state(usual_state)
            memory = graph.pool()

    def run_step(self, k):
        """Step k of the trial. On a card it only starts the step, in the trial's stream."""
        T = self.lengths[k]
        with torch.cuda.stream(self.stream):  # None without graphs: no change of stream
            self.chosen.copy_(self.rows[k])
            self.lr.copy_(self.lrs[k])
            if self.use_graphs:
                self.graphs[T].replay()
            else:
                self.step(T)

    @torch.inference_mode()
    def predict(self, split):
        """Classes or, in a regression, numbers (N,) for a split."""
        self.model.eval()
        order, outputs = torch.from_numpy(np.argsort(split.lengths, kind="stable")), []
        for chosen in order.split(256):  # in order of length, so that little is padded
            ids, attention_mask, _ = read_batch(
                split, chosen.to(self.device), split.lengths[chosen].max())
            with self.autocast():
                outputs.append(self.model(ids, attention_mask).float())
        logits = torch.cat(outputs).cpu()[order.argsort()].numpy()
        if not np.isfinite(logits).all():
            print("the next score is of a trial that diverged: a smaller --lr may help", flush=True)
            logits = np.zeros_like(logits)  # the same prediction for every row
        return logits.argmax(1) if self.task.labels else logits[:, 0]

    def scores(self, splits):
        """The metric of each validation split, in percent."""
        metric = METRICS[self.task.metric]
        return {split: 100 * metric(self.predict(splits[split]), splits[split].labels.cpu().numpy())
                for split in self.task.validation}


def run_trials(trials, report):
    """Run trials of one task side by side; calls report() after each step."""
    for k in range(len(trials[0].lengths)):  # the same number for all
        for trial in trials:
            trial.run_step(k)
            report()
    if trials[0].use_graphs:
        torch.cuda.synchronize()


# -------------------------------------------------------------------------------- 6. Results
# glue.json is a list with one line per trial. {task, seed, checkpoint, settings, data, rows} is the
# key that identifies it; {scores, torch, card} are recorded beside it and never compared.


def read_results(path):
    """The results in glue.json; none if there is no such file."""
    try:
        results = json.loads(path.read_text()) if path.exists() else []
        if all({"task", "seed", "data", "rows", "scores"} <= result.keys() for result in results):
            return results
    except (ValueError, TypeError, AttributeError):
        pass
    raise CramError(f"{path} is not a results file of this version: move it away")


def is_finished(key, results):
    return any(key.items() <= result.items() for result in results)


def save_result(path, key, scores):
    """Add a result to glue.json, in the place of an older one of the same trial."""
    results = read_results(path)  # read again: another command may have written
    results = [result for result in results if not is_finished(key, [result])]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    results.append({**key, "scores": scores, "torch": torch.__version__, "card": card})
    write_atomic(path, "[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")


def write_test_files(folder, trial, splits):
    """Predictions of the test splits, as the GLUE server takes them."""
    labels, files = trial.task.labels, dict(PLACEHOLDERS)
    for split, file in trial.task.test.items():
        predicted = trial.predict(splits[split])
        files[file] = ([labels[i] for i in predicted] if labels
                       else [f"{x:.3f}" for x in predicted.clip(0, 5)])
    folder.mkdir(exist_ok=True)
    for file, lines in files.items():
        rows = "".join(f"{i}\t{line}\n" for i, line in enumerate(lines))
        write_atomic(folder / f"{file}.tsv", "index\tprediction\n" + rows)


def write_atomic(path, text):
    """Save atomically: temporary file, rename."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(text.encode())  # bytes: Windows would change the line ends
    os.replace(part, path)


def print_table(results):
    """Median and spread of each task's trials, beside published scores. Expects results of one
    checkpoint and one set of settings; if a task's data changed, only the newest data counts."""
    print(f"\n{'':56}published: arXiv 2212.14034\n{'task':16} {'metric':8} median  lowest highest "
          "trials  no pretr. crammed v2  BERT-base")
    rows, note = {}, ""  # {(task, split): (ours, *published)}, the nine that the paper averages
    for name, task in TASKS.items():
        trials = [result for result in results if result["task"] == name]
        trials = [result for result in trials if result["data"] == trials[-1]["data"]]
        for split, published in task.validation.items() if trials else ():
            scores = [result["scores"][split] for result in trials]
            subset = "  subset" * (task.train_rows not in (None, trials[0]["rows"]))
            print(f"{name + split.removeprefix('validation').replace('_', '-'):16} "
                  f"{task.metric:8} {np.median(scores):6.1f} {min(scores):7.1f} {max(scores):7.1f} "
                  f"{len(scores):6}" + "".join(f"{x:11.1f}" for x in published) + subset)
            if published:
                rows[name, split], note = (np.median(scores), *published), note or subset
    if {name for name, _ in rows} == set(EIGHT):
        ours, *theirs = np.mean(list(rows.values()), axis=0)
        print(f"{'average of nine':25} {ours:6.1f}{'':23}"
              + "".join(f"{x:11.1f}" for x in theirs) + note)
    print("published on the validation sets; crammed v2: the best of 5 runs of 24 h on an A6000")


# -------------------------------------------------------------------------------- 7. The command


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--task", required=True, nargs="+", choices=[*TASKS, "all"], metavar="TASK",
        help=f"one or more of {', '.join(TASKS)}; or all, the eight of GLUE")
    add("--ckpt", default="out/ckpt.pt", help="what cram.py wrote" + default)
    add("--data", help="folder with <task>/<split>.jsonl or .jsonl.xz in the columns of "
        "nyu-mll/glue (default: they come from the hub)")
    add("--out", help="folder for the results (default: that of --ckpt)")
    add("--trials", type=int, default=5, help="runs with different seeds" + default)
    add("--epochs", type=int, default=5, help="passes over the training rows" + default)
    add("--batch-size", type=int, default=16, help="examples per step" + default)
    add("--lr", type=float, default=4e-5, help="peak learning rate" + default)
    add("--dropout", type=float, help="fraction of values set to zero while training (default: the "
        "paper's 0.1; with --model modernbert 0, as in transformers)")
    add("--seed", type=int, default=0, help="of the first trial; the next has + 1" + default)
    add("--scratch", action="store_true",
        help="random weights of the checkpoint's size, as a control")
    add("--test", action="store_true", help="also run the first trial (again) and write its "
        "predictions of the test splits, for the GLUE server")
    add("--device", default="auto", help="auto, cuda, mps or cpu" + default)
    args = parser.parse_args()
    if not min(args.trials, args.epochs, args.batch_size, args.lr) > 0:
        parser.error("--trials, --epochs, --batch-size and --lr must be positive")
    if not 0 <= (args.dropout or 0) < 1:
        parser.error("--dropout must be from 0 to below 1")
    if not 0 <= args.seed < 2**31:
        parser.error("--seed must be from 0 to 2**31 - 1")
    return args


def plan_trials(names, data, args, common, results, at_once):
    """[(task, keys of trials to run side by side)] for all trials without a result; with --test
    also for the first. Says which training sets are subsets."""
    groups = []
    for name in names:
        splits, digest = data[name]
        rows, official = len(splits["train"].ids), TASKS[name].train_rows
        if rows < args.batch_size:
            raise CramError(f"{name} has fewer training rows than --batch-size {args.batch_size}")
        if official not in (None, rows):
            print(f"{name}: a subset, {rows:,} training rows, not the official {official:,}")
        keys = [{"task": name, "seed": args.seed + i, **common, "data": digest, "rows": rows}
                for i in range(args.trials)]
        todo = [key for key in keys if not is_finished(key, results)
                or (args.test and key is keys[0])]
        if not todo:
            print(f"{name}: glue.json has all these trials, none is run")
        groups += [(name, todo[i : i + at_once]) for i in range(0, len(todo), at_once)]
    return groups


def main():
    args = parse_arguments()
    device, dtype, _ = find_device(args.device, "auto")
    if dtype == torch.float16:
        dtype = torch.float32  # fp16 needs a loss scaler, which skips steps: a graph cannot
    bert, tokenizer = load_checkpoint(args.ckpt, device)
    tokenizer.encode_special_tokens = True  # a literal "<mask>" in a sentence is text
    if args.dropout is None:
        args.dropout = 0.0 if bert.modernbert else 0.1
    args.max_length = min(MAX_LENGTH, bert.seq_len)
    settings = ("epochs", "batch_size", "lr", "dropout", "scratch", "max_length")
    common = {"checkpoint": sha256(Path(args.ckpt).read_bytes()),
              "settings": {name: getattr(args, name) for name in settings}}

    # Everything that can be wrong with files is found before the first step
    out = Path(args.out or Path(args.ckpt).parent)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    path = out / "glue.json"
    # A folder for each checkpoint, settings and seed: the server never gets a mixture
    test_folder = out / f"glue_test_{sha256(json.dumps([common, args.seed]))[:8]}"
    results = read_results(path)
    names = [name for name in TASKS
             if name in args.task or ("all" in args.task and name in EIGHT)]
    data = {name: load_task(name, args, tokenizer, device) for name in names}
    groups = plan_trials(names, data, args, common, results,
                         trials_at_once(bert, device, dtype, args.batch_size))

    steps = sum(len(keys) * (keys[0]["rows"] // args.batch_size) for _, keys in groups)
    bar = tqdm(total=steps * args.epochs, unit=" steps", mininterval=BAR_S, disable=not groups)
    for name, keys in groups:
        task, splits = TASKS[name], data[name][0]
        trials = [Trial(bert, task, splits["train"], key["seed"], dtype, args) for key in keys]
        bar.set_description(name)
        bar.unpause()  # the speed, and the time left, without compiling and recording
        run_trials(trials, bar.update)
        bar.clear()
        for trial, key in zip(trials, keys):
            scores = trial.scores(splits)
            save_result(path, key, scores)
            print(f"{name} seed {key['seed']}: {task.metric} "
                  + " / ".join(f"{score:.1f}" for score in scores.values()), flush=True)
            if args.test and key["seed"] == args.seed:  # chosen before its score was known
                write_test_files(test_folder, trial, splits)
        del trials, trial
        gc.collect()  # compiled models refer to themselves; the next trials need their memory
        torch.cuda.empty_cache()
    bar.close()
    print_table([result for result in read_results(path) if common.items() <= result.items()])
    print(f"written to {path}" + (f" and {test_folder}" if args.test else ""))


if __name__ == "__main__":
    try:
        main()
    except (CramError, OSError) as error:
        sys.exit(f"finetune_glue.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("finetune_glue.py: the card's memory is too small; try a smaller --batch-size")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on with the trials that are not finished")
