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
    (0, "pad_token_id decoder_start_token_id"),
    (1, "eos_token_id"),
    (2, "bos_token_id"),
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
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    default = kind()
    names = {**vars(default), **dict.fromkeys(getattr(default, "attribute_map", {})), "num_labels": 0}
    aliases = getattr(default, "attribute_map", {})
    listed = {name for name in aliases if aliases[name] in sizes} | {
        name for name, value in names.items() if isinstance(value, list | tuple)
    }
    given = {name: value for name, value in SMALL.items() if name in names and name not in listed}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            own = dict(sizes.get(name, {}))
            other = own.pop("model_type", None)
            given[name] = configuration(CONFIG_MAPPING[other] if other else type(value), own)
    return kind(**given | {name: v for name, v in sizes.items() if name not in given or name in SMALL})


def build(family: Family) -> nn.Module:
    """Make the model with random weights."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    config = configuration(CONFIG_MAPPING[family.name], family.sizes)
    auto = getattr(transformers, f"AutoModelFor{family.task}", None)
    # Some tasks have no class of their own: the name of the model's class stands in its place.
    model = getattr(transformers, family.task)(config) if auto is None else auto.from_config(config)
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
    if norms:
        # With the statistics that it begins with, the smallest weights leave nothing of the input.
        with torch.no_grad():
            for batch in loader(family, model):
                model.train()(**batch)
    return model.eval()


def words(n: int) -> dict[str, Tensor]:
    """Sentences of several lengths, with an end and padding behind it."""
    ends = torch.randint(4, LENGTH, (n, 1))
    ids = torch.randint(3, VOCABULARY, (n, LENGTH)).scatter(1, ends, 1)
    mask = torch.arange(LENGTH) <= ends
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


def images(n: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, SIDE, SIDE)}


def patches(n: int) -> dict[str, Tensor]:
    shapes = torch.tensor([[4, 4]]).expand(n, 2)
    return {"pixel_values": torch.randn(n, 16, 192), "spatial_shapes": shapes} | {
        "pixel_attention_mask": torch.ones(n, 16, dtype=torch.long)
    }


def image_and_words(n: int) -> dict[str, Tensor]:
    """Images of 16 patches, whose places the words begin with."""
    given = words(n)
    places = torch.full((n, 16), VOCABULARY - 1)
    ids = torch.cat([places, given["input_ids"].clamp_max(VOCABULARY - 2)], 1)
    mask = torch.cat([torch.ones_like(places), given["attention_mask"]], 1)
    return images(n) | {"input_ids": ids, "attention_mask": mask}


BATCHES: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "input_ids": words,
    "pixel_values": images,
    "input_values": lambda n: {"input_values": torch.randn(n, 800)},
    "input_features": lambda n: {"input_features": torch.randn(n, 16, 20)},
    "spectrogram": lambda n: {"input_values": torch.randn(n, 20, 16)},
    "speech": lambda n: {"input_features": torch.randn(n, 40, 16)},
    "large": lambda n: {"pixel_values": torch.randn(n, 3, 64, 64)},
    "patches": patches,
    "both": lambda n: words(n) | images(n),
    "image first": image_and_words,
    "video": lambda n: {"pixel_values": torch.randn(n, 2, 3, SIDE, SIDE)},
    "past_values": lambda n: {"past_values": torch.randn(n, 32, 3)},
}


def labels(task: str, n: int) -> dict[str, Any]:
    """Draw what the task's loss is taken against."""
    if task in ("CausalLM", "MaskedLM", "Seq2SeqLM", "SpeechSeq2Seq"):
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


