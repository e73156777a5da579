"""Tiny random models with a text tower and an image encoder, made by transformers."""

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import transformers

from tests.helpers import tiny_families

IMAGE = 88
"""The id that stands for a part of an image, one of which follows another."""
_TEXT = {
  **tiny_families.TINY,
  "head_dim": 16,
  "initializer_range": 0.2,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
_VISION = {
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "image_size": 8,
  "patch_size": 4,
  "initializer_range": 0.2,
}
CONFIGS: dict[str, dict[str, Any]] = {
  "gemma3": {
    "text_config": {
      **_TEXT,
      "model_type": "gemma3_text",
      "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
      "sliding_window": 6,
      "query_pre_attn_scalar": 20,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
    },
    "vision_config": {
      **_VISION,
      "model_type": "siglip_vision_model",
      "vision_use_head": False,
    },
    "mm_tokens_per_image": 1,
    "boi_token_index": 86,
    "eoi_token_index": 87,
    "image_token_index": IMAGE,
  },
  "mistral3": {
    "text_config": {
      **_TEXT,
      "model_type": "mistral",
      "sliding_window": None,
      "rms_norm_eps": 1e-5,
      "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
    },
    "vision_config": {**_VISION, "model_type": "pixtral", "image_size": 16},
    "image_token_index": IMAGE,
    "spatial_merge_size": 2,
    "tie_word_embeddings": False,
  },
  "qwen3_5": {
    "text_config": {
      **_TEXT,
      "model_type": "qwen3_5_text",
      "initializer_range": 0.12,
      "layer_types": ["linear_attention", "full_attention", "linear_attention"],
      "rms_norm_eps": 1e-3,
      "linear_num_key_heads": 2,
      "linear_num_value_heads": 4,
      "linear_key_head_dim": 8,
      "linear_value_head_dim": 12,
    },
    "vision_config": {
      **_VISION,
      "model_type": "qwen3_5_vision",
      "out_hidden_size": _TEXT["hidden_size"],
      "num_position_embeddings": 16,
    },
    "image_token_id": IMAGE,
  },
}
CONFIGS["qwen3_5_moe"] = {
  **CONFIGS["qwen3_5"],
  "text_config": {
    **CONFIGS["qwen3_5"]["text_config"],
    "model_type": "qwen3_5_moe_text",
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "shared_expert_intermediate_size": 8,
  },
  "vision_config": {
    **CONFIGS["qwen3_5"]["vision_config"],
    "model_type": "qwen3_5_moe_vision",
  },
}
CONFIGS["gemma4"] = {
  "text_config": {
    **_TEXT,
    "model_type": "gemma4_text",
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    **{"head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1},
    **{"attention_k_eq_v": True, "hidden_size_per_layer_input": 0},
    "sliding_window": 6,
    "use_bidirectional_attention": "vision",
  },
  "vision_config": {
    **_VISION,
    "model_type": "gemma4_vision",
    **{"num_key_value_heads": 2, "head_dim": 8},
    **{"pooling_kernel_size": 2, "position_embedding_size": 8, "standardize": True},
  },
  **{"image_token_id": IMAGE, "video_token_id": 87, "audio_token_id": 86},
}
CONFIGS["gemma4-e2b"] = {
  **CONFIGS["gemma4"],
  "model_type": "gemma4",
  "text_config": {
    **CONFIGS["gemma4"]["text_config"],
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    **{"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    **{"hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 90},
    **{"attention_k_eq_v": False, "num_key_value_heads": 1},
  },
  "audio_config": {
    "model_type": "gemma4_audio",
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"subsampling_conv_channels": [4, 2], "output_proj_dims": 16},
    "initializer_range": 0.2,
  },
}
CONFIGS["gemma4_unified"] = {
  **CONFIGS["gemma4"],
  "text_config": {
    **CONFIGS["gemma4"]["text_config"],
    "model_type": "gemma4_unified_text",
  },
  "vision_config": {
    "model_type": "gemma4_unified_vision",
    **{"patch_size": 2, "pooling_kernel_size": 2, "initializer_range": 0.2},
    **{"mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 16},
  },
}
del CONFIGS["gemma4_unified"]["text_config"]["hidden_size_per_layer_input"]


def make(kind: str, **fields: Any) -> transformers.PreTrainedModel:
  """A model of `CONFIGS`, in which each norm and bias differs from its first value."""
  torch.manual_seed(0)
  fields = {"model_type": kind, **CONFIGS[kind], **fields}
  config = transformers.AutoConfig.for_model(**fields)
  network = transformers.AutoModelForImageTextToText.from_config(
    config, attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    for name, parameter in network.named_parameters():
      if "norm" in name:
        parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
      if name.endswith("bias") or "projector" in name or "position" in name:
        parameter.normal_(std=0.3)
    for name, buffer in network.named_buffers():
      if name.endswith(("layer_scalar", "std_bias", "std_scale")):
        buffer.uniform_(0.5, 1.5)
  return network


def save(
  folder: pathlib.Path,
  network: transformers.PreTrainedModel,
  tokenizer_folder: pathlib.Path,
  **options: Any,
) -> pathlib.Path:
  """The model as transformers saves it, with a tokenizer and a processor's file."""
  network.save_pretrained(folder, **options)
  shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
  (folder / "preprocessor_config.json").write_text('{"do_resize":  true}')
  return folder


def load(folder: pathlib.Path, **options: Any) -> transformers.PreTrainedModel:
  """The whole model, by transformers. Raises AssertionError if a tensor is not used."""
  network, report = transformers.AutoModelForImageTextToText.from_pretrained(
    folder, attn_implementation="eager", output_loading_info=True, **options
  )
  for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not report[kind], (kind, report[kind])
  # The file is mapped, and torch rounds otherwise where a tensor is not aligned.
  for tensor in (*network.parameters(), *network.buffers()):
    tensor.data = tensor.data.clone()
  return network.eval()


def rename(folder: pathlib.Path, new: Callable[[str], str]) -> None:
  """Gives the tensors of a folder with one file of weights other names."""
  path = folder / "model.safetensors"
  tensors = safetensors.torch.load_file(path)
  tensors = {new(name): tensor for name, tensor in tensors.items()}
  safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def as_modules(name: str) -> str:
  """The name of a tensor as newer models write it: that of the module."""
  if name.startswith(("model.", "lm_head.")):
    return name
  for old, new in (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
  ):
    if name.startswith(old):
      return new + name.removeprefix(old)
  raise ValueError(name)


def stored(folder: pathlib.Path) -> dict[str, torch.Tensor]:
  """All tensors of a folder by name, in the types that they have in the files."""
  tensors: dict[str, torch.Tensor] = {}
  for file in folder.glob("*.safetensors"):
    with safetensors.safe_open(file, framework="pt") as handle:
      for name in handle.keys():  # noqa: SIM118 (it is not a mapping)
        assert name not in tensors
        tensors[name] = handle.get_tensor(name)
  return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
  """Whether two tensors have one type, shape, and the same bytes."""
  alike = a.dtype == b.dtype and a.shape == b.shape
  return alike and torch.equal(
    a.contiguous().flatten().view(torch.uint8),
    b.contiguous().flatten().view(torch.uint8),
  )


def image_inputs(kind: str) -> dict[str, torch.Tensor]:
  """Arguments of a forward pass with an image in the text.

  One of 8 x 8 pixels, which is one token; or of 8 x 16 for Mistral 3: two tokens.
  Qwen 3.5 takes patches of 4 x 4 pixels and two frames; Gemma 4 also their places.
  """
  generator = torch.Generator().manual_seed(1)
  ids = torch.randint(3, 80, (1, 12), generator=generator)
  size = (8, 16) if kind == "mistral3" else (8, 8)
  ids[0, 4 : 4 + size[1] // 8] = IMAGE
  shape = (4, 2 * 3 * 4 * 4) if kind.startswith("qwen3_5") else (1, 3, *size)
  if kind.startswith("gemma4"):
    shape = (1, 1 if kind == "gemma4_unified" else 4, 3 * 4 * 4)
  pixels = torch.randn(shape, generator=generator)
  inputs = {"input_ids": ids, "pixel_values": pixels}
  if kind == "gemma3":
    inputs["token_type_ids"] = (ids == IMAGE).long()
  elif kind == "mistral3":
    inputs["image_sizes"] = torch.tensor([size])
  elif kind.startswith("gemma4"):
    places = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]])
    inputs["image_position_ids"] = places[:, -shape[1] :]
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
  else:
    inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]])
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
  return inputs


