"""Pictures and sounds in prompts: what the service shows to encoders, and what rows that join others see."""

import base64
import functools
import io
import json
import wave
from dataclasses import replace

import numpy
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from langchain_core.messages import HumanMessage
from PIL import Image
from rc_agents.adapters.langchain import ChatCoupled
from rc_agents.adapters.server import create_app
from transformers import Wav2Vec2FeatureExtractor

import rc_agents
from rc_agents.cli import run
from rc_agents.service import GenerationParams, GenerationService, Request
from tests.eyes import tiny_encoder
from tests.sensing import RATE, ensemble, image_processor, picture, processors, sound
from tests.tiny import tiny
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.tiny
GREEDY = GenerationParams(max_new_tokens=10, temperature=0.0, logprobs=0)


@functools.cache
def service():
    return GenerationService(ensemble(), processors())


def url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def seen(data, text="What is here?"):
    return {"type": "image_url", "image_url": {"url": url(data)}}, {"type": "text", "text": text}


def heard(data, text="x"):
    part = {"data": base64.b64encode(data).decode(), "format": "wav"}
    return {"type": "input_audio", "input_audio": part}, {"type": "text", "text": text}


def chat(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_a_chat_with_a_picture_is_answered_as_generate_answers_it():
    asked = service()
    model = asked.model
    prompt = asked.render(chat(*seen(picture())))
    bare = asked.render([{"role": "user", "content": "What is here?"}])
    assert prompt == bare  # the tokens of the text alone
    inputs = model.chat_inputs([{"role": "user", "content": "What is here?"}])
    pixels = image_processor()(Image.open(io.BytesIO(picture())), return_tensors="pt")
    expected = model.generate(**inputs, **pixels, max_new_tokens=10, do_sample=False)
    new = expected[0, inputs["input_ids"].shape[1] :]
    found = asked.generate(prompt, GREEDY)
    assert [one.token for one in found.tokens] == new.tolist()
    assert found.text != asked.generate(bare, GREEDY).text
    again = asked.converse(chat(*seen(picture()))).prompt
    assert torch.equal(again.sources["eye"]["pixel_values"], pixels["pixel_values"])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_form_of_a_picture_is_the_same_picture(kind, tmp_path):
    asked, data = service(), picture(kind=kind)
    (tmp_path / "it").write_bytes(data)
    forms = [data, bytearray(data), tmp_path / "it", Image.open(io.BytesIO(data))]
    parts = [[{"type": "image", "image": one}] for one in forms]
    found = [asked.encode("x", one).sources for one in [*parts, [seen(data)[0]]]]
    assert all([*one] == ["eye"] for one in found)
    for one in found[1:]:
        assert torch.equal(one["eye"]["pixel_values"], found[0]["eye"]["pixel_values"])


def test_a_sound_of_two_channels_is_their_mean_and_samples_are_taken_as_they_are():
    asked = service()
    with wave.open(io.BytesIO(sound(channels=2))) as file:
        raw = numpy.frombuffer(file.readframes(400), dtype="<i2").reshape(-1, 2)
    samples = raw.mean(1).astype("float32") / 32768
    found = asked.encode("x", [heard(sound(channels=2))[0]]).sources["ear"]["input_values"]
    same = asked.encode("x", [{"type": "audio", "audio": samples}]).sources["ear"]["input_values"]
    assert found.shape == (1, 400)
    torch.testing.assert_close(found, same)


def mixed(asked):
    """Prompts with and without pictures and sounds, of which no two sounds are of a length."""
    return [
        asked.render(chat(*seen(picture(1)))),
        asked.encode("The people"),
        asked.encode("Some of them said", [heard(sound(400))[0], seen(picture(2))[0]]),
        asked.render(chat(*heard(sound(260), "Where is the river?"))),
        asked.encode("x", [{"type": "image", "image": picture(3)}]),
    ]


def close(found, alone):
    for one, other in zip(found, alone, strict=True):
        assert replace(one, tokens=()) == replace(other, tokens=())
        for token, expected in zip(one.tokens, other.tokens, strict=True):
            assert token.token == expected.token
            assert token.logprob == pytest.approx(expected.logprob, abs=2e-4)


def test_a_batch_is_its_rows_one_by_one():
    asked = service()
    prompts = mixed(asked)
    alone = [asked.generate(one, GREEDY) for one in prompts]
    assert len({one.text for one in alone}) == len(alone)
    close(asked.batch(prompts, GREEDY), alone)
    close(asked.batch(prompts[:2] + prompts[4:], GREEDY), alone[:2] + alone[4:])


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 2, 4, 1, 0)])
def test_rows_that_join_see_and_hear_what_they_would_alone(order):
    asked = service()
    prompts = [mixed(asked)[place] for place in order]
    params = [
        replace(GREEDY, max_new_tokens=6 + 3 * place, specialists=names)
        for place, names in enumerate([None, ["eye"], None, ["ear", "code"], []])
    ]
    alone = [asked.generate(*pair) for pair in zip(prompts, params, strict=True)]
    found, steps = {}, []

    def joins(running):
        steps.append(running)
        due = {1: (0, 1), 3: (2, 3), 6: (4,)}.get(len(steps), ())
        return [
            Request(
                prompt=prompts[place],
                params=params[place],
                ended=lambda result, place=place: found.__setitem__(place, result),
            )
            for place in due
        ]

    asked.continuous(joins)
    close([found[place] for place in range(5)], alone)


