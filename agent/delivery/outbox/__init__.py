"""The outbox: what has been counted and not yet been confirmed, on disk, in order; and for a while what has been.

What it promises
  * All drafts of one `append`, the sample's state and the finished frame are stored together or not at all.
  * When `append` returns, they survive a power cut (`synchronous=FULL`).
  * Numbers (`seq`) are without gaps in each stream, over restarts too.
  * The newest word on each retained topic, notes and answers to transactions are stored in the same transaction.
  * A row leaves only by `acknowledge`, by `confirm` (a receiver has it on its disk) or, with its reason, into the dead
    letters. What has left stays as history, to be sent again when asked for, as long as there is room and time for it.
  * For room goes, oldest first: what else of ours lies on a disk that is short (`spare`: pictures), history, cells
    (their fields hold them too), events. What goes unconfirmed is counted (`dropped`). Fields, differentials and the
    audit never go: a full outbox refuses the next append, and takes it again when some have left. Commands and the end
    of a sample have a reserve: they are taken then too.

What it does not promise
  * That a message is delivered once only: an acknowledgement lost in a power cut sends the message again.
  * That numbers go on after the file itself was lost: a new file begins at 1. The boot counter lies in a file of its
    own, so that no id is ever given twice.

One file `outbox.db` (SQLite, WAL) and one file `boot` in a folder on a local disk. An `Outbox` holds one connection
and belongs to one thread at a time; each thread opens its own.

The parts, each of which knows only those below it:

    opening                          from a folder and its limits to an Outbox
    outbox                           the Outbox: what is one transaction, what may be asked
    room, salvage                    what goes first when something is full; a new file out of a damaged one
    leaving, dead_letters, tables    rows that are confirmed, and history; rows set aside; the file's tables
    queue, words, folder, pages      rows that wait; all that is no row; boot counter, lock; rows without SQLite
    file, rows                       the connection and its transactions; a row, its checksum, its age
"""

from agent.delivery.outbox.dead_letters import DeadLetter, Untold
from agent.delivery.outbox.file import FULL_DISK, START_ROOM_BYTES
from agent.delivery.outbox.folder import DATABASE_NAME, begin_boot, has_outbox, lock_folder, read_boot
from agent.delivery.outbox.leaving import ReplayAnswer
from agent.delivery.outbox.opening import open_outbox
from agent.delivery.outbox.outbox import Outbox
from agent.delivery.outbox.rows import Row
from agent.delivery.outbox.salvage import Salvage
from agent.delivery.outbox.words import NO_NOTES, StoredDocument, sample_from, sample_text

__all__ = [
    "DATABASE_NAME",
    "FULL_DISK",
    "NO_NOTES",
    "START_ROOM_BYTES",
    "DeadLetter",
    "Outbox",
    "ReplayAnswer",
    "Row",
    "Salvage",
    "StoredDocument",
    "Untold",
    "begin_boot",
    "has_outbox",
    "lock_folder",
    "open_outbox",
    "read_boot",
    "sample_from",
    "sample_text",
]