_HIERARCHY = {
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 2, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
}
_WINDOWS = {"hidden_size": 16, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]}
_WINDOWS |= {"window_size": 2, "patch_size": 4, "num_layers": 2}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
_CONVNEXT = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 2, 1, 1], "patch_size": 2}
_WAVES: dict[str, Any] = {"conv_dim": [16, 16], "conv_kernel": [10, 4], "conv_stride": [5, 4]}
_WAVES |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
_WAVES |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
_PYRAMID: dict[str, Any] = {"num_hidden_layers": 4, "patch_size": 16, "image_size": 64}
_PYRAMID |= {"out_indices": [0, 1, 2, 3]}
_MOBILEVIT: dict[str, Any] = {"hidden_sizes": [16, 16, 16], "patch_size": 2, "image_size": 64}
_MOBILEVIT |= {"neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]}
_STAGES: dict[str, Any] = {"model_type": "resnet", "out_features": ["stage1", "stage2"], **_RESNET}
_DETR: dict[str, Any] = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
_DETR |= {"backbone_config": _STAGES, "num_queries": 5, "backbone_kwargs": {}}
_NO_DROPOUT: dict[str, Any] = {}


def _all(
    task: str, names: str, sizes: Mapping[str, Any] = _NO_DROPOUT, batch: str | None = None
) -> list[Family]:
    return [Family(task, name, sizes, batch) for name in names.split()]


FAMILIES = [
    *_all(
        "SequenceClassification",
        "albert bart bert big_bird biogpt bloom camembert canine convbert ctrl deberta deberta-v2 "
        "distilbert doge electra ernie esm eurobert flaubert fnet funnel gemma gpt2 gpt_neox gpt_oss "
        "ibert jetmoe layoutlm llama markuplm mbart megatron-bert mistral mixtral mobilebert modernbert "
        "mpnet mpt mra nystromformer openai-gpt opt persimmon phi phi3 qwen2 qwen3 rembert roberta "
        "roformer squeezebert tapas xlm xlnet yoso",
    ),
    *_all(
        "CausalLM",
        "gpt_bigcode cohere falcon gemma2 gemma3_text glm mamba olmo2 smollm3 stablelm starcoder2",
    ),
    *_all("CausalLM", "gpt_neo", {"attention_types": [[["global", "local"], 2]], "num_layers": 4}),
    *_all("CausalLM", "mamba2", {"chunk_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}),
    *_all("MaskedLM", "bert data2vec-text electra fnet funnel mobilebert modernbert xlm-roberta"),
    *_all("TokenClassification", "layoutlm roberta"),
    *_all("QuestionAnswering", "bert splinter", {"num_labels": 2}),
    *_all(
        "Seq2SeqLM",
        "bart bigbird_pegasus blenderbot fsmt m2m_100 marian mt5 mvp pegasus plbart prophetnet "
        "t5gemma umt5",
    ),
    *_all("Seq2SeqLM", "switch_transformers t5", {"decoder_start_token_id": 0}),
    *_all("ImageClassification", "beit clip dinov2 ijepa imagegpt siglip vit vit_msn"),
    *_all("DeiTForImageClassification", "deit"),
    *_all("ImageClassification", "resnet", _RESNET),
    *_all("ImageClassification", "regnet", {**_RESNET, "layer_type": "x", "groups_width": 4}),
    *_all("ImageClassification", "bit", {**_RESNET, "layer_type": "preactivation", "num_groups": 4}),
    *_all("ImageClassification", "convnext convnextv2", _CONVNEXT),
    *_all("ImageClassification", "swin swinv2", _WINDOWS),
    *_all(
        "ImageClassification",
        "focalnet",
        {**_WINDOWS, "hidden_sizes": [8, 16], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    ),
    *_all("ImageClassification", "poolformer pvt pvt_v2 segformer", _HIERARCHY),
    *_all("ImageClassification", "swiftformer", {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 16]}),
    *_all("ImageClassification", "mobilenet_v1", {"depth_multiplier": 0.25}),
    *_all("ImageClassification", "mobilenet_v2", {"depth_multiplier": 0.35}),
    *_all("ImageClassification", "mobilevit", _MOBILEVIT, "large"),
    *_all("ImageClassification", "siglip2", {"vision_config": {"num_patches": 16}}, "patches"),
    *_all("SemanticSegmentation", "segformer", {**_HIERARCHY, "decoder_hidden_size": 16}),
    *_all("SemanticSegmentation", "beit data2vec-vision", _PYRAMID, "large"),
    *_all("SemanticSegmentation", "mobilenet_v2", {"depth_multiplier": 0.35}),
    *_all("SemanticSegmentation", "mobilevit", _MOBILEVIT, "large"),
    *_all(
        "SemanticSegmentation",
        "dpt",
        {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
        },
    ),
    *_all(
        "SemanticSegmentation",
        "upernet",
        {
            "backbone_config": {
                **_RESNET,
                "hidden_sizes": [8, 8, 16, 16],
                "depths": [1, 1, 1, 1],
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "hidden_size": 16,
            "auxiliary_in_channels": 16,
            "auxiliary_channels": 16,
        },
    ),
    *_all("ObjectDetection", "detr conditional_detr table-transformer", _DETR),
    *_all("ObjectDetection", "deformable_detr", {**_DETR, "num_feature_levels": 2}),
    *_all("ObjectDetection", "yolos", {"image_size": [SIDE, SIDE], "num_detection_tokens": 5}),
    *_all(
        "AudioClassification",
        "data2vec-audio hubert sew unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm",
        _WAVES,
    ),
    *_all("AudioClassification", "whisper", {"num_mel_bins": 16, "max_source_positions": 10}),
    *_all(
        "AudioClassification",
        "audio-spectrogram-transformer",
        {"num_mel_bins": 16, "max_length": 20, "frequency_stride": 4, "time_stride": 4},
        "spectrogram",
    ),
    *_all("CTC", "wav2vec2 hubert", _WAVES),
    *_all(
        "SpeechSeq2Seq", "speech_to_text", {"input_feat_per_channel": 16, "conv_channels": 16}, "speech"
    ),
    *_all("VideoClassification", "timesformer videomae", {"num_frames": 2}, "video"),
    *_all("VideoClassification", "vivit", {"num_frames": 2, "tubelet_size": [2, 8, 8]}, "video"),
    *_all("CLIPModel", "clip", {}, "both"),
    *_all("SiglipModel", "siglip", {}, "both"),
    *_all("ChineseCLIPModel", "chinese_clip", {}, "both"),
    *_all("ViltForQuestionAnswering", "vilt", {}, "both"),
    *_all("BlipForConditionalGeneration", "blip", {}, "both"),
    *_all("GitForCausalLM", "git", {}, "both"),
    *_all("VisionTextDualEncoderModel", "vision-text-dual-encoder", {}, "both"),
    *_all(
        "ImageTextToText",
        "llava",
        {
            "image_token_index": VOCABULARY - 1,
            "image_token_id": VOCABULARY - 1,
            "vision_feature_select_strategy": "default",
        },
        "image first",
    ),
    *_all(
        "ImageTextToText",
        "paligemma",
        {"image_token_index": VOCABULARY - 1, "image_token_id": VOCABULARY - 1},
        "image first",
    ),
    *_all(
        "PatchTSTForClassification",
        "patchtst",
        {"context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 3},
    ),
]
"""What the slow test goes through."""
