"""The pictures of stored fields: kept on this device after the transaction, and let go when the disk is short."""

from __future__ import annotations

from agent.bench import Bench
from agent.delivery.outbox import Outbox
from agent.domain import FieldResult
from agent.pictures import PictureStore
from agent.pipeline import Outcome
from agent.reporting import ANSWERS, REVIEW, kept_key
from agent.review import CropStore, read_kept_cells, review_key


class Album:
    """Keeps pictures for people. outbox: that of this thread; only read here.

    crops: of cells that a person should look at; fields: of whole fields; None = not kept.
    """

    def __init__(self, outbox: Outbox, crops: CropStore | None, fields: PictureStore | None) -> None:
        self._outbox = outbox
        self._crops = crops
        self._fields = fields

    def keep(self, field: FieldResult, outcome: Outcome, bench: Bench) -> None:
        """The pictures of a field that is stored. outcome: what its frame gave."""
        if self._crops is not None:
            self._keep_crops(field, outcome, bench, self._crops)
        if self._fields is not None:
            self._fields.keep(field.frame)

    def let_go(self) -> bool:
        """Whole fields before the cells that a person should look at; False = there are no pictures left."""
        is_gone = self._fields is not None and self._fields.let_go()
        return is_gone or (self._crops is not None and self._crops.let_go())

    def _keep_crops(self, field: FieldResult, outcome: Outcome, bench: Bench, crops: CropStore) -> None:
        """The pictures of the cells of a stored field that are in the review list or the gallery."""
        sid = outcome.sample.sid
        kept = [cell for cell in field.cells if outcome.notes.get(review_key(sid, cell.cell_id)) is not None]
        for cell in kept:
            crops.put(sid, cell.cell_id, bench.picture_of(cell, field.frame))
        if outcome.sample.fields == 1:
            crops.keep_only((sid, *(key.removeprefix(kept_key("")) for key in self._outbox.notes(kept_key("")))))
        max_bytes = int(bench.review.max_mb * 2**20)
        if kept and crops.size_bytes() > max_bytes:
            listed = read_kept_cells(self._outbox.notes(REVIEW), self._outbox.notes(ANSWERS), None)
            crops.make_room(max_bytes, {cell.cell_id: not cell.is_open for cell in listed})
