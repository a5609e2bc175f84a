"""Model families of ``transformers``, built offline and tiny, with batches as loaders give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

VOCABULARY, LENGTH, SIDE, CLASSES = 99, 10, 32, 4

_NAMES: tuple[tuple[float, str], ...] = (
    (32, "hidden_size d_model n_embd embedding_size dim emb_dim projection_dim decoder_hidden_size"),
    (3, "num_hidden_layers n_layer num_layers n_layers"),
    (
        2,
        "encoder_layers decoder_layers num_encoder_layers num_decoder_layers num_attention_heads n_head "
        "n_heads num_heads encoder_attention_heads decoder_attention_heads num_key_value_heads",
    ),
    (48, "intermediate_size d_ff d_inner n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim"),
    (64, "max_position_embeddings"),
    (1, "pad_token_id bos_token_id eos_token_id decoder_start_token_id"),
    (0.0, "dropout layerdrop encoder_layerdrop"),
    (VOCABULARY, "vocab_size"),
    (SIDE, "image_size"),
    (8, "patch_size"),
    (CLASSES, "num_labels"),
)
SMALL = {name: size for size, names in _NAMES for name in names.split()}
"""Sizes put in place of those that a configuration has by default."""


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        task: What people use it for: the ending of the class ``AutoModelFor…``.
        name: Of the configuration.
        sizes: Its own, beside :data:`SMALL`.
        batch: Which of :data:`BATCHES` it takes, if not that of its main input.
        count: Samples.
    """

    task: str
    name: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    batch: str | None = None
    count: int = 108

    def __str__(self) -> str:
        return f"{self.name}, {self.task}"


def configuration(kind: type, sizes: Mapping[str, Any]) -> Any:
    """Make a configuration in small, and those that it holds."""
    from transformers import PreTrainedConfig

    default = kind()
    names = {**vars(default), **dict.fromkeys(getattr(default, "attribute_map", {})), "num_labels": 0}
    listed = {name for name, value in names.items() if isinstance(value, list | tuple)}
    given = {name: value for name, value in SMALL.items() if name in names and name not in listed}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            given[name] = configuration(type(value), sizes.get(name, {}))
    return kind(**given | {name: v for name, v in sizes.items() if name not in given or name in SMALL})


def build(family: Family) -> nn.Module:
    """Make the model with random weights."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    config = configuration(CONFIG_MAPPING[family.name], family.sizes)
    if family.task.endswith("Model"):
        kind = family.task
        return getattr(transformers, kind)(config).eval()
    return getattr(transformers, f"AutoModelFor{family.task}").from_config(config).eval()


def words(n: int) -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (n, LENGTH))
    ids[torch.arange(n), torch.randint(4, LENGTH, (n,))] = 1
    mask = ((ids == 1).cumsum(1) == 0) | (ids == 1)
    return {"input_ids": ids.where(mask, 1), "attention_mask": mask.long()}


def images(n: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, SIDE, SIDE)}


BATCHES: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "input_ids": words,
    "pixel_values": images,
    "input_values": lambda n: {"input_values": torch.randn(n, 800)},
    "input_features": lambda n: {"input_features": torch.randn(n, 16, 20)},
    "both": lambda n: words(n) | images(n),
    "video": lambda n: {"pixel_values": torch.randn(n, 2, 3, SIDE, SIDE)},
    "past_values": lambda n: {"past_values": torch.randn(n, 32, 3)},
}


def labels(task: str, n: int) -> dict[str, Any]:
    """Draw what the task's loss is taken against."""
    if task in ("CausalLM", "MaskedLM", "Seq2SeqLM"):
        return {"labels": torch.randint(2, VOCABULARY, (n, LENGTH))}
    if task == "TokenClassification":
        return {"labels": torch.randint(0, CLASSES, (n, LENGTH))}
    if task == "QuestionAnswering":
        return {end: torch.randint(0, LENGTH, (n,)) for end in ("start_positions", "end_positions")}
    if task == "SemanticSegmentation":
        return {"labels": torch.randint(0, CLASSES, (n, SIDE, SIDE))}
    if task == "ObjectDetection":
        boxes = [torch.rand(2, 4) * 0.4 + 0.1 for _ in range(n)]
        return {"labels": [{"class_labels": torch.tensor([0, 2]), "boxes": box} for box in boxes]}
    if task.endswith("Classification"):
        return {"labels": torch.randint(0, CLASSES, (n,))}
    return {}


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put samples into a batch; the objects in an image stay a list."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {k: c if isinstance(c[0], dict) else default_collate(c) for k, c in columns.items()}


def loader(family: Family, model: Any) -> DataLoader[Any]:
    torch.manual_seed(1)
    n = family.count
    given = BATCHES[family.batch or model.main_input_name](n) | labels(family.task, n)
    rows: Any = [{key: value[i] for key, value in given.items()} for i in range(n)]
    return DataLoader(rows, batch_size=36, collate_fn=together)
