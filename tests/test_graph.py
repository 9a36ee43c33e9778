"""Feedforward graphs of frozen models: what goes through them, and that the models stay as they are."""

import json
import random
import xml.etree.ElementTree

import pytest
import torch

import rc_agents
from rc_agents import backbone, questions
from rc_agents import graph as graphs
from rc_agents.errors import RCError
from rc_agents.graph.published import KINDS, num_parameters, published_configs
from rc_agents.graph.start import _principal
from tests.graphs import PLAIN, TEXTS, on_disk, plain, small
from tests.tiny import tiny
from tests.tiny_tokenizers import tiny_tokenizer
from tests.virtual_device import virtual_devices

pytestmark = pytest.mark.tiny


def _scores(graph, texts=TEXTS, **options):
    with torch.no_grad():
        return graph(graph.read_texts(texts), **options).logits


# Its config.


def test_levels_follow_from_who_hears_whom():
    nodes = {
        "end": {"hears": ["middle", "first"]},
        "first": {},
        "middle": {"hears": "first"},
        "other": {},
    }
    config = graphs.GraphConfig.of({"nodes": nodes, "output": {"reads": ["end", "other"]}})
    assert config.levels == [["first", "other"], ["middle"], ["end"]]
    assert config.read == ("end", "other")
    assert config.heard == ("first", "middle")
    assert config.hearing == ("end", "middle")


def test_a_config_goes_through_yaml_and_json(tmp_path):
    import yaml

    config = graphs.GraphConfig.of(plain(latent={"aggregate": "attention"}))
    (tmp_path / "graph.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    assert graphs.GraphConfig.of(tmp_path / "graph.yaml") == config
    assert graphs.GraphConfig.of(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"nodes": {}}, "at least one node"),
        ({"nodes": {"a": {"hears": ["b"]}, "b": {"hears": ["a"]}}}, "no cycle.*a, b"),
        ({"nodes": {"a": {"hears": ["x"]}}}, "unknown node 'x'; known: a"),
        ({"nodes": {"a": {}, "b": {}}, "output": {"reads": ["b"]}}, "'a' reaches no output"),
        (
            {"nodes": {"a": {"pooling": "max"}}},
            "unknown pooling 'max'; known: last, mean, attention",
        ),
        ({"nodes": {"a": {"at": 1.5}}}, "share of the depth above 0 and up to 1.0, got 1.5"),
        ({"nodes": {"a": {"layer": True}}}, "layer is a block"),
        ({"nodes": {"a": {"hears": ["b", "b"]}, "b": {}}}, "hears another twice"),
        ({"nodes": {"a": {}}, "latent": {"width": 0}}, "latent width is a whole number above 0"),
        ({"nodes": {"a": {}}, "output": {"width": 10, "heads": 4}}, "multiple of its heads"),
        ({"nodes": {"a": {}}, "output": {"voice": "a"}}, "no meaning for readout='choice'"),
        ({"nodes": {"a": {}}, "outputs": {}}, "no field 'outputs'.*did you mean 'output'"),
        ({"nodes": {"a": {"model": 3}}}, "a node's model is an id"),
    ],
)
def test_a_config_that_cannot_work_is_refused_in_one_line(changed, message):
    with pytest.raises(RCError, match=message):
        graphs.GraphConfig.of(changed)


def test_a_file_that_is_no_graph_is_named(tmp_path):
    with pytest.raises(RCError, match="no graph can be read from"):
        graphs.GraphConfig.of(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(RCError, match="holds no mapping"):
        graphs.GraphConfig.of(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(schedule="later"), "unknown schedule 'later'"),
        (lambda: graphs.build({"nodes": {"a": {}}}), "node 'a' names no model"),
        (lambda: graphs.build(PLAIN, {"z": None}), "models names an unknown node 'z'"),
        (
            lambda: small(plain(nodes={"c": {"hears": ["a", "b"], "at": 5}})),
            "node 'c' hears behind block 5 and is read behind block 5 of 5",
        ),
        (
            lambda: small(plain(nodes={"c": {"hears": ["a", "b"], "at": 9}})),
            "node 'c': at=9.*1 to 5",
        ),
    ],
)
def test_a_graph_that_cannot_be_built_is_refused_in_one_line(call, message):
    with pytest.raises(RCError, match=message):
        call()


# A pass.


