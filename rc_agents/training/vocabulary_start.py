"""Bridges between models of different vocabularies, solved from their output layers alone.

Behind its last block a model says E S n(h): the norm n, its weights S = diag(s), the output layer E. Many texts are one
token in both vocabularies. A bridge behind the last blocks that makes the target say of them what the source says is

    W = argmin sum_t w_t |(E_i S_i)_t W - (E_j S_j)_t - c|^2 + lambda |W|^2,

over the shared tokens t, with c free, as a constant added to every logit says nothing. A layer norm takes the mean
away too, so the rows of its (E S) are taken without theirs. No example is needed: the map knows every shared word.
Text is read only to measure how large the source's states are. A regression of one model's states on the other's
(`warm_start`) carries nothing between such models (docs/log.md), since it weighs directions by their size and not by
what they say.

The weights w_t are 1, and more for the tokens that answers are made of; the ends of both models' answers count as one
token. Shapes: T tokens, D width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rc_agents.alignment.tokens import TokenBytes
from rc_agents.backbone import find_blocks
from rc_agents.bridges.linear import LinearMap
from rc_agents.errors import TrainingError
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import ANCHOR, Edge
from rc_agents.training.replay import Upper
from rc_agents.training.warm_start import Fits

BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
ROWS = 8192  # tokens taken in at a time
ELEMENTWISE = 1e-2  # relative error at which a final norm counts as a norm with weights


@torch.no_grad()
def set_vocabulary_start(
    model: CoupledForCausalLM,
    fits: Fits,
    *,
    edges: Sequence[Edge | tuple[str, str]] | None = None,
    answers: Iterable[str] = (),
    emphasis: float = 3.0,
    scale: float = 8.0,
    ridge: float = 1e-4,
) -> dict[str, int]:
    """Sets the bridges behind the last blocks so that the anchor says what a specialist says.

    Args:
        model: an ensemble of linear bridges that has such a site; bridges at other sites are left as they are.
        fits: what `warm_start.gather` returned for it, which says how large the specialist's states are.
        edges: the edges to set, all of which lead into the anchor; all that do where left out.
        answers: what the specialist shall say through the bridge, such as the completions of the training pairs.
        emphasis: weight of the answers' tokens and ends together, as a multiple of that of all shared tokens.
        scale: size of the update that a fully open gate lets through, as a multiple of the target's own state.
        ridge: lambda, as a share of the mean squared entry of the target's output layer.

    Returns:
        `source__target.site` -> tokens shared by both vocabularies.

    Raises:
        TrainingError: no site behind the last blocks, another kind of bridge, a model whose last states do not reach
            its output layer through a norm alone, no tokenizer, or no shared token.
    """
    chosen = [Edge(*edge) for edge in edges] if edges is not None else list(model.edges)
    chosen = [edge for edge in chosen if edges is not None or edge.target == ANCHOR]
    found = {}
    for edge in chosen:
        site = last_site(model, edge)
        weight, found[f"{edge.key}.{site}"] = vocabulary_map(
            model, edge, fits, answers=answers, emphasis=emphasis, scale=scale, ridge=ridge
        )
        bridge: Any = model.bridge(edge, site)
        bridge.map.weight.copy_(weight)
    return found


@torch.no_grad()
def vocabulary_map(
    model: CoupledForCausalLM,
    edge: Edge,
    fits: Fits,
    *,
    answers: Iterable[str] = (),
    emphasis: float = 3.0,
    scale: float = 8.0,
    ridge: float = 1e-4,
) -> tuple[Tensor, int]:
    """Returns the map (D_target, D_source) of one edge and how many tokens are shared; the bridge is left as it is.

    Arguments and errors as in `set_vocabulary_start`.
    """
    site = last_site(model, edge)
    source, target = (_Vocabulary(model, name) for name in (edge.source, edge.target))
    shared = _shared(source, target)
    if not shared:
        raise TrainingError(
            f"no token of {edge.source!r} is the same text as one of {edge.target!r}; use ridge instead"
        )
    sums = fits.sums[edge, site]
    if not sums.count:
        raise TrainingError("no states were gathered: the texts are shorter than what is skipped")
    weight = _solve(source, target, shared, _weights(target, shared, answers, emphasis), ridge)
    size = (((weight @ sums.xx) * weight).sum() / sums.count / len(weight)).sqrt()
    return weight * (scale / size), len(shared)


class _Vocabulary:
    """What a model says of a normal state: its output layer with the last norm's weights, and each token's text."""

    def __init__(self, model: CoupledForCausalLM, name: str) -> None:
        own = model.models[name]
        tokenizer = model.tokenizers.get(name)
        if tokenizer is None:
            raise TrainingError(
                f"the tokenizer of {name!r} is not known; pass tokenizers= to couple"
            )
        self.name, self.tokenizer = name, tokenizer
        self.end: int | None = tokenizer.eos_token_id
        self.head: Any = own.get_output_embeddings()
        if hasattr(self.head, "base_layer"):
            raise TrainingError(
                f"the output layer of {name!r} has an adapter on it; merge that into the model first"
            )
        self.scale_D, self.centred = norm_weights(own, name)
        pieces = TokenBytes(tokenizer, name).pieces
        special = set(tokenizer.all_special_ids)
        names = dict(zip(pieces, tokenizer.convert_ids_to_tokens(list(pieces)), strict=True))
        # A letter and the byte it is made of are two tokens of one text: the byte's is hardly ever used.
        order = sorted(pieces, key=lambda token: (bool(BYTE.fullmatch(names[token] or "")), token))
        self.ids: dict[bytes, int] = {}
        for token in order:
            if pieces[token] and token not in special and token < len(self.head.weight):
                self.ids.setdefault(pieces[token], token)

    def rows(self, tokens: Sequence[int]) -> Tensor:
        """Returns what a normal state is multiplied with for the logits of some tokens, (T, D) in float64."""
        chosen = torch.tensor(tokens, device=self.head.weight.device)
        rows_TD: Tensor = self.head.weight.detach()[chosen].cpu().double() * self.scale_D
        return rows_TD - rows_TD.mean(1, keepdim=True) if self.centred else rows_TD


def norm_weights(own: Any, name: str) -> tuple[Tensor, bool]:
    """Returns s (D,) with S n(h) what the output layer reads of h, up to a constant, and whether n takes the mean away.

    n(x) of signs x that sum to zero is x for a root-mean-square norm and for a layer norm alike.

    Raises:
        TrainingError: something else than a norm stands there.
    """
    upper = Upper(own, len(find_blocks(own)))
    head: Any = upper.model.get_output_embeddings()
    width = own.get_input_embeddings().weight.shape[1]
    like = next(own.parameters())
    read: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: read.append(args[0]))

    def reads(x_D: Tensor) -> Tensor:
        ids = torch.zeros(1, 1, dtype=torch.long, device=like.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        upper.logits(x_D.to(like)[None, None], batch, torch.ones_like(ids, dtype=torch.bool))
        return read.pop().detach().cpu().double().reshape(-1)

    signs = torch.ones(width, dtype=torch.float64)
    signs[1::2] = -1
    turned = signs[torch.randperm(width, generator=torch.Generator().manual_seed(0))]
    try:
        each = [(reads(x) - reads(-x)) / 2 * x for x in (signs, turned)]
        level = (reads(torch.ones_like(signs)) - reads(-torch.ones_like(signs))) / 2
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the last states of {name!r} cannot be read: {error}") from error
    finally:
        handle.remove()
    if each[0].shape != signs.shape or (each[0] - each[1]).norm() > ELEMENTWISE * each[0].norm():
        raise TrainingError(
            f"between the last block of {name!r} and its output layer stands more than a norm; use ridge instead"
        )
    return each[0], bool(level.norm() < ELEMENTWISE * each[0].norm())


def last_site(model: CoupledForCausalLM, edge: Edge) -> int:
    """Returns the site behind the last blocks of a linear bridge's two ends.

    Raises:
        TrainingError: there is none, or the bridge is of another kind or does not lead into the anchor.
    """
    if edge.target != ANCHOR:
        raise TrainingError(
            f"{edge.source}->{edge.target}: only bridges into the anchor are heard as output"
        )
    names = [ANCHOR, *model.specialists]
    ends = [names.index(edge.target), names.index(edge.source)]
    last = [len(find_blocks(model.models[names[end]])) for end in ends]
    for site, row in enumerate(model.sites):
        if [row[end] for end in ends] == last:
            bridge = model.bridge(edge, site)
            if not isinstance(bridge.map, LinearMap) or bridge.reading is not None:
                raise TrainingError(
                    f"{edge.source}->{edge.target} is not a linear bridge that reads states"
                )
            return site
    raise TrainingError(
        f"{edge.source}->{edge.target} has no site behind the last blocks {last}; couple with sites={last[:1]}"
    )


def _shared(source: _Vocabulary, target: _Vocabulary) -> dict[int, int]:
    """Returns target token -> source token of the same text, the ends of an answer among them."""
    shared = {token: source.ids[text] for text, token in target.ids.items() if text in source.ids}
    if shared and source.end is not None and target.end is not None:
        shared[target.end] = source.end
    return shared


def _weights(
    target: _Vocabulary, shared: dict[int, int], answers: Iterable[str], emphasis: float
) -> Tensor:
    counts: Counter[int] = Counter()
    for answer in answers:
        counts.update(target.tokenizer(answer, add_special_tokens=False).input_ids)
        counts.update([target.end] if target.end is not None else [])
    given = torch.tensor([float(counts[token]) for token in shared], dtype=torch.float64)
    if not given.any():
        return torch.ones_like(given)
    return 1 + emphasis * len(given) * given / given.sum()


def _solve(
    source: _Vocabulary,
    target: _Vocabulary,
    shared: dict[int, int],
    weights_T: Tensor,
    ridge: float,
) -> Tensor:
    """Returns W (D_target, D_source)."""
    pairs = list(shared.items())
    width, source_width = target.head.weight.shape[1], source.head.weight.shape[1]
    normal = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    right = torch.zeros(width + 1, source_width, dtype=torch.float64)
    for start in range(0, len(pairs), ROWS):
        ours, theirs = zip(*pairs[start : start + ROWS], strict=True)
        a_TD = nn.functional.pad(target.rows(ours), (0, 1), value=1.0)  # the constant c
        heavy_TD = a_TD * weights_T[start : start + ROWS, None]
        normal += heavy_TD.T @ a_TD
        right += heavy_TD.T @ source.rows(theirs)
    strength = ridge * float(normal.diagonal()[:-1].mean())
    penalty = torch.full((len(normal),), strength, dtype=torch.float64)
    penalty[-1] = 0
    if target.centred:  # nothing is heard of the mean
        normal[:-1, :-1] += normal.diagonal()[:-1].mean() / width
    return torch.linalg.solve(normal + penalty.diag(), right)[:-1]
