"""Batches to rows and back: what every store does alike, so that the fake cannot drift.

Within one batch only the last change of a row is written, and an effect that was both ordered and
done leaves no trace but its number.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from tagmem.base.errors import StorageFailed
from tagmem.base.limits import HISTORY_PRUNE_ROWS
from tagmem.ports import Batch, Effect


class Rows(NamedTuple):
    """One batch, coalesced and encoded."""

    puts: list[tuple[str, str, str]]
    """(kind, key, doc)"""
    deletes: list[tuple[str, str]]
    ordered: list[tuple[int, str]]
    """(effect id, doc)"""
    done: list[tuple[int]]
    notes: list[tuple[str, str, str]]
    """(type, subject, data)"""
    last_effect_id: int
    """The highest durable effect id in the batch; 0 when there is none."""


class Codec:
    """JSON of one daemon's record kinds and effects."""

    def __init__(self, kinds: Mapping[str, type[msgspec.Struct]], effects: Any = None) -> None:
        self.kinds = dict(kinds)
        self._effect_types = typing.get_args(effects) or (() if effects is None else (effects,))
        self._record_decoders = {
            kind: msgspec.json.Decoder(record) for kind, record in kinds.items()
        }
        self._effect_decoder = msgspec.json.Decoder(effects) if effects is not None else None
        self._data_decoder = msgspec.json.Decoder(dict[str, Any])
        self._encode = msgspec.json.Encoder().encode

    def rows(self, batch: Batch) -> Rows:
        """Encode a batch. Raises TypeError for kinds or effects that it was not made for."""
        records: dict[tuple[str, str], msgspec.Struct | None] = {}
        ordered: dict[int, Effect] = {}
        done: list[tuple[int]] = []
        notes: list[tuple[str, str, str]] = []
        encode = self._encode
        last_effect_id = 0
        for step in batch.steps:
            for change in step.changes:
                records[change.kind, change.key] = change.record
            for effect in step.effects:
                if effect.durable:
                    self._check_effect(effect)
                    ordered[effect.id] = effect
                    last_effect_id = max(last_effect_id, effect.id)
            done += [(done_id,) for done_id in step.done if ordered.pop(done_id, None) is None]
            notes += [(n.type, n.subject, encode(n.data).decode()) for n in step.notes]
        puts: list[tuple[str, str, str]] = []
        deletes: list[tuple[str, str]] = []
        for (kind, key), record in records.items():
            if record is None:
                deletes.append((kind, key))
                continue
            if type(record) is not self.kinds.get(kind):
                raise TypeError(f"{kind} {key}: a {type(record).__name__} cannot be kept there")
            puts.append((kind, key, encode(record).decode()))
        effects = [(effect_id, encode(effect).decode()) for effect_id, effect in ordered.items()]
        return Rows(puts, deletes, effects, done, notes, last_effect_id)

    def _check_effect(self, effect: Effect) -> None:
        if type(effect) not in self._effect_types:
            raise TypeError(f"{type(effect).__name__} is durable, but its store cannot read it")
        if effect.id <= 0:
            raise TypeError(f"{type(effect).__name__} is durable and has no id")

    def records(self, rows: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, Any]]:
        """Decode (kind, key, doc) rows. Raises StorageFailed that names the row."""
        decoders = {kind: decoder.decode for kind, decoder in self._record_decoders.items()}
        loaded: list[tuple[str, str, Any]] = []
        kind = key = ""
        try:
            for kind, key, doc in rows:
                loaded.append((kind, key, decoders[kind](doc)))
        except msgspec.MsgspecError as error:
            raise StorageFailed(f"{kind} {key} cannot be read: {error}") from error
        except KeyError:
            raise StorageFailed(
                f"{kind} {key} is of a kind that this daemon does not know"
            ) from None
        return loaded

    def effects(self, rows: Iterable[tuple[int, str]]) -> list[Effect]:
        """Decode (id, doc) rows of the outbox. Raises StorageFailed that names the effect."""
        loaded: list[Effect] = []
        for effect_id, doc in rows:
            if self._effect_decoder is None:
                raise StorageFailed(f"effect {effect_id}: this daemon has no durable effects")
            try:
                loaded.append(self._effect_decoder.decode(doc))
            except msgspec.MsgspecError as error:
                raise StorageFailed(f"effect {effect_id} cannot be read: {error}") from error
        return loaded

    def data(self, doc: str) -> dict[str, Any]:
        """Decode the data of one history entry."""
        return self._data_decoder.decode(doc)


def prune_before(oldest: int, last: int, retention: int) -> int:
    """The sequence number up to which history should go now; 0 when it is not worth a write yet.

    Rows go in bites of HISTORY_PRUNE_ROWS, so that one commit is never long and most prune nothing.
    """
    excess = last - oldest + 1 - retention
    return oldest + HISTORY_PRUNE_ROWS - 1 if excess >= HISTORY_PRUNE_ROWS else 0
