"""An ensemble that sees and hears, and files to show it."""

import io
import wave

import numpy
from PIL import Image
from transformers import Wav2Vec2FeatureExtractor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import rc_agents
from tests.eyes import SIZE, tiny_encoder
from tests.tiny import tiny
from tests.tiny_tokenizers import tiny_tokenizer

RATE = 16_000


def image_processor():
    return ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})


def processors():
    return {"eye": image_processor(), "ear": Wav2Vec2FeatureExtractor(sampling_rate=RATE)}


def ensemble(**names):
    """A tiny language model with a specialist in tokens of its own and encoders whose bridges speak."""
    names = names or {"eye": "vit", "ear": "wav2vec2"}
    tokenizers = {"anchor": tiny_tokenizer("prose"), "code": tiny_tokenizer("code")}
    anchor, code = (tiny("llama", vocab_size=len(one)) for one in tokenizers.values())
    eyes = {name: tiny_encoder(kind) for name, kind in names.items()}
    model = rc_agents.couple(
        anchor,
        {"code": code, **eyes},
        tokenizers=tokenizers,
        topology="unilateral",
        sites=2,
        bridge={"start": "default", "gate": "fixed"},
    )
    model.generation_config.eos_token_id = None
    return model


def picture(seed=0, size=(40, 30), kind="PNG"):
    """A file's bytes."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=numpy.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def sound(count=400, rate=RATE, channels=1, width=2):
    """A WAV file's bytes."""
    values = numpy.random.default_rng(count).integers(-9000, 9000, count * channels, dtype="<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(values.tobytes()[: count * channels * width])
    return file.getvalue()
