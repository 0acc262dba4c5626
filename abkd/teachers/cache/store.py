"""A cache that is read: examples by key, out of shards that are mapped and checked when first needed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from abkd.teachers.cache.manifest import Manifest
from abkd.teachers.cache.shards import STARTS, Shard, read_keys


class Store:
    """The examples of a whole cache.

    Args:
        folder: that holds it.
        field: what the recipe calls the folder, for messages.

    Raises:
        InputError: a shard is missing, or its header is torn.
    """

    def __init__(self, folder: Path, manifest: Manifest, field: str):
        self.folder, self.manifest, self.field = folder, manifest, field
        self._shards: dict[int, Shard] = {}
        manifest.check_complete(folder, field)
        parts = [read_keys(folder, number, manifest.digest, field) for number in range(len(manifest.shards))]
        keys = np.concatenate(parts)
        shards = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        places = np.concatenate([np.arange(len(part)) for part in parts])
        order = np.argsort(keys, kind="stable")
        self._sorted, self._shard_of, self._place_of = keys[order], shards[order], places[order]

    def find(self, keys: Sequence[int]) -> np.ndarray:
        """int64 `[n]`: where each example stands, for `example`; -1 for one that is not there."""
        wanted = np.asarray(keys, dtype=np.int64)
        where = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[where] == wanted, where, -1)

    def example(self, where: int) -> dict[str, Tensor]:
        """What its encoding made of an example, out of the mapped file."""
        return self.shard(int(self._shard_of[where])).example(int(self._place_of[where]))

    def single_rows(self, where: np.ndarray) -> Tensor:
        """`[n, width]` of dense examples of one row each."""
        rows = []
        for number in np.unique(self._shard_of[where]):
            tensors = self.shard(int(number)).tensors
            at = np.flatnonzero(self._shard_of[where] == number)
            starts = tensors["rows" + STARTS][torch.from_numpy(self._place_of[where[at]])]
            rows.append((at, tensors["rows"][starts]))
        order = np.argsort(np.concatenate([at for at, _ in rows]))
        return torch.cat([part for _, part in rows])[torch.from_numpy(order)]

    def shard(self, number: int) -> Shard:
        """Checked when it is first needed."""
        if number not in self._shards:
            self._shards[number] = Shard.read(self.folder, number, self.manifest.digest, self.field)
        return self._shards[number]

    def check(self) -> None:
        """Reads everything. Raises InputError: a shard was altered; it is named."""
        for number in range(len(self.manifest.shards)):
            self.shard(number)
