"""Fine-tune a crammed BERT on GLUE and score it.

    python finetune_glue.py --task cola               # out/ckpt.pt -> out/glue.json
    python finetune_glue.py --task rte cola           # two; compiled once for both
    python finetune_glue.py --task all --trials 5     # the eight tasks, and their average
    python finetune_glue.py --task all --test         # also out/glue_test/*.tsv for the GLUE server
    python finetune_glue.py --task cola --scratch     # control: the same network, not pretrained

The settings are GLUE_sane of "Cramming" (arXiv 2212.14034): one set of hyper-parameters for all
tasks, five epochs, the score after the last one, the median of five trials. No task trains
on another task's data. Only the dropout depends on the checkpoint's model, see --dropout.

A step on 16 short rows is a thousand small kernels, and starting them takes longer than running
them. On a card with bf16 a whole step is therefore recorded once, as a CUDA graph, and replayed;
and as one such step does not fill the card, the trials of a task run side by side.

Trials that glue.json has are not run again, but for the first if --test needs its predictions. It
knows checkpoint, settings and data, not the device and not this code: after a change there move it
away.

Read from the top: tasks, metrics, data, classifier, one task, results, all trials.
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
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from cram import CLS, PAD, SEP, CramError, can_compile, find_device, load_checkpoint

# -------------------------------------------------------------------------------- 1. Tasks


PAIR, BINARY = ("sentence1", "sentence2"), ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")


@dataclass
class Task:
    columns: tuple  # of the text: one sentence, or a pair
    labels: tuple  # the server's words for labels 0, 1, ...; none: regression on 0 ... 5
    metric: str
    train_rows: int  # of the official training set; another number is marked as a subset
    test: dict  # split -> the server's name of its file
    validation: dict  # split -> published scores: not pretrained, crammed v2, BERT-base


# Order and metrics of the paper's tables, without WNLI; each validation split is one number of the
# average. A task of your own is one more entry, with no test files and () as published scores.
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
# The tasks whose scores the paper averages
PAPERS = [name for name, task in TASKS.items() if all(task.validation.values())]
PLACEHOLDERS = {"AX": ["entailment"] * 1104, "WNLI": ["0"] * 146}  # the server wants these files

MAX_LENGTH = 128  # tokens of an example: cuts 12 % of RTE's pairs, 0.3 % of MNLI's
BUCKET = 32  # batches are padded to a multiple of this: at most four shapes
BAR_S = 0.1 if sys.stderr.isatty() else 60  # seconds between updates of the progress bar


# -------------------------------------------------------------------------------- 2. Metrics
# Of predictions and labels (N,), as fractions of one. Where a formula would divide by zero the
# score is 0, as is the convention of the field.


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
    predicted, labels = predicted.astype(float), labels.astype(float)
    x, y = predicted - np.mean(predicted), labels - np.mean(labels)
    scale = np.sqrt((x * x).sum()) * np.sqrt((y * y).sum())
    tiny = 1e-12 * (1 + np.abs(predicted).max() * np.abs(labels).max())  # less is rounding
    return float((x * y).sum() / scale) if scale > tiny else 0.0


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson}


# -------------------------------------------------------------------------------- 3. Data


@dataclass
class Split:
    ids: torch.Tensor  # (N, L) int32, filled up with PAD
    labels: torch.Tensor  # (N,)
    lengths: np.ndarray  # (N,) tokens of each example, rounded up to a multiple of BUCKET
    sha256: str  # of the texts and labels as they were read


def read_split(name, split, folder):
    """Rows of a split as dictionaries: local <folder>/<task>/<split>.jsonl[.xz], or the hub's."""
    if folder is None:
        import datasets  # only here: local data needs neither it nor a network

        try:
            return list(datasets.load_dataset("nyu-mll/glue", name, split=split))
        except Exception as error:  # the hub's client raises whatever its HTTP library does
            raise CramError(
                f"cannot load nyu-mll/glue {name} from the Hugging Face hub "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Without a "
                f"network, give --data, a folder with {name}/{split}.jsonl or .jsonl.xz"
            ) from None
    for suffix, opened in ((".jsonl", open), (".jsonl.xz", lzma.open)):
        path = Path(folder) / name / (split + suffix)
        if path.exists():
            try:
                with opened(path, "rt", encoding="utf-8") as f:
                    return [json.loads(line) for line in f if line.strip()]
            except (ValueError, EOFError, lzma.LZMAError) as error:
                raise CramError(f"{path} cannot be read: {error}") from None
    raise CramError(f"no {split}.jsonl or {split}.jsonl.xz in {Path(folder) / name}")


