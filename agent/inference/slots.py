"""Two slots for models: the ones in use, and the ones that may come next; a switch is one rename.

    staging/{folder} --stage: checked, copied--> the slot that is not in use --activate: tried, renamed--> in use
                                                                 ^---------------- roll_back ----------------'

    models/
      a/ b/          each a folder of models with its manifest
      active.json    which is in use, and which was before: `a`, `b` or `base` (the configured or packaged models)

Rules
  * A slot is used only if every file is the one in its manifest, and only after both models have answered the golden
    fields as they are known to (`agent.inference.golden`).
  * `active.json` is replaced whole, so that after a power cut the old or the new models are in use, and nothing else.
  * Models that were activated are on trial until they have counted a field. A third start without that goes back to the
    ones before: models that crash the agent do not crash it for ever.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from agent.errors import ModelError
from agent.files import sync_folder, write_durably
from agent.inference.golden import answers_names
from agent.inference.manifest import MANIFEST_NAME, Manifest, load_manifest, read_model_file

Slot = Literal["a", "b", "base"]

ACTIVE_NAME = "active.json"

TRIAL_STARTS = 3
"""One start may be a power cut, two may be chance."""


class NothingToSwitchTo(ModelError):
    """There is no other slot with models in it."""


@dataclass(frozen=True, slots=True)
class Active:
    """Which slot is in use. trial_starts: starts since it was activated without a counted field; None = proven.

    fell_back: why it is in use and not the one that was activated, in words, until the next switch; None = it was.
    """

    slot: Slot = "base"
    before: Slot | None = None
    trial_starts: int | None = None
    fell_back: str | None = None


class ModelSlots:
    """The slots of one device. folder: holds them; base: the models that came with the agent or its configuration."""

    def __init__(self, folder: Path, base: Path, staging: Path) -> None:
        self._folder = folder
        self._base = base
        self._staging = staging

    @property
    def active(self) -> Active:
        """Which is in use; the base where nothing was ever activated, or where what was noted cannot be read."""
        return self._read()[0]

    @property
    def path_in_use(self) -> Path:
        """The folder of the models that are in use."""
        return self.path(self.active.slot)

    @property
    def fault(self) -> str | None:
        """Why it cannot be told which is in use, in words; None = it can."""
        return self._read()[1]

    @property
    def staying_words(self) -> str | None:
        """That the base models are not in use, and how they would be; None = they are."""
        slot = self.active.slot
        if slot == "base":
            return None
        return (
            f"slot {slot} is in use ({self.path(slot)}), {self._base} is not; to use it, put it into {self._staging}"
            f" for model.stage and model.activate, or remove {self._folder / ACTIVE_NAME} and restart the agent"
        )

    def path(self, slot: Slot) -> Path:
        """The folder of models of a slot."""
        return self._base if slot == "base" else self._folder / slot

    def begin(self) -> tuple[Active, str | None]:
        """What to start with, counting one start more while on trial; and why it is not what was active, if so."""
        active, fault = self._read()
        if fault is not None:
            return active, f"{fault}; the configured ones are in use"
        if active.trial_starts is None:
            return active, None
        if active.trial_starts + 1 >= TRIAL_STARTS:
            why = f"the models in slot {active.slot} did not count a field in {active.trial_starts} starts"
            back = self._go_back(active, why)
            return back, back.fell_back
        self._note(replace(active, trial_starts=active.trial_starts + 1))
        return active, None

    def go_back(self, why: str) -> Active:
        """The ones before are in use again, without trying them: what is in use cannot be used at all."""
        return self._go_back(self.active, why)

    def mark_proven(self) -> None:
        """The models in use have counted a field."""
        active = self.active
        if active.trial_starts is not None:
            self._note(replace(active, trial_starts=None))

    def stage(self, name: str, classifier: str | None = None) -> Manifest:
        """Check the models in a folder of the staging place and copy them into the slot that is not in use.

        classifier: the one that will be used; None = the first. Raises ModelError: not there, not what its manifest
        says, cannot be copied.
        """
        source = self._staging / name
        manifest = load_manifest(source)
        manifest.choosing(classifier)
        active = self.active
        slot = self._other(active)
        target = self._folder / slot
        fresh = target.with_name(f"{target.name}.new")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            contents = {MANIFEST_NAME: (source / MANIFEST_NAME).read_bytes()}
            for entry in manifest.entries:
                _must_stay_inside(entry.file)
                contents[entry.file] = read_model_file(source, entry)  # the very bytes whose digest was checked
            for answers in answers_names(manifest):
                if (source / answers).is_file():  # without its answers a model fails its self-test, and says why
                    contents[answers] = (source / answers).read_bytes()
            for file, content in contents.items():
                (fresh / file).parent.mkdir(parents=True, exist_ok=True)
                write_durably(fresh / file, content)
            if active.before == slot:  # those are gone now; what was never tried must not be gone back to
                self._note(replace(active, before="base"))
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
            sync_folder(self._folder)
        except OSError as error:
            raise ModelError(f"{target}: the models cannot be stored: {error.strerror}; free space there") from error
        copied = load_manifest(target)
        for entry in copied.entries:
            read_model_file(target, entry)
        return copied.choosing(classifier)

    def switch(self, try_them: Callable[[Path], None], *, is_rollback: bool = False) -> Active:
        """Take the other slot into use, if its models can be used. try_them: raises ModelError where they cannot.

        Those that somebody rolls back to are on no trial: it could only end with the ones rolled back from.
        """
        active = self.active
        slot = active.before if is_rollback else self._other(active)
        if slot is None:
            raise NothingToSwitchTo("there are no models before these; nothing was ever activated")
        path = self.path(slot)
        if not (path / MANIFEST_NAME).is_file():
            raise NothingToSwitchTo(f"{path}: there are no models; stage some first")
        try_them(path)
        switched = Active(slot, before=active.slot, trial_starts=None if is_rollback else 0)
        self._note(switched)
        return switched

    def _read(self) -> tuple[Active, str | None]:
        path = self._folder / ACTIVE_NAME
        try:
            noted = json.loads(path.read_text("utf-8"))
            fell_back = noted.get("fell_back")  # older versions did not note it
            active = Active(noted["slot"], noted["before"], noted["trial_starts"], fell_back)
        except FileNotFoundError:
            return Active(), None
        except OSError as error:
            return Active(), f"{path}: cannot be read: {error.strerror}; which models were activated is not known"
        except (ValueError, KeyError, TypeError, AttributeError):
            active = None
        if (
            active is None
            or active.slot not in get_args(Slot)
            or active.before not in (*get_args(Slot), None)
            or not isinstance(active.trial_starts, (int, type(None)))
            or not isinstance(active.fell_back, (str, type(None)))
        ):
            return Active(), f"{path}: is damaged; which models were activated is not known"
        return active, None

    def _go_back(self, active: Active, why: str) -> Active:
        slot = active.before or "base"
        mend = "activate others (model.stage, model.activate)"
        if slot == "base":
            mend += f", or remove {self._folder / ACTIVE_NAME} and restart the agent if these are to stay"
        back = Active(slot, fell_back=f"{why}; the ones before are in use: {mend}")
        self._note(back)
        return back

    @staticmethod
    def _other(active: Active) -> Slot:
        """The slot that staging may overwrite: never the one in use."""
        return "b" if active.slot == "a" else "a"

    def _note(self, active: Active) -> None:
        path = self._folder / ACTIVE_NAME
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(asdict(active)).encode())
        except OSError as error:
            raise ModelError(f"{path}: cannot be written: {error.strerror}; free space there") from error


def _must_stay_inside(name: str) -> None:
    """A manifest from elsewhere must not have files written outside its slot."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(f"{MANIFEST_NAME}: the file {name} lies outside its folder; that is no set of models")