def test_a_prompts_own_probabilities_know_what_it_shows():
    asked = service()
    params = GenerationParams(logprobs=0)
    shown, bare = (asked.encode("The people", parts) for parts in ([seen(picture())[0]], []))
    one, other = (asked.score(prompt, params) for prompt in (shown, bare))
    assert [token.token for token in one] == [token.token for token in other]
    assert [token.logprob for token in one[1:]] != [token.logprob for token in other[1:]]


def test_a_processor_is_found_beside_its_encoder_and_saved_with_it(tmp_path):
    tiny_encoder("vit").save_pretrained(tmp_path / "eye")
    image_processor().save_pretrained(tmp_path / "eye")
    model = rc_agents.couple(
        tiny("llama", vocab_size=len(tiny_tokenizer("prose"))),
        {"eye": tmp_path / "eye"},
        tokenizers={"anchor": tiny_tokenizer("prose")},
        topology="unilateral",
        sites=2,
    )
    given = GenerationService(model).encode("x", [seen(picture())[0]]).sources
    model.save_pretrained(tmp_path / "saved", include_bases=True)
    (tmp_path / "eye").rename(tmp_path / "gone")
    loaded = GenerationService.of(tmp_path / "saved").encode("x", [seen(picture())[0]]).sources
    expected = image_processor()(Image.open(io.BytesIO(picture())), return_tensors="pt")
    for one in (given, loaded):
        assert torch.equal(one["eye"]["pixel_values"], expected["pixel_values"])


def test_the_command_line_shows_files(tmp_path, capsys):
    model = ensemble(eye="vit")
    model.save_pretrained(tmp_path / "saved", include_bases=True)
    (place,) = (tmp_path / "saved" / "bases").glob("eye-*")
    image_processor().save_pretrained(place)
    (tmp_path / "it.png").write_bytes(picture())
    limit = ["--max-new-tokens", "10", "--temperature", "0"]
    shown = ["--show", str(tmp_path / "it.png")]
    asked = GenerationService(model, {"eye": image_processor()})
    for words, prompt in (
        (limit, asked.encode("Hi")),
        ([*limit, *shown], asked.encode("Hi", [seen(picture())[0]])),
        ([*limit, *shown, "--chat"], asked.render(chat(*seen(picture(), "Hi")))),
    ):
        assert run(["generate", str(tmp_path / "saved"), "Hi", *words]) == 0
        assert capsys.readouterr().out == asked.generate(prompt, GREEDY).text + "\n"