def test_models_stay_frozen_and_edges_learn():
    graph = small()
    before = {name: backbone.weights_hash(node.model) for name, node in graph.nodes.items()}
    trained = dict(graph.trainable_parameters())
    assert trained
    assert not any(name.startswith("lm_") for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    labels = torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(3):
        output = graph.train()(graph.read_texts(TEXTS), labels=labels)
        losses.append(output.loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
    assert losses[2] < losses[0]
    assert before == {name: backbone.weights_hash(node.model) for name, node in graph.nodes.items()}
    assert not any(node.model.training for node in graph.nodes.values())


@pytest.mark.parametrize("position", ["last", "all"])
@pytest.mark.parametrize(
    ("pooling", "aggregate"), [("last", "mean"), ("mean", "attention"), ("attention", "attention")]
)
def test_a_batch_gives_what_single_texts_give(aggregate, pooling, position):
    judge = {"hears": ["a", "b"], "at": 2, "pooling": pooling, "position": position}
    graph = small(plain(nodes={"c": judge}, latent={"aggregate": aggregate}))
    together = _scores(graph)
    apart = torch.cat([_scores(graph, [text]) for text in TEXTS])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    with graph.scheduled("threads"):
        assert torch.equal(_scores(graph), together)


def test_level_two_without_strength_is_the_frozen_model():
    quiet = {"hears": ["a", "b"], "at": 2, "strength": 0.0}
    graph = small(plain(nodes={"c": quiet}))
    batch = graph.read_texts(TEXTS)
    alone = []
    blocks = backbone.find_blocks(graph.nodes["c"].model)
    handle = blocks[-1].register_forward_hook(lambda module, args, output: alone.append(output))
    with torch.no_grad():
        graph.nodes["c"].model(**graph.nodes["c"].arguments(batch["c"]))
        handle.remove()
        shown = graph(batch).signals.shown["c"]
    last = alone[0][0] if isinstance(alone[0], tuple) else alone[0]
    assert torch.equal(shown, last[:, -1])


def test_a_node_that_hears_at_its_last_token_changes_no_other():
    graph = small()
    batch = graph.read_texts(TEXTS)
    node = graph.nodes["c"]
    with torch.no_grad():
        quiet, _ = node.states(batch["c"], lambda heard: torch.zeros_like(heard))
        loud, _ = node.states(batch["c"], lambda heard: torch.ones_like(heard))
    assert torch.equal(quiet[:, :-1], loud[:, :-1])
    assert (quiet[:, -1] - loud[:, -1]).abs().min(0).values.max() > 0


def test_a_source_reaches_only_those_that_hear_it():
    nodes = {"c": {"hears": ["a"], "at": 2}, "d": {"hears": ["b"], "at": 3}}
    graph = small(plain(nodes=nodes))
    batch = graph.read_texts(TEXTS)
    with torch.no_grad():
        whole = graph(batch).signals
        cut = graph(batch, without=["a"]).signals
    assert not torch.equal(whole.shown["c"], cut.shown["c"])
    assert torch.equal(whole.shown["d"], cut.shown["d"])


def test_three_levels_deep():
    nodes = {"c": {"hears": ["a", "b"], "at": 2}, "d": {"hears": ["a", "c"], "at": 3}}
    graph = small(plain(nodes=nodes))
    assert graph.config.levels == [["a", "b"], ["c"], ["d"]]
    output = graph(graph.read_texts(TEXTS), labels=torch.tensor([0, 1, 2, 3]))
    output.loss.backward()
    assert output.routing.shape == (4, 4, 4, 1)
    assert graph.encode["b"].map.weight.grad.norm() > 0  # two frozen models above it


def test_the_mean_and_the_attention_that_has_learned_nothing_are_the_same():
    mean, attention = small(), small(plain(latent={"aggregate": "attention"}))
    torch.testing.assert_close(_scores(attention), _scores(mean), rtol=0, atol=1e-6)
    for query in (attention.hear["c"].aggregate.query, attention.hear["c"].aggregate.bias):
        torch.nn.init.normal_(query)
    assert not torch.allclose(_scores(attention), _scores(mean))


def test_bridges_without_a_latent_space():
    graph = small(plain(latent={"link": "direct"}))
    assert not graph.encode
    output = graph(graph.read_texts(TEXTS), labels=torch.tensor([0, 1, 2, 3]))
    output.loss.backward()
    assert all(one.grad is not None for _, one in graph.trainable_parameters())


def test_equal_models_share_their_weights(tmp_path):
    nodes = {"a": {}, "c": {"hears": ["a"], "at": 2}}
    one = on_disk(tmp_path, {"nodes": nodes, "latent": {"width": 8}, "output": {"width": 8}})
    place = one.members["a"].ref
    twin = graphs.build({"nodes": {"x": {"model": place}, "y": {"model": place, "hears": ["x"]}}})
    weights = [node.model.get_input_embeddings().weight for node in twin.nodes.values()]
    assert weights[0].data_ptr() == weights[1].data_ptr()
    assert twin.nodes["x"].model is not twin.nodes["y"].model


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "got one text: put it in a list"),
        ([], "no texts"),
        (["a", ""], "text 1 of node 'a' is ''"),
        ([3], "text 0 of node 'a' is 3"),
        ({"a": ["x"]}, "no texts for node 'b'"),
        ({"a": ["x"], "b": ["x"], "c": ["x", "y"], "d": ["x"]}, "as many texts as the others"),
        ({"z": ["x"]}, "unknown node 'z'"),
        (["word " * 400], "longer than the 256 that node"),
    ],
)
def test_texts_that_cannot_be_read_are_refused_in_one_line(texts, message):
    with pytest.raises(RCError, match=message):
        small().read_texts(texts)


