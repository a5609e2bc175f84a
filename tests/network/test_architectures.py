"""A finite report for whatever people train, without options; the table in the docs is made here."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import CreditReport, Options, credit_report

pytestmark = pytest.mark.filterwarnings("ignore")

BLOCK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BLOCK |= {"intermediate_size": 64, "vocab_size": 50}
Case = tuple[nn.Module, list[Any]]


def u_net() -> nn.Module:
    def block(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU())

    def run(m: Any, x: Tensor) -> Tensor:
        b = m.d2(F.max_pool2d(a := m.d1(x), 2))
        u = F.interpolate(m.mid(F.max_pool2d(b, 2)), scale_factor=2)
        u = F.interpolate(m.u2(torch.cat([u, b], 1)), scale_factor=2)
        return m.out(m.u1(torch.cat([u, a], 1)))

    down = {"d1": block(1, 4), "d2": block(4, 8), "mid": block(8, 8)}
    return wired(run, **down, u2=block(16, 4), u1=block(8, 4), out=nn.Conv2d(4, 1, 1))


def inception() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        return m.head(torch.cat([m.b1(x), m.b2(x)], 1).mean((2, 3)))

    branches = {"b1": nn.Conv2d(8, 4, 1), "b2": nn.Conv2d(8, 4, 3, padding=1)}
    return wired(run, stem=nn.Conv2d(3, 8, 3, padding=1), **branches, head=nn.Linear(8, 5))


def graph_net() -> nn.Module:
    def run(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        x = F.relu(adjacency @ m.a(x))
        return m.c(F.relu(adjacency @ m.b(x)))

    return wired(run, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate, self.out = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inp(x))
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return self.out(y)


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], batch_first: bool) -> None:
        super().__init__()
        self.r1, self.r2 = (kind(w, 8, batch_first=batch_first) for w in (6, 8))
        self.head, self.batch_first = nn.Linear(8, 3), batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.r2(self.r1(x)[0])[0]
        return self.head(y[:, -1] if self.batch_first else y[-1])


def packed() -> nn.Module:
    def run(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        return m.head(m.rnn(packed)[1][0][-1])

    return wired(run, rnn=nn.LSTM(6, 8, batch_first=True), head=nn.Linear(8, 3))


def attention() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.inp(x)
        return m.head((x + m.attention(x, x, x)[0]).mean(1))

    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    return wired(run, inp=nn.Linear(6, 8), attention=layer, head=nn.Linear(8, 3))


def towers() -> nn.Module:
    parts = {"left": nn.Linear(4, 6), "right": nn.Linear(5, 6), "head": nn.Linear(12, 3)}
    return wired(lambda m, x, y: m.head(torch.cat([m.left(x), m.right(y)], 1).relu()), **parts)


def randn(*shape: int) -> list[Any]:
    return [torch.randn(*shape) for _ in range(4)]


def plain() -> dict[str, Callable[[], Case]]:
    layer = {"d_model": 16, "nhead": 2, "dim_feedforward": 32}
    return {
        "LSTM, batch second": lambda: (Recurrent(nn.LSTM, False), randn(7, 40, 6)),
        "GRU, batch first": lambda: (Recurrent(nn.GRU, True), randn(40, 7, 6)),
        "LSTM, packed": lambda: (
            packed(),
            [(torch.randn(40, 7, 6), torch.randint(1, 8, (40,))) for _ in range(4)],
        ),
        "TransformerEncoder": lambda: (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer, batch_first=True), 3),
            randn(60, 5, 16),
        ),
        "Transformer": lambda: (
            nn.Transformer(16, 2, 2, 2, 32, batch_first=True),
            [(torch.randn(60, 5, 16), torch.randn(60, 4, 16)) for _ in range(4)],
        ),
        "MultiheadAttention": lambda: (attention(), randn(60, 7, 6)),
        "U-Net": lambda: (u_net(), randn(60, 1, 16, 16)),
        "Inception": lambda: (inception(), randn(60, 3, 8, 8)),
        "graph network": lambda: (
            graph_net(),
            [(torch.randn(80, 6), (torch.rand(80, 80) > 0.9).float()) for _ in range(4)],
        ),
        "sparse mixture of experts": lambda: (Experts(), randn(80, 6)),
        "two towers": lambda: (towers(), [(torch.randn(80, 4), torch.randn(80, 5)) for _ in range(4)]),
        "autoencoder": lambda: (
            nn.Sequential(nn.Linear(10, 3), nn.ReLU(), nn.Linear(3, 10)),
            randn(100, 10),
        ),
    }


def pretrained() -> dict[str, tuple[str, str, dict[str, Any], str]]:
    """Class, configuration, its arguments and the kind of input, all from ``transformers``."""
    vision = {"image_size": 32, "patch_size": 8}
    t5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    conv = {"hidden_sizes": [8, 16], "depths": [2, 2]}
    resnet, convnext = conv | {"embedding_size": 8, "layer_type": "basic"}, conv | {"num_stages": 2}
    swin = {"image_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50} | special
    mamba = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4}
    return {
        "BERT": ("BertForSequenceClassification", "BertConfig", BLOCK, "ids"),
        "GPT-2": ("GPT2LMHeadModel", "GPT2Config", gpt, "ids"),
        "Llama": ("LlamaForCausalLM", "LlamaConfig", BLOCK | {"num_key_value_heads": 2}, "ids"),
        "T5 encoder": ("T5EncoderModel", "T5Config", t5, "ids"),
        "T5": ("T5ForConditionalGeneration", "T5Config", t5 | {"decoder_start_token_id": 0}, "both"),
        "Mamba": ("MambaForCausalLM", "MambaConfig", mamba, "ids"),
        "ViT": ("ViTForImageClassification", "ViTConfig", BLOCK | vision, "images"),
        "ResNet": ("ResNetForImageClassification", "ResNetConfig", resnet, "images"),
        "ConvNeXt": ("ConvNextForImageClassification", "ConvNextConfig", convnext, "images"),
        "Swin": ("SwinForImageClassification", "SwinConfig", swin, "images"),
    }


def inputs(kind: str) -> list[Any]:
    if kind == "images":
        return [{"pixel_values": torch.randn(50, 3, 32, 32)} for _ in range(4)]
    batches = []
    for _ in range(6):
        lengths = torch.randint(3, 9, (50, 1))
        batch = {"input_ids": torch.randint(0, 50, (50, 8)), "attention_mask": torch.arange(8) < lengths}
        batch["attention_mask"] = batch["attention_mask"].long()
        batches.append(batch | ({"labels": torch.randint(0, 50, (50, 6))} if kind == "both" else {}))
    return batches


@pytest.fixture(scope="module")
def table():
    """Rows that go to the file that KOOPMAN_ARCHITECTURES names, if the run is asked for it."""
    rows: list[str] = []
    yield rows
    target = os.environ.get("KOOPMAN_ARCHITECTURES")
    if target:
        head = "| network | components | directions | what the report notes |\n|---|---|---|---|\n"
        text = "# Architectures\n\nMade by `KOOPMAN_ARCHITECTURES=docs/architectures.md pytest "
        text += "tests/test_architectures.py`, with random weights and no options but `max_dim=64`.\n\n"
        Path(target).write_text(text + head + "".join(rows), encoding="utf-8")


def check(name: str, model: nn.Module, batches: list[Any], table: list[str]) -> CreditReport:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = credit_report(model, batches, options=Options(max_dim=64))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(report.components) >= 2
    for quantity in ("credit", "gain", "r2", "chain_r2", "sensitivity"):
        assert np.isfinite(getattr(report, quantity)).all(), quantity
    assert report.gain.sum() == pytest.approx(report.total)
    shown = ", ".join(f"`{component}`" for component in report.components)
    notes = "; ".join(note for note in report.notes if "samples are few" not in note) or "nothing"
    table.append(f"| {name} | {shown} | {report.directions} | {notes} |\n")
    return report


@pytest.mark.parametrize("name", plain())
def test_plain_networks_give_a_finite_report(name, table):
    torch.manual_seed(0)
    check(name, *plain()[name](), table)


@pytest.mark.parametrize("name", pretrained())
def test_transformers_give_a_finite_report(name, table):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind, config, options, given = pretrained()[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    check(name, model, inputs(given), table)


def test_skips_are_linked_and_parallel_components_joined(table):
    unet = check("U-Net", *plain()["U-Net"](), [])
    assert unet.reads["u2.0"] == ("mid.0", "d2.0")
    assert unet.reads["u1.0"] == ("u2.0", "d1.0")
    inception = check("Inception", *plain()["Inception"](), [])
    assert inception.components == ("stem", "b1+b2", "head")
    assert any("joined into one state: b1+b2" in note for note in inception.notes)
    towers = check("two towers", *plain()["two towers"](), [])
    assert towers.components == ("left+right", "head")


def test_vision_networks_are_reported_by_block():
    transformers = pytest.importorskip("transformers")
    kind, config, options, given = pretrained()["ResNet"]
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    report = credit_report(model, inputs(given), options=Options(max_dim=64))
    stages = [f"resnet.encoder.stages.{i}.layers.{j}" for i in range(2) for j in range(2)]
    assert report.components == ("resnet.embedder", *stages, "classifier.1")


def linears(**widths: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*width) for name, width in widths.items()}


def linear_u_net() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        b = m.d2(a := m.d1(x))
        return m.out(m.u1(torch.cat([m.u2(torch.cat([m.mid(b), b], 1)), a], 1)))

    down = linears(d1=(12, 9), d2=(9, 7), mid=(7, 7))
    return wired(run, **down, **linears(u2=(14, 6), u1=(15, 5), out=(5, 4)))


def linear_inception() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(torch.cat([m.b1(x), m.b2(x)], 1))

    return wired(run, **linears(stem=(12, 9), b1=(9, 5), b2=(9, 4), head=(9, 4)))


def linear_towers() -> nn.Module:
    parts = linears(left=(4, 5), right=(5, 6), head=(11, 3))
    return wired(lambda m, x, y: m.head(torch.cat([m.left(x), m.right(y)], 1)), **parts)


@pytest.mark.parametrize(
    ("make", "widths"), [(linear_u_net, [12]), (linear_inception, [12]), (linear_towers, [4, 5])]
)
def test_a_linear_network_has_the_log_volume_of_its_dense_jacobian(make, widths):
    torch.manual_seed(0)
    model = make().double()
    batches = [tuple(torch.randn(100, w, dtype=torch.float64) for w in widths) for _ in range(5)]
    report = credit_report(model, batches, forward_fn=lambda net, batch: net(*batch))
    jacobian = torch.autograd.functional.jacobian(model, tuple(b[:1] for b in batches[0]))
    dense = torch.cat([j[0, :, 0] for j in jacobian], dim=1)
    volume = float(torch.linalg.svdvals(dense).log().mean())
    assert report.total == pytest.approx(volume, abs=1e-9)
    assert report.gain.sum() == pytest.approx(volume, abs=1e-9)