def test_a_chat_shows_files(tmp_path, capsys, monkeypatch):
    model = ensemble(eye="vit")
    model.save_pretrained(tmp_path / "saved", include_bases=True)
    (place,) = (tmp_path / "saved" / "bases").glob("eye-*")
    image_processor().save_pretrained(place)
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    asked = GenerationService(model, {"eye": image_processor()})
    turns, expected = [], []
    for text, part in (("Hi", seen(picture(1))[:1]), ("Ho", seen(picture(2))[:1]), ("Hm", ())):
        prompt = asked.render([*turns, *chat(*part, {"type": "text", "text": text})])
        found = asked.generate(prompt, GREEDY).text
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": found}]
        expected.append(found)
    wrong = [
        f"/show {one}" for one in (tmp_path, tmp_path / "none.png", "~nobody-here/x", "x" * 300)
    ]
    lines = ["Hi", f"/show {tmp_path / '2.png'}", *wrong, "Ho"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "/show", "Hm", ""])))
    words = ["chat", str(tmp_path / "saved"), "--show", str(tmp_path / "1.png"), "--json"]
    assert run([*words, "--max-new-tokens", "10", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["text"] for line in out.splitlines()] == expected
    assert err.count("error: ") == err.count(" is no file") == 4
    assert [line for line in err.splitlines() if line.startswith("shown")] == [
        f"shown: {tmp_path / '2.png'}",
        "shown: nothing",
    ]
    (tmp_path / "no.wav").write_bytes(sound())
    assert run([*words[:2], "--show", str(tmp_path / "no.wav")]) != 0
    assert "no model of this ensemble takes a sound" in capsys.readouterr().err


def broken():
    """A WAV file whose first part says that it is longer than the file."""
    data = bytearray(sound(40))
    data[17] = 0x14
    return data


def wide():
    """A small file that says it is a huge picture."""
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"type": "video", "video": 1}], "a picture or a sound, got one of type 'video'"),
        ([3], "got one of type 'int'"),
        ([{"type": "text", "text": 3}], 'of type "text" needs a string'),
        ([{"type": "image", "image": "/etc/hostname"}], "needs bytes, a Path or an image"),
        ([{"type": "audio", "audio": "/etc/hostname"}], "needs bytes, a Path or samples"),
        ([{"type": "image"}], "needs bytes, a Path or an image"),
        (
            [{"type": "image", "image": 3}],
            "a picture is a whole file .* what came .int. cannot be read",
        ),
        ([{"type": "image", "image": b"GIF"}], "a picture is a whole file"),
        ([{"type": "image", "image": picture()[:200]}], "a picture is a whole file"),
        ([{"type": "image", "image": picture(kind="TIFF")}], "a picture is a whole file"),
        ([{"type": "image", "image": wide()}], "at most 20,000,000 pixels .* got 9000 x 9000"),
        ([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}], "nothing is fetched"),
        ([{"type": "image_url", "image_url": {"url": "file:///x.png"}}], "nothing is fetched"),
        ([{"type": "image_url", "image_url": None}], "nothing is fetched"),
        ([{"type": "image_url", "image_url": "data:image/png;base64,%"}], "holds no base64"),
        ([seen(picture())[0]] * 2, "one picture a conversation, got 2"),
        ([{"type": "input_audio", "input_audio": {"data": "", "format": "mp3"}}], "format 'mp3'"),
        ([{"type": "input_audio", "input_audio": None}], "format None"),
        ([heard(b"RIFF")[0]], "a sound is a WAV file"),
        ([heard(sound(rate=8000))[0]], "16000 samples a second here, got 16 and 8000"),
        ([heard(sound(width=1))[0]], "got 8 and 16000"),
        ([heard(sound(0))[0]], "a sound has no samples"),
        ([{"type": "audio", "audio": numpy.zeros((2, 9))}], "one dimension"),
        ([{"type": "audio", "audio": numpy.zeros(RATE * 61)}], "up to 60 seconds"),
        ([{"type": "image", "image": picture(size=(1, 2000))}], "20 times the other, got 1 x 2000"),
        ([heard(bytes(broken()))[0]], "this one cannot be read"),
        ([heard(sound(5))[0]], "hears from [0-9]+ samples on, got 5"),
        ([{"type": "audio", "audio": [[1], [2, 3]]}], "samples are numbers"),
        ([{"type": "audio", "audio": [10**400]}], "samples are numbers"),
        ([{"type": "audio", "audio": {"a": 1}}], "samples are numbers"),
        ([{"type": "audio", "audio": [1e400] * 400}], "finite numbers"),
        ([{"type": "x" * 5000}], "got one of type 'xxx"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(parts, message):
    with pytest.raises(rc_agents.RCError, match=message) as caught:
        service().render(chat(*parts))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(2))
def test_broken_files_are_read_or_refused(seed):
    asked, draw = service(), numpy.random.default_rng(seed)
    for file, part in [(sound(300), heard), *((picture(kind=k), seen) for k in ("PNG", "GIF"))]:
        refused = 0
        for _ in range(40):
            data = bytearray(file)
            for place in draw.integers(0, min(len(data), 60), 2):
                data[place] = draw.integers(0, 256)
            try:
                asked.encode("x", [part(bytes(data))[0]])
            except rc_agents.RCError:
                refused += 1
        assert refused > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["eye"], "processors is a mapping"),
        ({"code": image_processor()}, "'code', which is no encoder"),
        ({"eye": None}, "processor of 'eye' is its image processor, got NoneType"),
        ({"ear": image_processor()}, "processor of 'ear' is its feature extractor, got ViTImage"),
        ({"eye": Wav2Vec2FeatureExtractor()}, "is its image processor, got Wav2Vec2Feature"),
    ],
)
def test_what_is_no_processor_is_refused_at_once(given, message):
    with pytest.raises(rc_agents.RCError, match=message):
        GenerationService(ensemble(), given)


