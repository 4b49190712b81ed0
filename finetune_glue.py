"""Fine-tune a crammed BERT on GLUE and score it.

    python finetune_glue.py --task cola               # out/ckpt.pt -> out/glue.json
    python finetune_glue.py --task all --trials 5     # the eight tasks, and their average
    python finetune_glue.py --task all --test         # also out/glue_test/*.tsv for the server
    python finetune_glue.py --task cola --scratch     # control: the same network, not pretrained

The settings are GLUE_sane of "Cramming" (arXiv 2212.14034): one set of hyper-parameters for all
tasks, at most five epochs, the score after the last one, the median of five trials. No task trains
on another task's data.

A step of 16 short rows is a thousand small kernels, and starting them takes longer than running
them. So on a card with bf16 a whole step is recorded once as a CUDA graph, then only replayed.

Read from the top: tasks, metrics, data, classifier, training, results, all trials.
"""

import argparse
import functools
import hashlib
import json
import lzma
import math
import os
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from cram import CLS, PAD, SEP, CramError, can_compile, find_device, load_checkpoint

# -------------------------------------------------------------------------------- 1. Tasks


@dataclass
class Task:
    columns: tuple  # of the text: one sentence, or a pair
    labels: tuple  # as the GLUE server writes them; none: regression on 0 ... 5
    metric: str
    train_rows: int  # of the official training set; another number is marked as a subset
    validation: dict  # split -> published scores, in the order of PUBLISHED
    test: dict  # split -> the server's name of its file

    @property
    def classes(self):
        return len(self.labels) or 1


ENTAILMENT = ("entailment", "not_entailment")
PUBLISHED = ("no pretr.", "crammed v2", "BERT-base")  # columns of the table at the end
TASKS = {  # the order, the metrics and the weights of the paper's tables; no WNLI
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
                 "accuracy", 392_702,
                 {"validation_matched": (34.1, 84.1, 83.2),
                  "validation_mismatched": (34.1, 84.6, 83.4)},
                 {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"}),
    "sst2": Task(("sentence",), ("0", "1"), "accuracy", 67_349,
                 {"validation": (79.9, 92.0, 91.9)}, {"test": "SST-2"}),
    "stsb": Task(("sentence1", "sentence2"), (), "pearson", 5_749,
                 {"validation": (17.8, 87.4, 86.7)}, {"test": "STS-B"}),
    "rte": Task(("sentence1", "sentence2"), ENTAILMENT, "accuracy", 2_490,
                {"validation": (47.3, 58.5, 59.2)}, {"test": "RTE"}),
    "qnli": Task(("question", "sentence"), ENTAILMENT, "accuracy", 104_743,
                 {"validation": (50.0, 90.2, 90.6)}, {"test": "QNLI"}),
    "qqp": Task(("question1", "question2"), ("0", "1"), "f1", 363_846,
                {"validation": (68.6, 87.5, 87.7)}, {"test": "QQP"}),
    "mrpc": Task(("sentence1", "sentence2"), ("0", "1"), "f1", 3_668,
                 {"validation": (77.9, 88.9, 89.3)}, {"test": "MRPC"}),
    "cola": Task(("sentence",), ("0", "1"), "matthews", 8_551,
                 {"validation": (0.0, 53.3, 56.5)}, {"test": "CoLA"}),
}
# Files that the server insists on and this script does not predict: rows, and what stands in them
PLACEHOLDERS = {"AX": (1_104, "entailment"), "WNLI": (146, "0")}

MAX_LENGTH = 128  # tokens of an example; BERT's 512 would change no task but RTE a little
BUCKET = 32  # batches are padded to a multiple of this: four shapes at most
DROPOUT = 0.1
EVAL_BATCH = 256  # examples


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
    tiny = 1e-12 * (1 + np.abs(predicted).max() * np.abs(labels).max())  # rounding of a constant
    return float((x * y).sum() / scale) if scale > tiny else 0.0


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson}


# -------------------------------------------------------------------------------- 3. Data


@dataclass
class Split:
    ids: torch.Tensor  # (N, L) int32, filled up with PAD
    labels: torch.Tensor  # (N,)
    padded: np.ndarray  # (N,) tokens of each example, rounded up to a length batches come in
    sha256: str  # of the texts and labels as they were read

    def to(self, device):
        return replace(self, ids=self.ids.to(device), labels=self.labels.to(device))