def load_split(name, split, folder, tokenizer, max_length, device):
    """A split as the model reads it. A test split has no labels, whatever its rows say."""
    task, rows, where = TASKS[name], read_split(name, split, folder), f"{name} {split}"
    labelled = split not in task.test
    top = len(task.labels) - 1 if task.labels else 5  # the largest label
    needed = (*task.columns, "label") if labelled else task.columns
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not set(needed) <= set(row):
            raise CramError(f"{where} row {number}: needs the columns {' and '.join(needed)}")
        if any(not isinstance(row[column], str) for column in task.columns):
            raise CramError(f"{where} row {number}: the text is not a string")
        label = row["label"] if labelled else 0
        if not isinstance(label, (int, float)) or not (
                label in range(top + 1) if task.labels else 0 <= label <= top):
            raise CramError(f"{where} row {number}: label {label!r} is not from 0 to {top}")
    if not rows:
        raise CramError(f"{where} has no rows")
    if not labelled and "idx" in rows[0]:  # the server counts by it
        if {str(row.get("idx")) for row in rows} != {*map(str, range(len(rows)))}:
            raise CramError(f"{where}: its column idx is not 0 to {len(rows) - 1}, each once")
        rows.sort(key=lambda row: int(row["idx"]))

    texts = [[tokens.ids for tokens in tokenizer.encode_batch_fast(
        [row[column] for row in rows], add_special_tokens=False)] for column in task.columns]
    examples = [join(parts, max_length) for parts in zip(*texts)]
    lengths = np.array([min(-(-len(ids) // BUCKET) * BUCKET, max_length) for ids in examples])
    ids = np.full((len(rows), lengths.max()), PAD, np.int32)
    for row, example in zip(ids, examples):
        row[: len(example)] = example
    labels = torch.tensor([row["label"] if labelled else 0 for row in rows],
                          dtype=torch.int64 if task.labels else torch.float32)
    content = json.dumps([[row[column] for column in needed] for row in rows])
    return Split(torch.from_numpy(ids).to(device), labels.to(device), lengths, sha256(content))


def sha256(content):
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def join(parts, max_length):
    """<cls> A <sep> or <cls> A <sep> B <sep>, cut token by token from the end of the longer."""
    parts = [list(ids) for ids in parts]
    while 1 + sum(len(ids) + 1 for ids in parts) > max_length:
        max(parts, key=len).pop()
    return [CLS] + [token for ids in parts for token in (*ids, SEP)]


def plan(split, seed, epochs, B):
    """The rows (steps, B) of each step of a trial, and the tokens T (steps,) they are padded to.

    Each row once an epoch, in random order; the last, smaller batch of an epoch is dropped.
    """
    shuffle, N = np.random.default_rng(seed), len(split.lengths)
    rows = np.concatenate([shuffle.permutation(N)[: N // B * B] for _ in range(epochs)])
    rows = rows.reshape(-1, B)
    return rows, split.lengths[rows].max(1)


def batch_of(split, chosen, T):
    """Examples `chosen` of a split, T tokens of each: ids, keep (B, T), labels (B,)."""
    ids = split.ids[chosen, :T]
    return ids, ids != PAD, split.labels[chosen]


# -------------------------------------------------------------------------------- 4. Classifier


class Classifier(nn.Module):
    """What the final norm gives for the first token, through a tanh layer and an output layer, both
    with biases (config crammed-bert). The head of modernbert is for <mask>, and not used.

    On a card forward is recorded as a CUDA graph: no .item(), no shape that depends on values.
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
        """New values for every parameter outside bert: each trial begins with this, in the tensors
        of the trial before."""
        for linear in (self.pool, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, ids, keep):
        """ids (B, T), keep (B, T) False at padding -> logits (B, classes)."""
        first = self.bert.encode(ids, keep)[:, 0]
        return self.out(self.dropout(torch.tanh(self.pool(first))))


def lr_at(step, steps, peak):
    """Up over the first 10 % of the task's own steps, then a cosine to zero.

    The original code kept the first task's warm-up for all later ones, a bug.
    """
    warmup = max(1, round(0.1 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# -------------------------------------------------------------------------------- 5. One task

COMPILE_STEPS = 2_000  # it takes 3 to 6 s for each length and saves 1 to 3 ms a step (H200)


def lengths_to_compile(steps, device, dtype):
    """Lengths worth compiling for; steps: {length: steps of all trials that the command runs}."""
    can = records_graphs(device, dtype) and can_compile(device)
    return {T for T, n in steps.items() if can and n >= COMPILE_STEPS}


def records_graphs(device, dtype):
    """Whether steps are CUDA graphs. Not with fp16, whose loss scaler must be free to skip one."""
    return device.type == "cuda" and dtype != torch.float16


def trials_at_once(model, device, dtype, B):
    """As many as the card's memory holds, eight at most (on an H200 they are 3 % faster than five);
    one where steps are not recorded. A trial is taken to need 40 bytes a parameter: 16 for weight,
    gradient and two moments, 24 for the activations of 16 rows. Measured were 31 in all."""
    if not records_graphs(device, dtype):
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    a_trial = sum(p.numel() for p in model.parameters()) * (16 + 24 * max(1, B / 16))
    return min(8, max(1, int(free / a_trial)))


class Tuning:
    """A model that is fine-tuned on one task, trial after trial in the same tensors.

    A step is the same code everywhere. Recorded as a CUDA graph it reads and writes fixed places
    in memory, so all that changes is copied into them: row numbers and learning rate at every
    step, weights and optimizer state at the start of a trial. Its steps follow each other in a
    stream of its own, with random numbers of its own for dropout: a trial gives the same whatever
    runs beside it.
    """

    def __init__(self, bert, task, train, dtype, args, compiled=()):
        self.pretrained, self.task, self.data, self.args = bert, task, train, args
        self.device = device = train.ids.device
        self.fp16, self.records = dtype == torch.float16, records_graphs(device, dtype)
        self.model = Classifier(
            copy.deepcopy(bert), len(task.labels) or 1, args.dropout).to(device)
        self.autocast = functools.partial(
            torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32,
            cache_enabled=False)  # a cached cast would be in one graph and missing in the next
        self.lr = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0,
            fused=True, capturable=self.records)
        self.chosen = torch.zeros(args.batch_size, dtype=torch.int64, device=device)
        self.graphs, self.graph_memory, self.stream = {}, None, None
        if self.records:
            self.stream = torch.cuda.Stream(device)
            self.generator = torch.cuda.default_generators[device.index].clone_state()
        self.compiled = compiled  # the lengths that run compiled blocks
        if compiled:
            # Blocks are alike and share one code for each length; with modernbert two, as the first
            # has no norm. From here on nothing runs compiled except in record(): evaluation would
            # compile for shapes of its own
            torch.compiler.set_stance("force_eager")
            for block in self.model.bert.blocks:
                block.compile(dynamic=False)

    def start(self, seed):
        """A new trial: pretrained or random weights, a new head, no momentum."""
        rows, lengths = plan(self.data, seed, self.args.epochs, self.args.batch_size)
        self.rows, self.lengths = torch.from_numpy(rows).to(self.device), lengths.tolist()
        self.lrs = torch.tensor([lr_at(k, len(rows), self.args.lr) for k in range(len(rows))],
                                device=self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.fp16)
        self.model.train()  # before recording: a graph has dropout, or has not
        if self.records:
            for T in sorted(set(self.lengths) - set(self.graphs)):
                self.record(T)

        # Only now, as recording takes steps
        torch.manual_seed(seed)
        self.model.bert.load_state_dict(self.pretrained.state_dict())
        if self.args.scratch:
            self.model.bert.init_weights()
        self.model.init_head()
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        if self.records:
            self.generator.manual_seed(seed)
            self.stream.wait_stream(torch.cuda.current_stream())

    def step(self, T):
        """Update the weights once, on the rows `chosen`, padded to T tokens."""
        ids, keep, labels = batch_of(self.data, self.chosen, T)
        with self.autocast():
            logits = self.model(ids, keep).float()
            loss = (F.cross_entropy(logits, labels) if self.task.labels
                    else F.mse_loss(logits[:, 0], labels))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()  # to None: the gradients of a graph lie in its own memory

    def record(self, T):
        """Record step(T) as a CUDA graph.

        Three steps go before, because what is done once must not be in the graph: compilation,
        the optimizer's first state, cuBLAS's choice of kernels.
        """
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[self.device.index]
        usual = generator.graphsafe_get_state()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.compiler.set_stance("default" if T in self.compiled else "force_eager"):
            with torch.cuda.stream(self.stream), warnings.catch_warnings():
                # It warns of these three, as they are not recorded
                warnings.filterwarnings("ignore", ".*capturable=True")
                for _ in range(3):
                    self.step(T)
            generator.graphsafe_set_state(self.generator)  # dropout then draws from this trial's
            # torch.cuda.graph first waits for the card. One piece of memory serves all lengths, as
            # nothing in it has to last until the next replay
            with torch.cuda.graph(graph, pool=self.graph_memory, stream=self.stream):
                self.step(T)
            generator.graphsafe_set_state(usual)
        self.graphs[T], self.graph_memory = graph, graph.pool()

    def advance(self, k):
        """Step k of the trial; returns the tokens it took. It may run on after the return."""
        T = self.lengths[k]
        with torch.cuda.stream(self.stream):  # None, where none are recorded: the usual one
            self.chosen.copy_(self.rows[k])
            self.lr.copy_(self.lrs[k])
            if self.records:
                self.graphs[T].replay()
            else:
                self.step(T)
        return T * len(self.chosen)

    @torch.inference_mode()
    def predict(self, split):
        """Logits (N, classes) of a split, computed in order of length: little is padded."""
        self.model.eval()
        order, outputs = torch.from_numpy(np.argsort(split.lengths, kind="stable")), []
        for chosen in order.split(256):
            ids, keep, _ = batch_of(split, chosen.to(self.device), split.lengths[chosen].max())
            with self.autocast():
                outputs.append(self.model(ids, keep).float())
        return torch.cat(outputs).cpu()[order.argsort()].numpy()


def fit(tunings, seeds, report):
    """A trial with each seed, side by side; report(tokens) after each step."""
    for tuning, seed in zip(tunings, seeds, strict=True):
        tuning.start(seed)
    for k in range(len(tunings[0].lengths)):  # the same number for all
        for tuning in tunings:
            report(tuning.advance(k))
    if tunings[0].records:
        torch.cuda.synchronize()


def scores_of(tuning, splits, with_test):
    """The metric on each validation split in percent; predictions of test splits, if asked for.
    Raises CramError for a trial that diverged: it has no score."""
    task, scores, predictions = tuning.task, {}, {}
    for split in (*task.validation, *(task.test if with_test else ())):
        logits = tuning.predict(splits[split])
        if not np.isfinite(logits).all():
            raise CramError("numbers that are not finite: it diverged, and has no score")
        predicted = logits.argmax(1) if task.labels else logits[:, 0]
        if split in task.validation:
            labels = splits[split].labels.cpu().numpy()
            scores[split] = 100 * METRICS[task.metric](predicted, labels)
        else:
            predictions[task.test[split]] = ([task.labels[i] for i in predicted] if task.labels
                                             else [f"{x:.3f}" for x in predicted.clip(0, 5)])
    return scores, predictions


# -------------------------------------------------------------------------------- 6. Results


def open_results(path, identity, digests):
    """All of glue.json, and in it the run to go on with, perhaps new.

    A run belongs to one checkpoint, one set of settings, and one content of each task's data.
    Numbers that differ in any of them stay in the file, and apart.
    """
    try:
        results = json.loads(path.read_text()) if path.exists() else {"runs": []}
        ours = [run for run in results["runs"] if identity.items() <= run.items() and all(
            digests[name].get(split, digest) == digest
            for name, entry in run["tasks"].items() if name in digests
            for split, digest in entry["data"].items())]
        if ours:  # several that differ in tasks not asked for now: the one that has most of ours
            return results, max(ours, key=lambda run: len(run["tasks"].keys() & digests.keys()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CramError(f"{path} is not a results file of this script; move it away") from None
    run = {**identity, "tasks": {}, "average": None}
    results["runs"].append(run)
    return results, run


def add_trial(run, name, digests, rows, trial, files):
    """Put a trial into a run, and bring medians and average up to date."""
    task = TASKS[name]
    entry = run["tasks"].setdefault(name, {
        "metric": task.metric, "train_rows": rows, "subset": rows != task.train_rows, "data": {},
        "trials": [], "test_files": {}})
    entry["data"].update(digests)
    if files:
        entry["test_files"] = {file: sha256(text) for file, text in files.items()}
        entry["test_seed"] = trial["seed"]
    entry["trials"] = [old for old in entry["trials"] if old["seed"] != trial["seed"]] + [trial]
    for key, of in (("median", np.median), ("lowest", min), ("highest", max)):
        entry[key] = {split: float(of([trial[split] for trial in entry["trials"]]))
                      for split in task.validation}
    if set(PAPERS) <= set(run["tasks"]):
        run["average"] = np.mean([  # MNLI counts twice
            x for name in PAPERS for x in run["tasks"][name]["median"].values()])


def write_whole(path, text):
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(text.encode())  # bytes: Windows would change the line ends, and the hash
    os.replace(part, path)


def tsv(predictions):
    """A file as the GLUE server takes it."""
    return "index\tprediction\n" + "".join(f"{i}\t{x}\n" for i, x in enumerate(predictions))


def to_predict(folder, run, names, seed):
    """The tasks whose test files are not in the folder, or of a trial with another seed. A file
    there that this run has not written is refused: the server would get a mixture."""
    known = [digest for entry in run["tasks"].values() for digest in entry["test_files"].values()]
    for path in folder.glob("*.tsv"):
        if path.stem not in PLACEHOLDERS and sha256(path.read_bytes()) not in known:
            raise CramError(f"{path} was not predicted by this checkpoint with these settings and "
                            f"data: move {folder} away")
    return [name for name in names if TASKS[name].test and (
        run["tasks"].get(name, {}).get("test_seed") != seed
        or not all((folder / f"{file}.tsv").exists() for file in TASKS[name].test.values()))]


def print_table(run):
    """Medians and spread, beside the published scores of the same fine-tuning."""
    print(f"\n{'':56}published: arXiv 2212.14034\n{'task':16} {'metric':8} median  lowest highest "
          "trials  no pretr. crammed v2  BERT-base")
    for name, task in TASKS.items():
        entry = run["tasks"].get(name)
        for split, published in task.validation.items() if entry else ():
            label = name + split.removeprefix("validation").replace("_", "-")
            print(f"{label:16} {task.metric:8} {entry['median'][split]:6.1f} "
                  f"{entry['lowest'][split]:7.1f} {entry['highest'][split]:7.1f} "
                  f"{len(entry['trials']):6}" + "".join(f"{x:11.1f}" for x in published)
                  + "  subset" * entry["subset"])
    subsets = {name: entry for name, entry in run["tasks"].items() if entry["subset"]}
    if run["average"] is not None:
        nine = zip(*(scores for name in PAPERS for scores in TASKS[name].validation.values()))
        print(f"{'average of nine':25} {run['average']:6.1f}{'':23}"
              + "".join(f"{np.mean(scores):11.1f}" for scores in nine) + "  subset" * bool(subsets))
    for name, entry in subsets.items():
        print(f"subset: {name} was trained on {entry['train_rows']:,} rows, not the official "
              f"{TASKS[name].train_rows:,}")
    print("published on the validation sets; crammed v2: the best of 5 runs of 24 h on an A6000")


# -------------------------------------------------------------------------------- 7. All trials


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, nargs="+", choices=[*sorted(TASKS), "all"],
                        metavar="TASK", help="one or more of " + ", ".join(sorted(TASKS))
                        + "; or all")
    parser.add_argument("--ckpt", default="out/ckpt.pt",
                        help="what cram.py wrote (default: %(default)s)")
    parser.add_argument("--data", help="folder with <task>/<split>.jsonl or .jsonl.xz in the "
                        "columns of nyu-mll/glue; without it they come from the hub")
    parser.add_argument("--trials", type=int, default=5,
                        help="runs with different seeds (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5,
                        help="passes over the training rows (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16,
                        help="examples per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=4e-5,
                        help="peak learning rate (default: %(default)s)")
    parser.add_argument("--dropout", type=float, help="share of values set to zero while training "
                        "(default: the paper's 0.1; with --model modernbert 0, as in transformers)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the first trial; the next has + 1 (default: %(default)s)")
    parser.add_argument("--scratch", action="store_true",
                        help="random weights of the checkpoint's size, as a control")
    parser.add_argument("--test", action="store_true", help="also write the first trial's "
                        "predictions of the test split into glue_test/, for the GLUE server")
    parser.add_argument("--device", default="auto",
                        help="auto, cuda, mps or cpu (default: %(default)s)")
    args = parser.parse_args()
    for flag in ("trials", "epochs", "batch_size", "lr"):
        if not getattr(args, flag) > 0:
            raise CramError(f"--{flag.replace('_', '-')} must be positive")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise CramError("--dropout must be from 0 to below 1")
    if not 0 <= args.seed < 2**31:
        raise CramError("--seed must be from 0 to 2**31 - 1")
    return args


def main():
    args = parse_arguments()
    device, dtype, _ = find_device(args.device, "auto")
    bert, tokenizer = load_checkpoint(args.ckpt, device)
    if args.dropout is None:
        args.dropout = 0.0 if bert.modernbert else 0.1
    tokenizer.encode_special_tokens = True  # a literal "<mask>" in a sentence is text
    max_length = min(MAX_LENGTH, bert.seq_len)

    # The data of all tasks first: what is wrong with it is said now, not hours later
    splits, digests = {}, {}
    for name in [name for name in TASKS if {name, "all"} & set(args.task)]:
        task = TASKS[name]
        splits[name] = {
            split: load_split(name, split, args.data, tokenizer, max_length, device)
            for split in ("train", *task.validation, *(task.test if args.test else ()))}
        digests[name] = {split: content.sha256 for split, content in splits[name].items()}
        if len(splits[name]["train"].ids) < args.batch_size:
            raise CramError(f"{name} has fewer training rows than --batch-size {args.batch_size}")

    path, folder = Path(args.ckpt).with_name("glue.json"), Path(args.ckpt).with_name("glue_test")
    settings = {key: getattr(args, key)
                for key in ("epochs", "batch_size", "lr", "dropout", "scratch")}
    identity = {"checkpoint": sha256(Path(args.ckpt).read_bytes()),
                "settings": {**settings, "max_length": max_length}}
    results, run = open_results(path, identity, digests)
    unpredicted = to_predict(folder, run, splits, args.seed) if args.test else ()
    missing, steps = {}, Counter()  # trials to run; how many steps of each length they take
    for name in splits:
        done = [trial["seed"] for trial in run["tasks"].get(name, {}).get("trials", ())]
        missing[name] = [seed for seed in range(args.seed, args.seed + args.trials)
                         if seed not in done or (seed == args.seed and name in unpredicted)]
        if not missing[name]:
            print(f"{name}: {path} has all these trials, none is run")
        for seed in missing[name]:
            steps.update(plan(
                splits[name]["train"], seed, args.epochs, args.batch_size)[1].tolist())

    compiled = lengths_to_compile(steps, device, dtype)
    for file, rows in PLACEHOLDERS.items() if args.test else ():
        write_whole(folder / f"{file}.tsv", tsv(rows))
    diverged = []
    at_once = trials_at_once(bert, device, dtype, args.batch_size)
    tokens = args.batch_size * sum(T * n for T, n in steps.items())
    with tqdm(total=tokens, unit=" tokens", unit_scale=True, smoothing=0,  # 0: mean speed so far
              mininterval=BAR_S, disable=not tokens) as bar:
        for name in [name for name in splits if missing[name]]:
            bar.set_description(name)
            train, began = splits[name]["train"], time.monotonic()
            tunings = [Tuning(bert, TASKS[name], train, dtype, args, compiled)
                       for _ in missing[name][:at_once]]
            for i in range(0, len(missing[name]), at_once):
                seeds = missing[name][i : i + at_once]
                fit(tunings[: len(seeds)], seeds, bar.update)
                for tuning, seed in zip(tunings, seeds):
                    # Only the first trial predicts: it is chosen without a look at its score
                    try:
                        scores, predictions = scores_of(
                            tuning, splits[name], args.test and seed == args.seed)
                    except CramError as error:
                        diverged.append(f"{name} seed {seed}")
                        print(f"{diverged[-1]}: {error}", flush=True)
                        continue
                    files = {file: tsv(rows) for file, rows in predictions.items()}
                    results, run = open_results(path, identity, digests)  # others may have written
                    add_trial(run, name, digests[name], len(train.ids), {"seed": seed, **scores},
                              files)
                    write_whole(path, json.dumps(results, indent=1))
                    for file, text in files.items():  # after glue.json, which says they are ours
                        write_whole(folder / f"{file}.tsv", text)
                    bar.clear()
                    print(f"{name} seed {seed}: {TASKS[name].metric} "
                          + " / ".join(f"{score:.1f}" for score in scores.values()), flush=True)
            print(f"{name}: {len(missing[name])} of the trials, {time.monotonic() - began:.1f} s",
                  flush=True)
            # The next task needs the memory, and del leaves what refers to itself: compiled models
            del tunings, tuning
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print_table(run)
    if diverged:
        raise CramError(f"without a score: {', '.join(diverged)}. A smaller --lr may help")
    print(f"written to {path}" + f" and {folder}" * args.test)


if __name__ == "__main__":
    try:
        main()
    except (CramError, OSError) as error:
        sys.exit(f"finetune_glue.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("finetune_glue.py: the card's memory is too small; try a smaller --batch-size")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on with the trials that are not finished")
