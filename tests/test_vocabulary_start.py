"""Maps solved from output layers, against another solver, known norms, and what the ensemble then says."""

import pytest
import torch

import rc_agents
from rc_agents.errors import TrainingError
from rc_agents.training import vocabulary_start
from rc_agents.training.vocabulary_start import set_vocabulary_start
from rc_agents.training.warm_start import gather
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

OPEN = rc_agents.BridgeConfig(gate="fixed", start="zero")


def couple(anchor="llama", other="gpt2", sites=None, tokenizers=("prose", "prose"), bridge=OPEN):
    kinds = [tiny_tokenizer(name) for name in tokenizers]
    models = [
        tiny(name, vocab_size=len(kind), seed=place)
        for place, (name, kind) in enumerate(zip((anchor, other), kinds, strict=True))
    ]
    last = models[0].config.num_hidden_layers
    return rc_agents.couple(
        models[0],
        {"words": models[1]},
        topology="unilateral",
        sites=sites or [last],
        bridge=bridge,
        tokenizers={"anchor": kinds[0], "words": kinds[1]},
    )


def test_from_a_copy_of_the_anchor_it_is_the_identity():
    kind = tiny_tokenizer("prose")
    anchor = tiny("llama", vocab_size=len(kind))
    model = rc_agents.couple(
        anchor,
        {"words": anchor},
        topology="unilateral",
        sites=[anchor.config.num_hidden_layers],
        bridge=OPEN,
        tokenizers={"anchor": kind, "words": kind},
    )
    fits = gather(model, PROSE.splitlines(), progress=False)
    found = set_vocabulary_start(model, fits, scale=4.0, ridge=0.0)
    weight = model.bridge(("words", "anchor"), 0).map.weight
    assert found["words__anchor.0"] > 50
    torch.testing.assert_close(weight, 4.0 * torch.eye(len(weight)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("llama", lambda model: model.model.norm.weight),
        ("gemma3_text", lambda model: 1 + model.model.norm.weight),
        ("gpt2", lambda model: model.transformer.ln_f.weight),
        ("gpt_neox", lambda model: model.gpt_neox.final_layer_norm.weight),
    ],
)
def test_the_last_norms_weights_are_found_without_knowing_its_name(name, norm):
    model = tiny(name)
    with torch.no_grad():
        norm(model).detach()  # the parameter is there under this name
        for parameter_name, value in model.named_parameters():
            if parameter_name.endswith(
                ("model.norm.weight", "ln_f.weight", "final_layer_norm.weight")
            ):
                value.copy_(torch.linspace(0.5, 1.5, len(value)))
    found, centred = vocabulary_start.norm_weights(model, name)
    assert centred == (name in ("gpt2", "gpt_neox"))
    torch.testing.assert_close(found.float(), norm(model).detach().float(), rtol=1e-3, atol=1e-3)


def test_it_is_the_weighted_least_squares_solution_over_the_shared_tokens():
    model = couple()
    fits = gather(model, PROSE.splitlines(), progress=False)
    answer = PROSE.split()[1]
    set_vocabulary_start(model, fits, answers=[f" {answer}"], emphasis=2.0, scale=1.0, ridge=0.0)
    found = model.bridge(("words", "anchor"), 0).map.weight.double()
    anchor, other = (model.models[name] for name in ("anchor", "words"))
    kind = model.tokenizer
    special = set(kind.all_special_ids) - {kind.eos_token_id}
    ids = [token for token in range(len(kind)) if token not in special]
    a = anchor.lm_head.weight.double() * anchor.model.norm.weight.double()
    b = other.lm_head.weight.double() * other.transformer.ln_f.weight.double()
    b = b @ (torch.eye(b.shape[1]) - 1 / b.shape[1]).double()  # a layer norm hears no mean
    counts = torch.zeros(len(kind), dtype=torch.float64)
    for token in [*kind(f" {answer}", add_special_tokens=False).input_ids, kind.eos_token_id]:
        counts[token] += 1
    weights = (1 + 2.0 * len(ids) * counts[ids] / counts.sum()).sqrt()[:, None]
    ones = torch.ones(len(ids), 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([a[ids], ones], 1) * weights, b[ids] * weights).solution
    expected = solution[:-1]
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert cosine > 0.9999


def test_a_letter_is_matched_and_not_its_byte_whatever_the_order_of_the_vocabulary(monkeypatch):
    model = couple(other="llama", tokenizers=("prose", "metaspace"))
    tokenizer = model.tokenizers["words"]
    names = tokenizer.get_vocab()
    double = {text: token for text, token in names.items() if len(text) == 1 and text.isascii()}
    double = {text: token for text, token in double.items() if f"<0x{ord(text):02X}>" in names}
    assert double, "the tokenizer has no letter twice"
    for turn in (1, -1):
        turned = dict(sorted(names.items(), key=lambda one: turn * one[1]))
        monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self, found=turned: found)
        ids = vocabulary_start._Vocabulary(model, "words").ids
        assert all(ids[text.encode()] == token for text, token in double.items())


def test_its_size_is_that_of_the_targets_state_times_the_scale():
    model = couple(other="qwen2", tokenizers=("prose", "code"))
    fits = gather(model, PROSE.splitlines(), progress=False)
    set_vocabulary_start(model, fits, scale=3.0)
    sums = fits.sums[model.edges[0], 0]
    weight = model.bridge(("words", "anchor"), 0).map.weight.detach().double()
    size = (((weight @ sums.xx) * weight).sum() / sums.count / len(weight)).sqrt()
    assert float(size) == pytest.approx(3.0, rel=1e-4)


def test_the_anchor_says_what_the_specialist_says():
    model = couple(other="llama")
    anchor, other = (model.models[name] for name in ("anchor", "words"))
    width = anchor.config.hidden_size
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad():  # the same words, in a turned space
        other.lm_head.weight.copy_(anchor.lm_head.weight @ turn)
    fits = gather(model, PROSE.splitlines(), progress=False)
    set_vocabulary_start(model, fits, scale=1000.0, ridge=0.0)
    ids = model.tokenizer(PROSE[:200], return_tensors="pt").input_ids
    said = model(ids).logits.argmax(-1)
    meant = other(ids).logits.argmax(-1)
    own = model(ids, specialists=[]).logits.argmax(-1)
    agree, before = (float((one == meant).float().mean()) for one in (said, own))
    assert agree > 0.95
    assert before < 0.5


def test_what_it_cannot_do_is_said_in_one_line():
    early = couple(sites=[1])
    fits = gather(early, PROSE.splitlines(), progress=False)
    with pytest.raises(TrainingError, match="no site behind the last blocks"):
        set_vocabulary_start(early, fits)
    narrow = couple(
        bridge=rc_agents.BridgeConfig(kind="low_rank", rank=2, gate="fixed", start="default")
    )
    fits = gather(narrow, PROSE.splitlines(), progress=False)
    with pytest.raises(TrainingError, match="not a linear bridge"):
        set_vocabulary_start(narrow, fits)