def test_a_processor_that_fails_says_so_in_one_line():
    def failing(image, return_tensors):
        raise ValueError("first\nsecond")

    asked = GenerationService(ensemble(), {"eye": failing})
    with pytest.raises(rc_agents.RCError, match=r"the processor of .eye. failed: first$"):
        asked.encode("x", [seen(picture())[0]])
    assert [*asked.blind()] == ["ear"]


@pytest.mark.parametrize("parts", [{"type": "image"}, b"x", [{"type": "text", "text": "x"}]])
def test_what_is_no_list_of_pictures_is_not_dropped(parts):
    with pytest.raises(rc_agents.RCError, match="parts is a list of pictures and sounds"):
        service().encode("x", parts)


def test_who_takes_a_picture_and_by_what_is_said():
    with pytest.raises(rc_agents.RCError, match="no model of this ensemble takes a sound"):
        GenerationService(ensemble(eye="vit")).encode("x", [heard(sound())[0]])
    with pytest.raises(rc_agents.RCError, match=r"'eye' was passed in loaded.*processors=\{'eye'"):
        GenerationService(ensemble(eye="vit")).encode("x", [seen(picture())[0]])
    with pytest.raises(rc_agents.RCError, match="'code', which is no encoder"):
        GenerationService(ensemble(eye="vit"), {"code": image_processor()})


def test_only_what_can_be_shown_is_told():
    model = ensemble()
    assert GenerationService(model).modalities() == ["text"]  # no processor anywhere
    assert GenerationService(model, {"ear": processors()["ear"]}).modalities() == ["text", "audio"]
    assert service().modalities(["eye", "code"]) == ["text", "image"]


def test_a_service_is_taken_as_it_is():
    assert GenerationService.of(service()) is service()
    for held in (service(), service().model):
        with pytest.raises(rc_agents.RCError, match="'dtype' is for loading"):
            GenerationService.of(held, dtype="float16")
    with pytest.raises(rc_agents.RCError, match="processors come with a service"):
        GenerationService.of(service(), processors=processors())


def test_a_server_is_shown_pictures_by_openais_own_sdk(tmp_path):
    model = ensemble()
    app = create_app(model, processors=processors())
    expected = GenerationService(model, processors()).generate(chat(*seen(picture())), GREEDY)
    with TestClient(app) as http:
        client = openai.OpenAI(api_key="-", base_url="http://testserver/v1", http_client=http)

        def ask(*parts, **more):
            found = client.chat.completions.create(
                model="rc", messages=chat(*parts), max_tokens=10, temperature=0, **more
            )
            return found.choices[0].message.content

        listed = {one.id: one.input_modalities for one in client.models.list()}
        assert listed["rc"] == ["text", "image", "audio"]
        assert listed["rc:eye"] == ["text", "image"]
        assert listed["rc:none"] == listed["rc:code"] == ["text"]
        assert ask(*seen(picture())) == expected.text
        assert ask(*seen(picture(1))) != expected.text
        assert ask(*heard(sound(), "What is here?")) != expected.text
        with pytest.raises(openai.BadRequestError, match="nothing is fetched from elsewhere"):
            ask({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}})
        with pytest.raises(openai.BadRequestError, match="needs bytes, a Path or an image"):
            ask({"type": "image", "image": str(tmp_path)})


def test_langchain_shows_pictures_in_every_form_that_it_has():
    model = ensemble()
    expected = GenerationService(model, processors()).generate(chat(*seen(picture())), GREEDY)
    asked = ChatCoupled(model=model, processors=processors(), temperature=0, max_tokens=10)
    raw = base64.b64encode(picture()).decode()
    forms = [
        seen(picture())[0],
        {"type": "image", "base64": raw, "mime_type": "image/png"},
        {"type": "image", "source_type": "base64", "data": raw, "mime_type": "image/png"},
    ]
    for part in forms:
        message = HumanMessage([part, {"type": "text", "text": "What is here?"}])
        assert asked.invoke([message]).content == expected.text
    with pytest.raises(rc_agents.RCError, match="one picture a conversation"):
        asked.invoke([HumanMessage(forms)])