def read_split(name, split, folder):
    """Rows of a split as dictionaries: local <folder>/<task>/<split>.jsonl[.xz], or the hub's."""
    if folder is None:
        import datasets  # only here: local data needs neither it nor a network

        try:
            return list(datasets.load_dataset("nyu-mll/glue", name, split=split))
        except Exception as error:  # the hub's client raises whatever its HTTP library does
            raise CramError(
                f"cannot load nyu-mll/glue {name} from the Hugging Face hub "
                f"({type(error).__name__}: {str(error).splitlines()[0][:200]}). Without a network, "
                f"give --data, a folder with {name}/{split}.jsonl or .jsonl.xz"
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


def load_split(name, split, folder, tokenizer, max_length):
    """A split as the model reads it. Test splits have no labels, whatever their column says."""
    task, rows, where = TASKS[name], read_split(name, split, folder), f"{name} {split}"
    labelled = split not in task.test
    needed = [*task.columns, "label"] if labelled else [*task.columns]
    if not rows:
        raise CramError(f"{where} has no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not set(needed) <= set(row):
            raise CramError(f"{where} row {number}: needs the columns {', '.join(needed[:-1])} "
                            f"and {needed[-1]}".replace("columns  and", "column"))
        if any(not isinstance(row[column], str) for column in task.columns):
            raise CramError(f"{where} row {number}: the text is not a string")
        label = row["label"] if labelled else 0
        good = isinstance(label, (int, float)) and (
            label in range(task.classes) if task.labels else 0 <= label <= 5)
        if not good:
            allowed = f"0 to {task.classes - 1}" if task.labels else "0 to 5"
            raise CramError(f"{where} row {number}: label {label} is not from {allowed}")
    if not labelled and "idx" in rows[0]:  # the server counts by it
        rows.sort(key=lambda row: row.get("idx", -1))
        if [row.get("idx") for row in rows] != [*range(len(rows))]:
            raise CramError(f"{where}: its column idx is not 0 to {len(rows) - 1}, each once")

    texts = [[tokens.ids for tokens in tokenizer.encode_batch_fast(
        [row[column] for row in rows], add_special_tokens=False)] for column in task.columns]
    examples = [join(parts, max_length) for parts in zip(*texts)]
    padded = np.array([min(-(-len(ids) // BUCKET) * BUCKET, max_length) for ids in examples])
    ids = np.full((len(rows), padded.max()), PAD, np.int32)
    for row, example in zip(ids, examples):
        row[: len(example)] = example
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row[column] for column in needed]).encode())
    labels = torch.tensor([row["label"] if labelled else 0 for row in rows],
                          dtype=torch.int64 if task.labels else torch.float32)
    return Split(torch.from_numpy(ids), labels, padded, digest.hexdigest())


def join(parts, max_length):
    """<cls> A <sep> or <cls> A <sep> B <sep>, cut token by token from the end of the longer."""
    parts = [list(ids) for ids in parts]
    while 1 + sum(len(ids) + 1 for ids in parts) > max_length:
        max(parts, key=len).pop()
    return [CLS] + [token for ids in parts for token in (*ids, SEP)]


def train_plan(split, seed, epochs, B):
    """The rows (steps, B) of each step of a trial, and the tokens T (steps,) they are padded to.

    Each row once an epoch, in random order; the last, smaller batch of an epoch is dropped.
    """
    shuffle, N = np.random.default_rng(seed), len(split.padded)
    rows = np.concatenate([shuffle.permutation(N)[: N // B * B] for _ in range(epochs)])
    rows = rows.reshape(-1, B)
    return rows, split.padded[rows].max(1)


def eval_plan(split):
    """The same for an evaluation, as pairs: like lengths together, so that little is padded."""
    order = np.argsort(split.padded, kind="stable")
    parts = [order[i : i + EVAL_BATCH] for i in range(0, len(order), EVAL_BATCH)]
    return [(rows, int(split.padded[rows].max())) for rows in parts]


def batch_of(split, chosen, T):
    """Examples `chosen` of a split, T tokens of each: ids, keep (B, T), labels (B,)."""
    ids = split.ids[chosen, :T]
    return ids, ids != PAD, split.labels[chosen]


# -------------------------------------------------------------------------------- 4. Classifier


class Classifier(nn.Module):
    """The first token's hidden state, through one tanh layer (config crammed-bert, both biased)."""

    def __init__(self, bert, outputs):
        super().__init__()
        self.bert = bert
        self.pool = nn.Linear(bert.embed.embedding_dim, 1024)
        self.dropout = nn.Dropout(DROPOUT)
        self.out = nn.Linear(1024, outputs)

    def init_head(self):
        for linear in (self.pool, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, ids, keep):
        """ids (B, T), keep (B, T) False at padding -> logits (B, outputs)."""
        first = self.bert.encode(ids, keep)[:, 0]
        return self.out(self.dropout(torch.tanh(self.pool(first))))


def lr_at(step, steps, peak):
    """Up over the first 10 % of the steps, then a cosine to zero.

    The steps are this task's own. The original code kept the number of warm-up steps of the first
    task for all later ones, so that a small task could end before its warm-up did; ours does not.
    """
    warmup = max(1, round(0.1 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# -------------------------------------------------------------------------------- 5. Training

RECORD_STEPS = 50  # recording a graph costs as long as about so many steps without it
COMPILE_STEPS = 5_000  # compiling the blocks for a length costs what it saves in so many steps


def worth_it(steps, device, dtype):
    """For each task the lengths to record as graphs, and the lengths to compile blocks for.

    steps: {task: {length: steps of all trials that are missing}}. Compiled code serves all tasks.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:  # fp16 skips steps, which no graph can
        return {name: [] for name in steps}, set()
    recorded = {name: [T for T, n in of_task.items() if n >= RECORD_STEPS]
                for name, of_task in steps.items()}
    in_all = sum(map(Counter, steps.values()), Counter())
    return recorded, {T for T, n in in_all.items() if n >= COMPILE_STEPS and can_compile(device)}


class Tuning:
    """A model that is fine-tuned on one task, trial after trial in the same tensors.

    A step is the same code everywhere. Recorded as a CUDA graph it reads and writes fixed places
    in memory, so all that changes is copied into them: the numbers of the rows, the learning rate,
    and at the start of a trial the weights and the optimizer's state.
    """

    def __init__(self, bert, pretrained, task, train, dtype, args):
        device = train.ids.device
        self.task, self.train, self.pretrained, self.args = task, train, pretrained, args
        self.autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=(
            dtype != torch.float32), cache_enabled=False)  # a cached cast would outlive its graph
        self.model = Classifier(bert, task.classes).to(device)
        recording = device.type == "cuda" and dtype == torch.bfloat16
        warnings.filterwarnings("ignore", ".*capturable=True", UserWarning)  # in steps not recorded
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=torch.zeros((), device=device), betas=(0.9, 0.98),
            eps=1e-6, weight_decay=0.0, fused=True, capturable=recording)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.chosen = torch.zeros(args.batch_size, dtype=torch.int64, device=device)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.loss = torch.zeros((), device=device)  # of the last step
        self.graphs, self.pool = {}, None

    def step(self, T):
        """Update the weights once, on the rows `chosen`, padded to T tokens."""
        ids, keep, labels = batch_of(self.train, self.chosen, T)
        with self.autocast():
            logits = self.model(ids, keep).float()
            loss = (F.cross_entropy(logits, labels) if self.task.labels
                    else F.mse_loss(logits[:, 0], labels))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()  # to None, so that a graph holds gradients in memory of its own
        self.loss.copy_(loss.detach())

    def record(self, T, compiled):
        """Record step(T), its blocks compiled or not, as a CUDA graph. Spoils the weights."""
        self.model.train()  # a graph keeps the dropout it was recorded with
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            with torch.cuda.stream(side):
                for _ in range(3):  # what is done once must not be in the graph: compilation, the
                    self.step(T)  # optimizer's first state, cuBLAS's choice of a kernel
            graph = torch.cuda.CUDAGraph()
            # One pool for all lengths: nothing in it has to last from one replay to the next
            with torch.cuda.graph(graph, pool=self.pool, stream=side):
                self.step(T)
        self.graphs[T], self.pool = graph, graph.pool()

    def reset(self, seed):
        """As before the first step: pretrained or random weights, a new head, a new optimizer."""
        torch.manual_seed(seed)
        self.model.train()
        self.model.bert.load_state_dict(self.pretrained)
        if self.args.scratch:
            self.model.bert.init_weights()
        self.model.init_head()
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self.scaler = torch.amp.GradScaler(self.lr.device.type, enabled=self.scaler.is_enabled())

    def fit(self, rows, lengths, advance):
        """Train on rows (steps, B), padded to lengths (steps,)."""
        steps, device = len(rows), self.lr.device
        lrs = torch.tensor([lr_at(k, steps, self.args.lr) for k in range(steps)], device=device)
        rows = torch.from_numpy(rows).to(device)
        for k, T in enumerate(lengths.tolist()):
            self.chosen.copy_(rows[k])
            self.lr.copy_(lrs[k])
            if T in self.graphs:
                self.graphs[T].replay()
            else:
                self.step(T)
            advance(T * rows.shape[1])

    @torch.inference_mode()
    def predict(self, split):
        """Logits (N, outputs) of a split."""
        self.model.eval()
        logits = torch.empty(len(split.ids), self.task.classes, device=split.ids.device)
        for rows, T in eval_plan(split):
            rows = torch.from_numpy(rows).to(logits.device)
            ids, keep, _ = batch_of(split, rows, T)
            with self.autocast():
                logits[rows] = self.model(ids, keep).float()
        return logits.cpu().numpy()


# -------------------------------------------------------------------------------- 6. Results


def read_json(path, new):
    """What this script wrote to the path, or `new` if there is nothing."""
    if not path.exists():
        return new
    try:
        content = json.loads(path.read_text())
        assert isinstance(content, dict) and set(new) <= set(content)
    except (ValueError, AssertionError):
        raise CramError(f"{path} is not a file of this script; move it away") from None
    return content


def open_results(path, identity, digests):
    """All of glue.json, and in it the run to go on with, perhaps new.

    A run belongs to one checkpoint, one set of settings, and one content of each task's data.
    Numbers that differ in any of them stay in the file, and apart.
    """
    results = read_json(path, {"runs": []})
    for run in results["runs"]:
        same_data = all(run["tasks"][name]["data"].items() <= digests[name].items()
                        for name in set(digests) & set(run["tasks"]))
        if same_data and identity.items() <= run.items():
            return results, run
    run = {**identity, "tasks": {}, "average": None}
    results["runs"].append(run)
    return results, run


def add_trial(run, name, rows, digests, trial):
    """Put a trial into a run, and bring medians and average up to date."""
    task = TASKS[name]
    entry = run["tasks"].setdefault(name, {
        "metric": task.metric, "train_rows": rows, "subset": rows != task.train_rows,
        "data": {split: digests[split] for split in ("train", *task.validation)}, "trials": []})
    others = [other for other in entry["trials"] if other["seed"] != trial["seed"]]
    entry["trials"] = sorted([*others, trial], key=lambda trial: trial["seed"])
    scores = {split: [trial[split] for trial in entry["trials"]] for split in task.validation}
    for key, of in (("median", np.median), ("lowest", min), ("highest", max)):
        entry[key] = {split: float(of(x)) for split, x in scores.items()}
    if set(run["tasks"]) == set(TASKS):  # MNLI counts twice
        nine = [x for entry in run["tasks"].values() for x in entry["median"].values()]
        run["average"] = sum(nine) / len(nine)


def write_whole(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def print_table(run):
    """Medians and spread, beside what the paper reports of the same fine-tuning."""
    print(f"\n{'':55}published: arXiv 2212.14034\n{'task':16} {'metric':9} {'median':>6} "
          f"{'lowest':>6} {'highest':>7} {'trials':>6}" + "".join(f"{x:>11}" for x in PUBLISHED))
    for name in [name for name in TASKS if name in run["tasks"]]:
        entry = run["tasks"][name]
        for split, published in TASKS[name].validation.items():
            label = name + split.removeprefix("validation").replace("_", "-")
            print(f"{label:16} {entry['metric']:9} {entry['median'][split]:6.1f} "
                  f"{entry['lowest'][split]:6.1f} {entry['highest'][split]:7.1f} "
                  f"{len(entry['trials']):6}" + "".join(f"{x:11.1f}" for x in published)
                  + "  subset" * entry["subset"])
    subsets = {name: entry for name, entry in run["tasks"].items() if entry["subset"]}
    if run["average"] is not None:
        nine = [published for task in TASKS.values() for published in task.validation.values()]
        print(f"{'average of nine':26} {run['average']:6.1f} {'':21}" + "".join(
            f"{sum(x) / len(x):11.1f}" for x in zip(*nine)) + "  subset" * bool(subsets))
    print("published: validation scores; crammed v2 is the best of 5 runs of 24 h on an A6000")
    for name, entry in subsets.items():
        print(f"subset: {name} trained on {entry['train_rows']:,} rows, not on the official "
              f"{TASKS[name].train_rows:,}")


def open_tests(folder, identity, digests):
    """What the folder's predictions were made from, and the tasks that are still to predict."""
    source = read_json(folder / "source.json", {**identity, "tasks": {}})
    if not identity.items() <= source.items():
        raise CramError(f"{folder} holds predictions of another checkpoint, or made with other "
                        "settings or another seed: move it away")
    return source, {name for name in digests if source["tasks"].get(name) != digests[name]
                    or not all((folder / f"{x}.tsv").exists() for x in TASKS[name].test.values())}


def write_predictions(folder, file, predictions):
    rows = [f"{index}\t{prediction}\n" for index, prediction in enumerate(predictions)]
    write_whole(folder / f"{file}.tsv", "index\tprediction\n" + "".join(rows))


def write_placeholders(folder, source):
    """Begin a folder for the server: whose predictions are to come, and what is never predicted."""
    folder.mkdir(exist_ok=True)
    write_whole(folder / "source.json", json.dumps(source, indent=1))
    for file, (rows, prediction) in PLACEHOLDERS.items():
        write_predictions(folder, file, [prediction] * rows)


# -------------------------------------------------------------------------------- 7. All trials


def run_trial(tuning, name, splits, seed, advance):
    """Fine-tune once; the metric on every validation split in percent, and predictions of the
    first trial for every test split as the server reads them.

    The first rather than the best: it is chosen without a look at its score.
    """
    task, args = TASKS[name], tuning.args
    tuning.reset(seed)
    tuning.fit(*train_plan(splits["train"], seed, args.epochs, args.batch_size), advance)
    scores, tests = {}, {}
    for split in [*task.validation, *(task.test if args.test and seed == args.seed else ())]:
        logits = tuning.predict(splits[split])
        if not np.isfinite(logits).all():
            raise CramError(f"{name} seed {seed} gives numbers that are not finite: it diverged, "
                            "and has no score. A smaller --lr may help")
        predicted = logits.argmax(1) if task.labels else logits[:, 0]
        if split in task.validation:
            labels = splits[split].labels.cpu().numpy()
            scores[split] = 100 * METRICS[task.metric](predicted, labels)
        else:
            tests[task.test[split]] = ([task.labels[i] for i in predicted] if task.labels
                                       else [f"{x:.3f}" for x in predicted.clip(0, 5)])
    return scores, tests


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Fine-tune a crammed BERT on GLUE.",
        epilog="Examples: finetune_glue.py --task cola;  finetune_glue.py --task all --data glue",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task", required=True, choices=[*sorted(TASKS), "all"], help="GLUE task")
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="what cram.py wrote")
    parser.add_argument("--data", help="folder with <task>/<split>.jsonl or .jsonl.xz in the "
                        "columns of nyu-mll/glue; without it they come from the hub")
    parser.add_argument("--trials", type=int, default=5, help="runs with different seeds")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training rows")
    parser.add_argument("--batch-size", type=int, default=16, help="examples per step")
    parser.add_argument("--lr", type=float, default=4e-5, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the next has + 1")
    parser.add_argument("--scratch", action="store_true",
                        help="random weights of the checkpoint's size, as a control")
    parser.add_argument("--test", action="store_true", help="also predict the test splits, by the "
                        "first trial, and write what the GLUE server takes into glue_test/")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    for flag in ("trials", "epochs", "batch_size", "lr"):
        if not getattr(args, flag) > 0:
            raise CramError(f"--{flag.replace('_', '-')} must be positive")
    return args


def main():
    args = parse_arguments()
    device, dtype, _ = find_device(args.device, "auto")
    bert, tokenizer = load_checkpoint(args.ckpt, device, dropout=DROPOUT)
    pretrained = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    tokenizer.encode_special_tokens = True  # a literal "<mask>" in a sentence is text
    max_length = min(MAX_LENGTH, bert.seq_len)

    # The data of all tasks first, so that what is missing or wrong is said at once
    splits, digests = {}, {}
    for name in TASKS if args.task == "all" else [args.task]:
        task = TASKS[name]
        splits[name] = {split: load_split(name, split, args.data, tokenizer, max_length) for split
                        in ("train", *task.validation, *(task.test if args.test else ()))}
        digests[name] = {split: x.sha256 for split, x in splits[name].items()}
        if len(splits[name]["train"].ids) < args.batch_size:
            raise CramError(f"{name} has {len(splits[name]['train'].ids)} training rows, fewer "
                            "than --batch-size")

    # What is there already, and which trials are missing
    path, folder = Path(args.ckpt).with_name("glue.json"), Path(args.ckpt).with_name("glue_test")
    identity = {"checkpoint": hashlib.sha256(Path(args.ckpt).read_bytes()).hexdigest(),
                "settings": {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr,
                             "scratch": args.scratch, "max_length": max_length, "dropout": DROPOUT}}
    results, run = open_results(path, identity, digests)
    unpredicted = ()
    if args.test:
        source, unpredicted = open_tests(folder, {**identity, "seed": args.seed}, digests)
        write_placeholders(folder, source)
    missing, steps = {}, {}
    for name in splits:
        done = {trial["seed"] for trial in run["tasks"].get(name, {}).get("trials", ())}
        missing[name] = [seed for seed in range(args.seed, args.seed + args.trials)
                         if seed not in done or seed == args.seed and name in unpredicted]
        steps[name] = Counter(T for seed in missing[name] for T in train_plan(
            splits[name]["train"], seed, args.epochs, args.batch_size)[1].tolist())
    recorded, compiled = worth_it(steps, device, dtype)
    if compiled:
        for block in bert.blocks:
            block.compile(dynamic=False)  # once for all blocks, as they are alike
        torch.compiler.set_stance("force_eager")  # but where a graph is recorded

    tokens = args.batch_size * sum(T * n for of_task in steps.values() for T, n in of_task.items())
    with tqdm(total=tokens, unit=" tokens", unit_scale=True, smoothing=0) as bar:
        for name in [name for name in splits if missing[name]]:
            bar.set_description(name)
            on_device = {split: x.to(device) for split, x in splits[name].items()}
            tuning = Tuning(bert, pretrained, TASKS[name], on_device["train"], dtype, args)
            for T in recorded[name]:
                tuning.record(T, T in compiled)
            for seed in missing[name]:
                began = time.monotonic()
                scores, tests = run_trial(tuning, name, on_device, seed, bar.update)
                for file, predictions in tests.items():
                    write_predictions(folder, file, predictions)
                if tests:
                    source["tasks"][name] = digests[name]
                    write_whole(folder / "source.json", json.dumps(source, indent=1))
                results, run = open_results(path, identity, digests)  # others may have written
                add_trial(run, name, len(on_device["train"].ids), digests[name],
                          {"seed": seed, **scores})
                write_whole(path, json.dumps(results, indent=1))
                bar.clear()
                print(f"{name} seed {seed}: {TASKS[name].metric} "
                      + " / ".join(f"{score:.1f}" for score in scores.values())
                      + f" in {time.monotonic() - began:.1f} s", flush=True)
    print_table(run)
    print(f"written to {path}" + f" and {folder}" * args.test)


if __name__ == "__main__":
    try:
        main()
    except (CramError, OSError) as error:
        sys.exit(f"finetune_glue.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on with the trials that are missing")
