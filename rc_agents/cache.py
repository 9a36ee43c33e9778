"""One cache for the whole ensemble: a cache a model, and what each source showed at each site."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .alignment import SpanText
from .backbone import Encoded
from .errors import InputError
from .topology import ANCHOR


class CoupledCache(Cache):
    """Holds one Hugging Face cache a model under the length of the anchor's sequence.

    Args:
        caches: for each model its own cache.

    Attributes:
        ids: the anchor's tokens so far, (B, length).
        histories: source name -> site -> what it showed there at each of the anchor's columns, (B, length, width);
            kept only where a model with another tokenizer reads or is read.
        texts: for each model with its own tokenizer, its running tokenization.
        encoded: for each encoder that was shown something, what it made of it.
        seen: for each model, how many of the anchor's columns it has taken in.
        asleep: for each specialist that sleeps, in which rows, (B,); see `rc_agents.sparse`.
        traces: for each specialist that may sleep, what it showed last at each site, (B, 1, width).
        busy: whether a pass is writing it, or failed while it did.
        lost: models of other processes that take no part in this text any more, and why.
        epochs: for each model of another process, the connection in which its cache was begun.
    """

    def __init__(self, caches: Mapping[str, Cache]) -> None:
        self.caches = dict(caches)
        self.lost: dict[str, str] = {}
        self.epochs: dict[str, int] = {}
        self.ids: Tensor | None = None
        self.histories: dict[str, dict[int, Tensor]] = {}
        self.texts: dict[str, SpanText] = {}
        self.encoded: dict[str, Encoded] = {}
        self.seen: dict[str, int] = dict.fromkeys(self.caches, 0)
        self.asleep: dict[str, Tensor] = {}
        self.traces: dict[str, dict[int, Tensor]] = {}
        self.busy = False
        super().__init__(layers=[layer for cache in self.caches.values() for layer in cache.layers])

    @classmethod
    def wrap(
        cls,
        cache: Cache | None,
        configs: Mapping[str, PreTrainedConfig],
        growing: Sequence[str] = (),
        capacity: int | None = None,
        remote: Sequence[str] = (),
    ) -> CoupledCache:
        """Builds the ensemble's cache around the anchor's (or a new one); one that is coupled already stays.

        Args:
            cache: the anchor's, or None.
            configs: every model's config by name.
            growing: models with their own tokenizer, whose cache is dynamic and can be cut back.
            capacity: tokens that a static cache is to hold, where the anchor's cannot tell.
            remote: models of other processes, which hold their own caches.

        Raises:
            InputError: no cache, a cache of another ensemble, one that a single model has filled, or one that a pass
                is writing or has left half-written.
        """
        if isinstance(cache, cls):
            cache._check(configs)
            return cache
        if cache is not None and not isinstance(cache, Cache):
            raise InputError(f"past_key_values is a transformers Cache, got {type(cache).__name__}")
        if cache is not None and _filled(cache):
            raise InputError(
                "past_key_values was filled by a single model; start from an empty cache or from the "
                "past_key_values that this ensemble returned"
            )
        anchor = cache if cache is not None else _like(None, configs[ANCHOR])
        caches = {ANCHOR: anchor}
        for name, config in configs.items():
            if name in remote:
                own = name in growing
                caches[name] = RemoteCache(None if own else _capacity(cache, capacity), plain=own)
            elif name != ANCHOR:
                # Models with their own tokenizer bring their own masks, or take another cache when they first run.
                caches[name] = DynamicCache() if name in growing else _like(cache, config, capacity)
        return cls(caches)

    def _check(self, configs: Mapping[str, PreTrainedConfig]) -> None:
        if set(self.caches) != set(configs):
            raise InputError(
                f"past_key_values belongs to an ensemble of {', '.join(self.caches)}; "
                f"this one has {', '.join(configs)}; start from an empty cache"
            )
        if self.busy:
            raise InputError(
                "past_key_values is in use by another call, or was left half-written by one that failed; "
                "start from an empty cache"
            )

    # What generate() asks of a cache is answered for the anchor's sequence.

    @property
    def length(self) -> int:
        """Columns of the anchor's sequence so far."""
        return self.seen.get(ANCHOR, 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the length of the anchor's sequence so far."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns the anchor cache's capacity, -1 for none."""
        return self.caches[ANCHOR].get_max_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns the anchor cache's mask sizes."""
        return self.caches[ANCHOR].get_mask_sizes(query_length, layer_idx)

    @property
    def is_compileable(self) -> bool:
        """The coupled forward is not compiled as one graph."""
        return False

    @property
    def max_batch_size(self) -> int:
        """Rows held, -1 before the first pass."""
        return -1 if self.ids is None else int(self.ids.shape[0])

    @property
    def is_croppable(self) -> bool:
        """Whether every model's cache can be rolled back."""
        return all(cache.is_croppable for cache in self.caches.values())

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuses: each model updates its own cache."""
        raise InputError("a CoupledCache is passed to the ensemble, not to a single model")

    def activate_past_recording(self) -> None:
        """Makes every cache keep what a later `crop` has to bring back."""
        for cache in self.caches.values():
            cache.activate_past_recording()

    def renew(self, name: str, config: PreTrainedConfig) -> None:
        """Gives a model an empty cache that grows."""
        cache = self.caches[name]
        if isinstance(cache, RemoteCache):
            cache.renew()
        else:
            self.caches[name] = DynamicCache(config=config.get_text_config(decoder=True))

    def snapshot(self) -> Callable[[], None]:
        """Returns a call that puts everything back as it is now, after a pass that failed halfway."""
        restores = [snapshot(cache) for cache in self.caches.values()]
        caches, seen = dict(self.caches), dict(self.seen)
        ids, busy = self.ids, self.busy
        histories = {source: dict(sites) for source, sites in self.histories.items()}
        texts = {name: text.copy() for name, text in self.texts.items()}
        encoded = dict(self.encoded)

        def restore() -> None:
            for put_back in restores:
                put_back()
            self.caches, self.seen = caches, seen
            self.ids, self.busy = ids, busy
            self.histories, self.texts, self.encoded = histories, texts, encoded

        return restore

    def remember(self, input_ids: Tensor) -> None:
        """Appends the anchor's tokens of a finished pass, (B, T)."""
        self.ids = input_ids if self.ids is None else torch.cat([self.ids, input_ids], dim=1)

    def shown_before(self, source: str, site: int, states: Tensor | None) -> Tensor | None:
        """Returns what a source showed at a site, (B, length, width), with its states of this pass behind it.

        At columns that it missed it showed nothing (zeros). None where nothing tells its width.
        """
        parts = [
            part for part in (self.histories.get(source, {}).get(site), states) if part is not None
        ]
        if not parts:
            return None
        gap = self.length - sum(part.shape[1] for part in parts if part is not states)
        if gap:
            parts.insert(
                len(parts) - (states is not None),
                parts[0].new_zeros(len(parts[0]), gap, parts[0].shape[2]),
            )
        return torch.cat(parts, dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` columns of the anchor's sequence from every model.

        A model with its own tokenizer follows at the next pass, when the shorter text is tokenized again.
        """
        if tokens_to_remove > 0:
            raise InputError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}"
            )
        length = self.length + tokens_to_remove
        busy, self.busy = (
            self.busy,
            True,
        )  # and it stays so, and refused, where one model's cache fails halfway
        for name, cache in self.caches.items():
            if name in self.texts or not self.seen[name]:
                continue
            try:
                cache.crop(min(0, length - self.seen[name]))
            except (RuntimeError, ValueError, NotImplementedError, IndexError) as error:
                raise InputError(
                    f"the cache of model {name!r} cannot give back {-tokens_to_remove} tokens: {error}; "
                    "start from an empty cache"
                ) from error
            self.seen[name] = min(self.seen[name], length)
        for text in self.texts.values():
            text.cut(length)
        for sites in self.histories.values():
            for site, states in sites.items():
                sites[site] = states[:, :length]
        if self.ids is not None:
            self.ids = self.ids[:, :length]
        self.asleep.clear()  # which was found at a token that may be gone
        self.busy = busy

    def reset(self) -> None:
        """Empties every cache."""
        for cache in self.caches.values():
            cache.reset()
        self.ids = None
        self.histories.clear()
        self.texts.clear()
        self.encoded.clear()
        self.seen = dict.fromkeys(self.caches, 0)
        self.asleep.clear()
        self.lost.clear()  # the next text begins anew
        self.epochs.clear()
        self.busy = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the rows in the order of `beam_idx`, (B,)."""
        for cache in self.caches.values():
            cache.reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of `indices`."""
        for cache in self.caches.values():
            cache.batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        for cache in self.caches.values():
            cache.batch_repeat_interleave(repeats)
        if self.ids is not None:
            self._select(torch.arange(self.ids.shape[0]).repeat_interleave(repeats))

    def select_histories(self, rows: Tensor) -> None:
        """Reorders, keeps or repeats the rows of what sources showed, encoders included."""
        self.encoded = {name: one.select(rows) for name, one in self.encoded.items()}
        for sites in self.histories.values():
            for site, states in sites.items():
                sites[site] = states[rows.to(states.device)]

    def _select(self, rows: Tensor) -> None:
        if self.ids is not None:
            self.ids = self.ids[rows.to(self.ids.device)]
        self.asleep = {name: one[rows.to(one.device)] for name, one in self.asleep.items()}
        for sites in self.traces.values():
            for site, state in sites.items():
                sites[site] = state[rows.to(state.device)]
        self.select_histories(rows)
        for text in self.texts.values():
            text.select(rows.tolist())


class RemoteCache(Cache):
    """Stands for the cache that a model of another process holds: what is asked of it goes along with the next pass.

    Args:
        capacity: tokens of a static cache; None for one that grows.
        plain: whether every layer keeps all tokens, whatever the model's config says.

    Attributes:
        id: what the other process knows it by.
        pending: [operation, argument] in order, not yet sent.
        after: the last pass that the other process has run for it.
    """

    numbers = itertools.count()

    def __init__(self, capacity: int | None = None, *, plain: bool = False) -> None:
        super().__init__(layers=[])
        self.capacity, self.plain = capacity, plain
        self.id = next(self.numbers)
        self.pending: list[list[Any]] = []
        self.after: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteCache:
        raise InputError(
            "past_key_values cannot be copied: a model of another process holds a part of it; "
            "start from an empty cache"
        )

    def taken(self) -> list[list[Any]]:
        """Returns what is pending, which then no longer is."""
        pending, self.pending = self.pending, []
        return pending

    def renew(self) -> None:
        """Starts from an empty cache that grows."""
        self.pending.append(["renew", None])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens."""
        self.pending.append(["crop", tokens_to_remove])

    def reset(self) -> None:
        """Empties it."""
        self.pending.append(["reset", None])

    def activate_past_recording(self) -> None:
        """Makes it keep what a later `crop` has to bring back."""
        self.pending.append(["activate_past_recording", None])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the rows in the order of `beam_idx`, (B,)."""
        self.pending.append(["reorder", beam_idx.tolist()])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of `indices`."""
        self.pending.append(["select", torch.as_tensor(indices).tolist()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        self.pending.append(["repeat", repeats])


def snapshot(cache: Cache) -> Callable[[], None]:
    """Returns a call that puts a model's cache back as it is now.

    Costs nothing for layers that grow, as these never write into tensors that they hold, and for static ones, whose
    later columns are written anew; recurrent and convolution states are copied.
    """
    if isinstance(cache, RemoteCache):
        pending, after = list(cache.pending), cache.after

        def put_back() -> None:
            cache.pending, cache.after = list(pending), after

        return put_back
    layers = [(layer, _held(layer)) for layer in cache.layers]

    def restore() -> None:
        cache.layers[:] = [layer for layer, _ in layers]
        for layer, held in layers:
            vars(layer).clear()
            vars(layer).update(held)

    return restore


def _held(layer: Any) -> dict[str, Any]:
    """A layer's attributes as they are now."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return dict(vars(layer))
    shared = ("keys", "values") if type(layer) is StaticLayer else ()
    return {
        name: value if name in shared else copy.deepcopy(value)
        for name, value in vars(layer).items()
    }


def _capacity(cache: Cache | None, capacity: int | None) -> int | None:
    if not isinstance(cache, StaticCache):
        return None
    length = cache.get_max_length()
    return capacity or length if length < 0 else length


def _filled(cache: Cache) -> bool:
    return any(
        getattr(layer, "is_initialized", False) and _length(layer) > 0 for layer in cache.layers
    ) or any(any(getattr(layer, "has_previous_state", {}).values()) for layer in cache.layers)


def _length(layer: Any) -> int:
    return int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0


def _like(cache: Cache | None, config: PreTrainedConfig, capacity: int | None = None) -> Cache:
    """A new cache for a model, of the same kind as the anchor's."""
    text, offloading = config.get_text_config(decoder=True), cache is not None and cache.offloading
    if not isinstance(cache, StaticCache):
        return DynamicCache(config=text, offloading=offloading)
    length = cache.get_max_length()  # -1 where all of the anchor's layers are recurrent
    return StaticCache(
        config=text,
        max_cache_len=capacity or length if length < 0 else length,
        offloading=offloading,
    )
