"""Keep what several steps compute from the model alone, so that the store has it once."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from intaglio.pipeline.contract.artifact import A, Key
from intaglio.pipeline.contract.run_record import RunRecord
from intaglio.pipeline.runs.store import Store

ORIGIN = "kept"
"""Origin in the records: none of a pass, whose origins name a module."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreKeep:
    """Reads an artifact from the store, or makes it and keeps it there. It is the `keep` of a step's context.

    `model`: the digest of the step's model, which is part of the key.
    """

    store: Store
    model: str

    def __call__(self, key: Key[A], about: Mapping[str, object], make: Callable[[], A]) -> A:
        """Return the artifact that depends on the model and on `about` alone."""
        ingredients = {ORIGIN: key.name, "about": dict(about), "inputs": {"MODEL": self.model}}
        text = json.dumps(ingredients, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        with self.store.lock(digest):
            record = self.store.find(digest, [key.name])
            if record is None:
                began = time.perf_counter()
                outputs = {key.name: self.store.put(make(), staging=digest)}
                seconds = round(time.perf_counter() - began, 3)
                record = RunRecord(
                    step=ORIGIN, origin=ORIGIN, key=digest, ingredients=text, outputs=outputs, seconds=seconds
                )
                self.store.finish(record)
        return self.store.load(key, record.outputs[key.name])
