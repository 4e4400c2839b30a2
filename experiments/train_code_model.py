"""Train a small causal language model of Python source, for any architecture that transformers knows.

    python experiments/train_code_model.py experiments/configs/pycode-llama.json models/pycode-llama
    python experiments/train_code_model.py CONFIG OUTPUT --corpus corpus.jsonl.xz --tokens 20000000

CONFIG is an ordinary `config.json` (`model_type` and sizes); the vocabulary is that of the tokenizer trained here.
Without `--corpus` the text is the standard library of the running interpreter. A JSONL corpus has one file per
row: `text`, and `source` and `path` from which the project is read. Whole projects are kept out of training.
Stopped and started again with the same arguments, it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import platform
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

HELD_OUT = ("pypi:networkx", "asyncio", "email", "http", "json", "logging", "unittest")
"""Projects that no model of ours has seen: one package of its own, and packages of the standard library."""

END = "<|endoftext|>"


class SourceFile(NamedTuple):
    """One Python file and the project that it belongs to."""

    project: str
    text: str


def standard_library() -> Iterator[SourceFile]:
    """The standard library of the running interpreter, its tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not {"site-packages", "test", "tests", "idle_test", "lib2to3"} & set(parts):
            yield SourceFile(Path(parts[0]).stem, path.read_text(encoding="utf-8", errors="ignore"))


def json_lines(path: Path) -> Iterator[SourceFile]:
    """The rows of a JSONL corpus, plain or xz-compressed; the standard library's packages count as projects."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            project = row["source"]
            if project == "cpython-stdlib":
                project = Path(row["path"]).parts[0].removesuffix(".py")
            yield SourceFile(project, row["text"])


def split(files: Iterable[SourceFile]) -> tuple[list[str], list[str]]:
    """Training texts and held-out texts, each file once (by content), held-out content never in training."""
    held, train = {}, {}
    for file in files:
        digest = hashlib.sha256(file.text.encode()).digest()
        (held if file.project in HELD_OUT else train)[digest] = file.text
    return [text for digest, text in train.items() if digest not in held], list(held.values())


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose end-of-text token also begins a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


class Windows(torch.utils.data.Dataset):
    """Consecutive windows of one long token stream."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens = tokens[: len(tokens) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str], limit: int, seed: int) -> np.ndarray:
    """Token stream of whole files in random order, each begun by the end-of-text token, up to about `limit` tokens."""
    stream, total = [], 0
    order = np.random.default_rng(seed).permutation(len(texts))
    for start in range(0, len(order), 64):
        batch = [texts[i] for i in order[start : start + 64]]
        for encoding in tokenizer.backend_tokenizer.encode_batch(batch):
            ids = np.array([tokenizer.bos_token_id, *encoding.ids], dtype=np.uint16)
            stream.append(ids)
            total += len(ids)
        if total >= limit:
            break
    return np.concatenate(stream)[:limit]


def prepare(arguments: argparse.Namespace, work: Path) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """Tokenizer and training tokens, made once and kept in the work folder so that a restart goes on with the same."""
    if (work / "tokens.npy").exists():
        return PreTrainedTokenizerFast.from_pretrained(work), np.load(work / "tokens.npy", mmap_mode="r")
    files = json_lines(arguments.corpus) if arguments.corpus else standard_library()
    train, held = split(files)
    print(f"{len(train)} files to train on, {len(held)} held out")
    tokenizer = train_tokenizer(train[:: max(1, len(train) // 1500)], arguments.vocabulary)
    tokens = tokenize(tokenizer, train, arguments.tokens, arguments.seed)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(work)
    np.save(work / "partial.npy", tokens)
    (work / "partial.npy").rename(work / "tokens.npy")
    return tokenizer, tokens


def build(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """A freshly initialized model of the asked architecture, its token ids those of the tokenizer."""
    settings = json.loads(arguments.config.read_text())
    end = tokenizer.bos_token_id
    settings |= {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    transformers.set_seed(arguments.seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))


def train(arguments: argparse.Namespace) -> None:
    """Train, then save weights in bfloat16, the tokenizer and the facts of the run."""
    work = arguments.work or arguments.output.with_name(arguments.output.name + ".training")
    tokenizer, tokens = prepare(arguments, work)
    model = build(arguments, tokenizer)
    windows = Windows(tokens, arguments.context)
    epochs = arguments.tokens / (len(windows) * arguments.context)
    options = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=arguments.batch,
        num_train_epochs=epochs,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=100,
        save_steps=500,
        save_total_limit=1,
        seed=arguments.seed,
        report_to="none",
    )
    trainer = Trainer(model=model, args=options, train_dataset=windows)
    resumed = any(work.glob("checkpoint-*"))
    result = trainer.train(resume_from_checkpoint=resumed or None)
    save(arguments, model, tokenizer, result, resumed)
    shutil.rmtree(work)


def save(
    arguments: argparse.Namespace,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    result: transformers.trainer_utils.TrainOutput,
    resumed: bool,
) -> None:
    """The model folder: bfloat16 weights, tokenizer, and `training.json` from which the model card is made."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    settings = json.loads((arguments.output / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    (arguments.output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    facts = {
        "corpus": arguments.corpus.name
        if arguments.corpus
        else f"standard library of Python {platform.python_version()}",
        "held_out_projects": list(HELD_OUT),
        "tokens_seen": result.global_step * arguments.batch * arguments.context,
        "seconds": None if resumed else round(result.metrics["train_runtime"]),
        "final_training_loss": round(result.training_loss, 4),
        "batch_tokens": arguments.batch * arguments.context,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (arguments.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config.json: model_type and sizes")
    parser.add_argument("output", type=Path, help="folder of the trained model")
    parser.add_argument("--corpus", type=Path, help="JSONL file, plain or .xz (default: the standard library)")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens to train on (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--context", type=int, default=256, help="tokens a window (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="windows a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--work", type=Path, help="folder of the tokens and checkpoints (default: OUTPUT.training)")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
