"""Fine-tune a crammed BERT on GLUE and score it.

    python finetune_glue.py --task cola               # out/ckpt.pt -> out/glue.json
    python finetune_glue.py --task all --trials 5     # the eight tasks, and their average
    python finetune_glue.py --task cola --scratch     # control: the same network, not pretrained

The settings are GLUE_sane of "Cramming" (arXiv 2212.14034): one set of hyper-parameters for all
tasks, at most five epochs, the score after the last one, the median of five trials. No task trains
on another task's data.

Read from the top: tasks, metrics, data, classifier, one trial, all trials.
"""

import argparse
import functools
import hashlib
import json
import lzma
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from cram import CLS, SEP, CramError, find_device, load_checkpoint

# -------------------------------------------------------------------------------- 1. Tasks


@dataclass
class Task:
    columns: tuple  # of the text: one sentence, or a pair
    classes: int  # 1: regression on 0 ... 5
    metric: str
    train_rows: int  # of the official training set; another number is marked as a subset
    validation: tuple = ("validation",)  # splits, each of which gives a score


TASKS = {  # the order, the metrics and the weights of the paper's tables; no WNLI
    "mnli": Task(("premise", "hypothesis"), 3, "accuracy", 392_702,
                 ("validation_matched", "validation_mismatched")),
    "sst2": Task(("sentence",), 2, "accuracy", 67_349),
    "stsb": Task(("sentence1", "sentence2"), 1, "pearson", 5_749),
    "rte": Task(("sentence1", "sentence2"), 2, "accuracy", 2_490),
    "qnli": Task(("question", "sentence"), 2, "accuracy", 104_743),
    "qqp": Task(("question1", "question2"), 2, "f1", 363_846),
    "mrpc": Task(("sentence1", "sentence2"), 2, "f1", 3_668),
    "cola": Task(("sentence",), 2, "matthews", 8_551),
}