def test_wrong_calls_are_refused_in_one_line():
    graph = small()
    with pytest.raises(RCError, match="make them with graph"):
        graph()
    with pytest.raises(RCError, match="unknown node 'z'"):
        graph(graph.read_texts(TEXTS), without=["z"])
    with pytest.raises(RCError, match="has no voice"):
        graph.generate(TEXTS)
    with pytest.raises(RCError, match="no questions"):
        graph.choose([])


def test_nodes_on_several_devices():
    expected = _scores(small())
    with virtual_devices(2) as devices:
        graph = small(
            device_map={"a": devices[0], "b": devices[1], "c": devices[1], "d": devices[0]}
        )
        assert graph.encode["a"].map.weight.device == devices[0]
        assert graph.hear["c"].map.weight.device == devices[1]
        batch = graph.read_texts(TEXTS)
        devices.transfers.clear()
        with torch.no_grad():
            found = graph(batch).logits
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)
        crossed = [one for one in devices.transfers if one.source.type == one.target.type == "vgpu"]
        assert {one.shape[-1] for one in crossed} <= {16, 40, 48, 32}
        assert all(len(one.shape) == 2 for one in crossed)  # pooled states, never whole texts


# A voice.


def _speaking(**options):
    return small(plain(output={"readout": "vocabulary", "width": 16}), **options)


