"""Your own models from local folders, each on a device of its own.

    python local_models_device_map.py path/to/anchor path/to/specialist --devices cuda:0 cuda:1

Without paths it makes two tiny random models; without devices everything runs on the CPU.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

import rc_agents


def main() -> None:
    """Couples the models in two folders."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--devices", nargs=2, default=["cpu", "cpu"])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        anchor, specialist = chosen.models or [make(folder, "llama"), make(folder, "qwen2")]
        model = rc_agents.couple(
            anchor,
            {"mine": specialist},
            # Each value is whatever Hugging Face accepts: "cpu", 0, "cuda:1", "auto", a layer map.
            device_map=dict(zip(["anchor", "mine"], chosen.devices, strict=True)),
            dtype={"anchor": "float32", "mine": "bfloat16"},
            alignment="auto" if chosen.models else "shared",  # the tiny ones have no tokenizers
        )
        for name, part in model.models.items():
            kind = part.config.model_type
            print(
                f"{name}: {kind}, {part.config.num_hidden_layers} blocks on {part.device} as {part.dtype}"
            )
        print("they meet at blocks", model.sites)
        tokens = model.dummy_inputs["input_ids"][:1].to(model.device)
        print(
            "next tokens:",
            model.generate(tokens, max_new_tokens=5, do_sample=False)[0, -5:].tolist(),
        )


def make(folder: str, kind: str) -> Path:
    """Writes a tiny random model."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 128}
    config = AutoConfig.for_model(kind, **sizes, **heads)
    path = Path(folder) / kind
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


if __name__ == "__main__":
    main()