MAX_LENGTH = 128  # tokens of an example; BERT's 512 would change no task but RTE a little
DROPOUT = 0.1


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
    """Examples of a split: ids (N, T) padded with zeros, lengths (N,), labels (N,)."""
    task = TASKS[name]
    rows = read_split(name, split, folder)
    where = f"{name} {split}"
    if not rows:
        raise CramError(f"{where} has no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not {*task.columns, "label"} <= set(row):
            raise CramError(f"{where} row {number}: needs the columns "
                            f"{', '.join(task.columns)} and label")
        if any(not isinstance(row[column], str) for column in task.columns):
            raise CramError(f"{where} row {number}: the text is not a string")
        label = row["label"]
        good = isinstance(label, (int, float)) and (
            0 <= label <= 5 if task.classes == 1 else label in range(task.classes))
        if not good:
            allowed = "0 to 5" if task.classes == 1 else f"0 to {task.classes - 1}"
            raise CramError(f"{where} row {number}: label {label} is not from {allowed}")

    texts = [[tokens.ids for tokens in tokenizer.encode_batch_fast(
        [row[column] for row in rows], add_special_tokens=False)] for column in task.columns]
    examples = [join(parts, max_length) for parts in zip(*texts)]
    lengths = np.array([len(ids) for ids in examples])
    padded = np.zeros((len(rows), lengths.max()), np.int64)
    for row, ids in zip(padded, examples):
        row[: len(ids)] = ids
    labels = np.array([row["label"] for row in rows], np.float32 if task.classes == 1 else np.int64)
    return padded, lengths, labels


def join(parts, max_length):
    """<cls> A <sep> or <cls> A <sep> B <sep>, cut token by token from the end of the longer."""
    parts = [list(ids) for ids in parts]
    while 1 + sum(len(ids) + 1 for ids in parts) > max_length:
        max(parts, key=len).pop()
    return [CLS] + [token for ids in parts for token in (*ids, SEP)]


# -------------------------------------------------------------------------------- 4. Classifier


class Classifier(nn.Module):
    """The first token's hidden state, through one tanh layer (config crammed-bert, both biased)."""

    def __init__(self, bert, width, classes):
        super().__init__()
        self.bert = bert
        self.pool = nn.Linear(width, 1024)
        self.dropout = nn.Dropout(DROPOUT)
        self.out = nn.Linear(1024, classes)
        for linear in (self.pool, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, ids, keep):
        """ids (B, T), keep (B, T) False at padding -> logits (B, classes)."""
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


# -------------------------------------------------------------------------------- 5. One trial


def batch_of(split, chosen, device):
    """Examples `chosen` of a split, cut to the longest of them: ids, keep (B, T), labels (B,)."""
    ids, lengths, labels = split
    T = -(-lengths[chosen].max() // 8) * 8  # few shapes, and aligned
    ids = torch.from_numpy(ids[chosen, :T])
    keep = torch.arange(ids.shape[1])[None] < torch.from_numpy(lengths[chosen])[:, None]
    return [x.to(device, non_blocking=True) for x in (ids, keep, torch.from_numpy(labels[chosen]))]


def run_trial(args, name, splits, seed):
    """Fine-tune once; the metric on every validation split, in percent."""
    task = TASKS[name]
    device, dtype, _ = find_device(args.device, "auto")
    autocast = functools.partial(
        torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32
    )
    torch.manual_seed(seed)
    shuffle = np.random.default_rng(seed)
    bert, _ = load_checkpoint(args.ckpt, device, dropout=DROPOUT)
    if args.scratch:
        bert.init_weights()
    model = Classifier(bert, bert.embed.embedding_dim, task.classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), eps=1e-6,
                                  weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    train = splits["train"]
    rows = len(train[0])
    steps_per_epoch = rows // args.batch_size  # the last, smaller batch is dropped
    steps = args.epochs * steps_per_epoch
    model.train()
    with tqdm(total=steps, desc=f"{name} seed {seed}", leave=False, unit="step") as bar:
        for step in range(steps):
            if step % steps_per_epoch == 0:
                order = shuffle.permutation(rows)
            start = step % steps_per_epoch * args.batch_size
            ids, keep, labels = batch_of(train, order[start : start + args.batch_size], device)
            with autocast():
                logits = model(ids, keep).float()
                loss = (F.mse_loss(logits[:, 0], labels) if task.classes == 1
                        else F.cross_entropy(logits, labels))
            scaler.scale(loss).backward()
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, steps, args.lr)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            bar.update()

    model.eval()
    scores = {}
    for split in task.validation:
        labels = splits[split][2]
        outputs = []
        with torch.no_grad(), autocast():
            for start in range(0, len(labels), 128):
                chosen = np.arange(start, min(start + 128, len(labels)))
                ids, keep, _ = batch_of(splits[split], chosen, device)
                outputs.append(model(ids, keep).float())
        logits = torch.cat(outputs).cpu().numpy()
        if not np.isfinite(logits).all():
            raise CramError(f"{name} seed {seed} gives numbers that are not finite: it diverged, "
                            "and has no score. A smaller --lr may help")
        predicted = logits[:, 0] if task.classes == 1 else logits.argmax(1)
        scores[split] = 100 * METRICS[task.metric](predicted, labels)
    return scores


# -------------------------------------------------------------------------------- 6. All trials


def open_results(path, checkpoint, settings):
    """All of glue.json, and in it the run of this checkpoint with these settings, perhaps new.

    Numbers of another checkpoint, or made with other settings, stay in the file and apart.
    """
    results = {"runs": []}
    if path.exists():
        try:
            results = json.loads(path.read_text())
            runs = results["runs"]
        except (ValueError, KeyError, TypeError):
            raise CramError(f"{path} is not a results file of this script; move it away") from None
        for run in runs:
            if (run.get("checkpoint"), run.get("settings")) == (checkpoint, settings):
                return results, run
    run = {"checkpoint": checkpoint, "settings": settings, "tasks": {}, "average": None}
    results["runs"].append(run)
    return results, run


def entry_of(run, name, rows):
    """The results of a task in a run; empty if there are none, or of other training rows."""
    task = TASKS[name]
    if run["tasks"].get(name, {}).get("train_rows") != rows:
        run["tasks"][name] = {"metric": task.metric, "train_rows": rows,
                              "subset": rows != task.train_rows, "trials": []}
    return run["tasks"][name]


def save_results(path, results):
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    os.replace(part, path)


def summarize(run):
    """Medians over the trials of each task, and the average of the nine numbers once all are in."""
    run["tasks"] = {name: entry for name, entry in run["tasks"].items() if entry["trials"]}
    for name, entry in run["tasks"].items():
        scores = {split: [trial[split] for trial in entry["trials"]]
                  for split in TASKS[name].validation}
        entry["median"] = {split: float(np.median(x)) for split, x in scores.items()}
        entry["lowest"] = {split: min(x) for split, x in scores.items()}
        entry["highest"] = {split: max(x) for split, x in scores.items()}
    if set(run["tasks"]) == set(TASKS):
        nine = [x for entry in run["tasks"].values() for x in entry["median"].values()]
        run["average"] = sum(nine) / len(nine)
        run["average_has_subset"] = any(entry["subset"] for entry in run["tasks"].values())


def print_table(run):
    print(f"\n{'task':22} {'metric':9} {'median':>6} {'lowest':>7} {'highest':>8}  trials")
    for name, entry in run["tasks"].items():
        for split in TASKS[name].validation:
            label = name + split.removeprefix("validation").replace("_", "-")
            subset = f"  subset: {entry['train_rows']:,} rows" if entry["subset"] else ""
            print(f"{label:22} {entry['metric']:9} {entry['median'][split]:6.1f} "
                  f"{entry['lowest'][split]:7.1f} {entry['highest'][split]:8.1f}  "
                  f"{len(entry['trials'])}{subset}")
    if run["average"] is not None:
        print(f"{'average of nine':22} {'':9} {run['average']:6.1f}"
              + ("  with a subset among them" if run["average_has_subset"] else ""))


def main():
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
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    for flag in ("trials", "epochs", "batch_size", "lr"):
        if not getattr(args, flag) > 0:
            raise CramError(f"--{flag.replace('_', '-')} must be positive")

    bert, tokenizer = load_checkpoint(args.ckpt)
    tokenizer.encode_special_tokens = True  # a literal "<mask>" in a sentence is text
    max_length = min(MAX_LENGTH, bert.seq_len)
    names = list(TASKS) if args.task == "all" else [args.task]
    settings = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr,
                "scratch": args.scratch,
                "data": str(Path(args.data).resolve()) if args.data else "nyu-mll/glue"}
    path = Path(args.ckpt).with_name("glue.json")
    checkpoint = hashlib.sha256(Path(args.ckpt).read_bytes()).hexdigest()
    results, run = open_results(path, checkpoint, settings)

    for name in names:
        task = TASKS[name]
        splits = {split: load_split(name, split, args.data, tokenizer, max_length)
                  for split in ("train", *task.validation)}
        rows = len(splits["train"][0])
        if rows < args.batch_size:
            raise CramError(f"{name} has {rows} training rows, fewer than --batch-size")
        done = {trial["seed"] for trial in entry_of(run, name, rows)["trials"]}
        for seed in range(args.seed, args.seed + args.trials):
            if seed in done:
                continue
            scores = run_trial(args, name, splits, seed)
            results, run = open_results(path, checkpoint, settings)  # others may have written to it
            entry_of(run, name, rows)["trials"].append({"seed": seed, **scores})
            summarize(run)
            save_results(path, results)
            print(f"{name} seed {seed}: {task.metric} "
                  + " / ".join(f"{score:.1f}" for score in scores.values()), flush=True)
    print_table(run)
    print(f"written to {path}")


if __name__ == "__main__":
    try:
        main()
    except (CramError, OSError) as error:
        sys.exit(f"finetune_glue.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on with the trials that are missing")
