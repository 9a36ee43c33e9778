"""Pictures and sounds in the parts of a chat's messages."""

from __future__ import annotations

import base64
import binascii
import io
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..alignment.renderings import Message
from ..errors import InputError

PICTURE, SOUND = "picture", "sound"
MODALITIES = {PICTURE: "image", SOUND: "audio"}
"""Their names in the lists of what a model takes, as hubs and routers write them."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Of pictures; Pillow knows others, which nobody needs here and whose decoders are less looked at."""
MOST_PIXELS = 20_000_000
"""Of a picture, as a small file may say that it is a huge one."""
MOST_LENGTHS = 20
"""How often a picture's longer side may hold its shorter one: processors scale the shorter one up."""
MOST_SECONDS = 60
"""Of a sound, as encoders compare all of its moments with one another."""


class Media(NamedTuple):
    """A picture or a sound.

    Attributes:
        kind: `PICTURE` or `SOUND`.
        data: bytes of a file, its `Path` (never a string, as a client could send one), a picture of Pillow's, or a
            sound's samples, (samples,).
    """

    kind: str
    data: Any


def split(messages: Any) -> tuple[Any, list[Media]]:
    """Returns messages whose content is text alone, and what their parts show.

    Args:
        messages: a chat, in which a content may be a list of parts: `{"type": "text", "text": ...}`, OpenAI's
            `image_url` (a data URL) and `input_audio` (WAV), `{"type": "image", "image": ...}` and
            `{"type": "audio", "audio": ...}` with what `Media` holds.

    Raises:
        InputError: a part of another type, or a malformed one.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return messages, []  # the renderer says what is wrong
    found: list[Media] = []
    texts: list[Message] = []
    for one in messages:
        parts = one.get("content") if isinstance(one, Mapping) else None
        if isinstance(parts, (list, tuple)):
            read = [_part(part) for part in parts]
            found += [part for part in read if isinstance(part, Media)]
            one = {**one, "content": "".join(part for part in read if isinstance(part, str))}
        texts.append(one)
    return texts, found


def lines(parts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns a message's parts, in which every text behind another begins a line of its own.

    For frameworks whose parts hold a text each; OpenAI's are pieces of one, which `split` joins as they are.
    """
    found: list[Mapping[str, Any]] = []
    for part in parts:
        if part["type"] == "text" and any(one["type"] == "text" for one in found):
            part = {**part, "text": "\n" + part["text"]}
        found.append(part)
    return found


def _part(part: Any) -> str | Media:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind not in ("text", "image_url", "input_audio", "image", "audio"):
        raise InputError(
            f"a content part is text, a picture or a sound, got one of type {kind!r:.60}; leave it out"
        )
    value = part.get(kind)
    if kind == "text" and isinstance(value, str):
        return value
    if kind == "image_url":
        return Media(PICTURE, _of_url(value.get("url") if isinstance(value, Mapping) else value))
    if kind == "input_audio":
        return Media(SOUND, _of_openai(value))
    if kind == "text" or value is None or isinstance(value, str):
        wanted = {"text": "a string", "image": "bytes, a Path or an image of Pillow's"}.get(
            kind, "bytes, a Path or samples"
        )
        raise InputError(
            f'a content part of type "{kind}" needs {wanted} under "{kind}", got {value!r:.60}'
        )
    return Media(PICTURE if kind == "image" else SOUND, value)


def _of_url(url: Any) -> bytes:
    head, _, body = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
        raise InputError(
            f"image_url is a data URL, data:image/png;base64,...; nothing is fetched from elsewhere, got {url!r:.60}"
        )
    return _of_base64(body, "image_url")


def _of_openai(value: Any) -> bytes:
    if not isinstance(value, Mapping) or value.get("format") != "wav":
        given = value.get("format") if isinstance(value, Mapping) else value
        raise InputError(
            f'input_audio is {{"data": base64, "format": "wav"}}, got the format {given!r:.60}'
        )
    return _of_base64(value.get("data"), "input_audio")


def _of_base64(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise InputError(f"{where} holds no base64 (in one line): {error}") from error


def pillow() -> Any:
    """Returns Pillow's `Image`.

    Raises:
        InputError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("pictures need Pillow; pip install 'rc-agents[vision]'") from error
    return Image


def picture(data: Any) -> Any:
    """Returns a picture of Pillow's, in RGB.

    Raises:
        InputError: no picture, of another format than `FORMATS`, too large, or Pillow is missing.
    """
    image_module = pillow()
    given = type(data).__name__
    try:
        if isinstance(data, image_module.Image):
            return _rgb(data)
        with image_module.open(_file(data), formats=FORMATS) as image:
            return _rgb(image)
    except InputError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        image_module.DecompressionBombError,
    ) as error:
        raise InputError(
            f"a picture is a whole file ({', '.join(FORMATS)}), its bytes or an image of Pillow's; "
            f"what came ({given}) cannot be read"
        ) from error


def _rgb(image: Any) -> Any:
    width, height = image.size
    if width * height > MOST_PIXELS or max(width, height) > MOST_LENGTHS * min(width, height):
        raise InputError(
            f"a picture has at most {MOST_PIXELS:,} pixels and a side at most {MOST_LENGTHS} times the other, "
            f"got {width} x {height}; scale or cut it"
        )
    return image.convert("RGB")


def samples(data: Any, rate: int) -> Tensor:
    """Returns a sound's samples from -1 to 1, (samples,): several channels are averaged.

    Args:
        data: a WAV file of 16-bit samples, its bytes, or samples of that rate.
        rate: samples a second that are wanted.

    Raises:
        InputError: no such sound, one of another rate, or a very long one.
    """
    if not isinstance(data, (bytes, bytearray, Path)):
        return _bounded(_given(data), rate)
    try:
        with wave.open(_file(data)) as sound:
            width, channels, own = (
                sound.getsampwidth(),
                sound.getnchannels(),
                sound.getframerate(),
            )
            raw = sound.readframes(min(sound.getnframes(), MOST_SECONDS * own + 1))
    except (OSError, EOFError, RuntimeError, ValueError, wave.Error) as error:
        raise InputError(
            f"a sound is a WAV file, and this one cannot be read: {error!s:.80}"
        ) from error
    if width != 2 or own != rate:
        raise InputError(
            f"a sound has 16 bits a sample and {rate} samples a second here, got {8 * width} and {own}; convert it"
        )
    whole = len(raw) // (2 * channels) * channels
    if not whole:
        raise InputError("a sound has no samples")
    values = torch.frombuffer(bytearray(raw[: 2 * whole]), dtype=torch.int16)
    return _bounded(values.view(-1, channels).float().mean(1) / 32768, rate)


def _given(data: Any) -> Tensor:
    try:
        found = torch.as_tensor(data)
        real = found.dtype != torch.bool and not found.is_complex()
        found = found.to(torch.float32)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise InputError(f"a sound's samples are numbers, got {data!r:.60}") from error
    if found.dim() != 1 or not real or not bool(found.isfinite().all()):
        raise InputError(
            f"a sound's samples are finite numbers in one dimension, got shape {tuple(found.shape)}"
        )
    return found


def _bounded(found: Tensor, rate: int) -> Tensor:
    if not 0 < len(found) <= MOST_SECONDS * rate:
        raise InputError(
            f"a sound has up to {MOST_SECONDS} seconds, got {len(found)} samples at {rate} a second"
        )
    return found


def _file(data: Any) -> Any:
    if not isinstance(data, (bytes, bytearray, Path)):
        raise TypeError("neither bytes nor a Path")
    return io.BytesIO(data) if isinstance(data, (bytes, bytearray)) else str(data)