@torch.no_grad()
def logits(network: transformers.PreTrainedModel, **inputs: Any) -> np.ndarray:
  """Logits of a forward pass, on the host."""
  return network(**inputs).logits.float().numpy()


IMAGE_TOKENS = {
  "boi_token": "<start_of_image>",
  "eoi_token": "<end_of_image>",
  "image_token": "<image_soft_token>",
}


def save_gemma3(folder: pathlib.Path, tokenizer_folder: pathlib.Path) -> pathlib.Path:
  """A Gemma 3 with a whole processor, as vLLM needs one to serve text.

  Args:
    tokenizer_folder: a tokenizer with a chat template; the tokens of images are added.
  """
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    tokenizer_folder, extra_special_tokens=IMAGE_TOKENS
  )
  images = transformers.Gemma3ImageProcessor(size={"height": 8, "width": 8})
  processor = transformers.Gemma3Processor(
    image_processor=images,
    tokenizer=tokenizer,
    chat_template=tokenizer.chat_template,
    image_seq_length=1,
  )
  ids = {
    f"{role}_index": tokenizer.convert_tokens_to_ids(token)
    for role, token in IMAGE_TOKENS.items()
  }
  text = {
    **CONFIGS["gemma3"]["text_config"],
    "vocab_size": len(tokenizer),
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "eos_token_id": tokenizer.eos_token_id,
  }
  make("gemma3", text_config=text, **ids).save_pretrained(folder)
  processor.save_pretrained(folder)
  return folder