def test_a_voice_that_hears_nothing_says_what_its_model_says():
    graph = _speaking()
    voice = graph.nodes[graph.config.voice]
    for name in graph.hear:
        torch.nn.init.zeros_(graph.hear[name].map.weight)
    batch = graph.read_texts(TEXTS)[graph.config.voice]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = voice.model.generate(**batch, **options)
    tokenizer = graph.members[graph.config.voice].tokenizer
    words = tokenizer.batch_decode(
        alone[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert graph.generate(TEXTS, **options) == words


@pytest.mark.parametrize("beams", [1, 3])
def test_a_voice_says_the_same_alone_and_in_a_batch(beams):
    graph = _speaking()
    torch.nn.init.normal_(graph.readout.out.weight, std=0.3)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    together = graph.generate(TEXTS, **options)
    assert together == [graph.generate([text], **options)[0] for text in TEXTS]
    assert together != graph.generate([TEXTS[1]] * 4, **options)


def test_cached_words_are_those_of_whole_passes():
    graph = _speaking()
    torch.nn.init.normal_(graph.readout.out.weight, std=0.3)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert graph.generate(TEXTS, **options) == graph.generate(TEXTS, use_cache=False, **options)


# Saved and loaded.


def test_a_saved_graph_answers_as_before(tmp_path):
    graph = on_disk(tmp_path / "models", plain(latent={"aggregate": "attention"}), seed=3)
    graph.temperature = 1.75
    graph.save_pretrained(tmp_path / "graph")
    loaded = graphs.LatentGraph.from_pretrained(tmp_path / "graph")
    assert torch.equal(_scores(loaded), _scores(graph))
    assert loaded.temperature == 1.75
    assert {file.name[:6] for file in (tmp_path / "graph").iterdir()} == {"graph.", "edges-"}


def test_what_is_wrong_with_a_saved_graph_is_said(tmp_path):
    graph = on_disk(tmp_path / "models")
    graph.save_pretrained(tmp_path / "graph")
    weights = next((tmp_path / "graph").glob("edges-*"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    with pytest.raises(RCError, match="truncated or altered"):
        graphs.load(tmp_path / "graph")
    weights.write_bytes(content)
    (tmp_path / "models/llama-prose/model.safetensors").write_bytes(
        (tmp_path / "models/llama-prose/model.safetensors").read_bytes() + b" "
    )
    (tmp_path / "graph/graph.json").write_text("{", encoding="utf-8")
    with pytest.raises(RCError, match=r"graph\.json is damaged"):
        graphs.load(tmp_path / "graph")
    with pytest.raises(RCError, match="no graph at"):
        graphs.load(tmp_path)
    with pytest.raises(RCError, match="was passed in loaded and has no path"):
        small().save_pretrained(tmp_path / "live")


def test_other_bases_are_refused(tmp_path):
    graph = on_disk(tmp_path / "models")
    graph.save_pretrained(tmp_path / "graph")
    other = tiny("llama", vocab_size=len(tiny_tokenizer("prose")), seed=9)
    other.save_pretrained(tmp_path / "models/llama-prose")
    with pytest.raises(RCError, match="were made for another 'a'"):
        graphs.load(tmp_path / "graph")
    assert graphs.load(tmp_path / "graph", check_fingerprints=False)


# The published form.


def test_the_published_form_trains_17_6_million_values():
    count = num_parameters(graphs.published(), published_configs())
    assert count == 17_567_744
    widths = [2048, 1536, 2304, 3072, 4096]
    edges = 1024 * sum(widths)
    output = 512 * (3072 + 4096) + 2 * 512 * 512 + 2 * 4 * 512
    assert count == edges + output  # counted by hand


def test_the_published_form_runs_on_its_five_architectures():
    tokenizers = {
        name: tiny_tokenizer(kind)
        for name, kind in zip(
            KINDS, ("code", "prose", "metaspace", "metaspace", "code"), strict=True
        )
    }
    models = {name: tiny(arch, vocab_size=len(tokenizers[name])) for name, arch in KINDS.items()}
    config = graphs.published(latent_width=16, output_width=16)
    graph = graphs.build(config, models, tokenizers=tokenizers)
    assert graph.config.levels == [["llama", "qwen", "gemma"], ["phi", "mistral"]]
    asked = [
        questions.Question(f"What is {n}?", ("one", "two", "three", "four"), n % 4)
        for n in range(12)
    ]
    before = graph.encode["gemma"].map.weight.clone()
    settings = graphs.GraphTrainConfig(steps=4, batch_size=4, learning_rate=1e-3, log_steps=1)
    done = graphs.train(graph, asked, config=settings, progress=False)
    assert done.trained_parameters == graph.num_trainable()
    assert not torch.equal(before, graph.encode["gemma"].map.weight)
    assert all(0 < entry["gradient/encode/llama"] < 100 for entry in done.history)
    choices = graph.choose(asked[:3])
    assert all(abs(sum(one.probabilities) - 1) < 1e-5 for one in choices)
    assert choices[0].text in asked[0].choices
    assert set(choices[0].routing) == {"phi", "mistral"}


# A start in closed form.


def test_a_ridge_start_makes_a_copy_of_the_target_speak_its_language():
    tokenizer = tiny_tokenizer("prose")
    nodes = {"a": {"layer": 2}, "e": {"hears": ["a"], "at": 2}}
    config = {"nodes": nodes, "latent": {"width": 32}, "output": {"width": 16}}
    model = tiny("llama", vocab_size=len(tokenizer))
    graph = graphs.build(
        config, {"a": model, "e": model}, tokenizers=dict.fromkeys(nodes, tokenizer)
    )
    rng = random.Random(0)
    words = TEXTS[2].split()
    asked = graphs.ask(
        graph.config,
        [
            questions.Question(" ".join(rng.choices(words, k=9)), ("yes", "no", "why", "who"), 0)
            for _ in range(80)
        ],
    )
    started = graphs.ridge_start(graph, asked, strength=1e-6)
    assert started.encode["a"] > 0.99  # the source's state is the target's own
    assert started.hear["e"] > 0.99
    graph.encode["a"].map.weight.data.normal_()
    again = graphs.ridge_start(graph, asked, strength=1e-6)
    assert again == started


def test_principal_directions_span_the_states():
    states = torch.randn(50, 6) @ torch.diag(torch.tensor([9.0, 5.0, 3.0, 1.0, 0.1, 0.01]))
    code = _principal(states, 8)
    assert code.shape == (50, 8)
    assert code[:, 6:].abs().max() == 0
    covariance = code.T @ code
    assert (covariance - torch.diag(covariance.diag())).abs().max() < 1e-6 * covariance.max()
    assert covariance.diag()[0] == covariance.diag().max()


def test_a_ridge_start_needs_a_latent_space():
    with pytest.raises(RCError, match="this graph has none"):
        graphs.ridge_start(small(plain(latent={"link": "direct"})), [])
    with pytest.raises(RCError, match="got none"):
        graphs.ridge_start(small(), [])


# A picture.


def test_a_graph_is_drawn_with_all_its_nodes():
    for one in (small(), graphs.published()):
        picture = graphs.draw(one, {"c": 0.75, "d": 0.25})
        root = xml.etree.ElementTree.fromstring(picture)
        words = "".join(root.itertext())
        config = one if isinstance(one, graphs.GraphConfig) else one.config
        assert all(name in words for name in config.nodes)
    assert "75%" in graphs.draw(small(), {"c": 0.75, "d": 0.25})


def test_names_are_escaped_in_a_picture():
    config = graphs.GraphConfig.of({"nodes": {"a": {"model": "<script>&"}}})
    assert "<script>&" not in graphs.draw(config)


def test_the_public_name_is_there():
    assert rc_agents.LatentGraph is graphs.LatentGraph


def test_a_member_says_letters_by_its_own_output_layer(tmp_path):
    nodes = {"a": {}}
    graph = small({"nodes": nodes, "output": {"readout": "head", "width": 4}})
    question = questions.Question("Which one is it?", ("this", "that", "those"), 1)
    found = graphs.letter_probabilities(graph, "a", graphs.ask(graph.config, [question]))[0]
    batch = graph.read_texts([questions.lettered(question)])["a"]
    logits = graph.nodes["a"].model(**batch).logits[0, -1]
    tokenizer = graph.members["a"].tokenizer
    ids = [tokenizer(f" {one}", add_special_tokens=False).input_ids[-1] for one in "ABC"]
    assert found == pytest.approx(logits[ids].softmax(-1).tolist(), abs=1e-5)
    with pytest.raises(RCError, match="says letters only where"):
        graphs.letter_probabilities(small(), "c", [])


def test_a_member_weighs_answers_by_their_mean_log_probability():
    graph = small()
    question = questions.Question("Which one is it?", ("this", "that one", "those"), 1)
    found = graphs.answer_probabilities(graph, "c", [question, question])
    tokenizer, model = graph.members["c"].tokenizer, graph.nodes["c"].model
    asked = tokenizer(questions.unanswered(question)).input_ids
    means = []
    for text in questions.answered(question):
        ids = tokenizer(text).input_ids
        assert ids[: len(asked)] == asked
        rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        said = rows[torch.arange(len(ids) - 1), ids[1:]][len(asked) - 1 :]
        means.append(said.mean())
    expected = torch.stack(means).softmax(-1).tolist()
    assert found == [pytest.approx(expected, abs=1e-5)] * 2


def test_a_model_in_two_graphs_hears_in_one_alone():
    tokenizer = tiny_tokenizer("prose")
    model = tiny("llama", vocab_size=len(tokenizer))
    config = {"nodes": {"x": {}, "y": {"hears": ["x"], "at": 2}}, "output": {"width": 8}}
    first, second = (
        graphs.build(
            config, {"x": model, "y": model}, tokenizers=dict.fromkeys("xy", tokenizer), seed=seed
        )
        for seed in (0, 1)
    )
    expected = _scores(first)
    _scores(second)
    assert torch.equal(_scores(first), expected)
    assert not torch.equal(_scores(second), expected)
