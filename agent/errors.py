"""The kinds of failure, named by the reaction that they call for.

| error               | who reacts          | reaction                                    |
|---------------------|---------------------|---------------------------------------------|
| `ConfigError`       | the operator        | mend the configuration; the program exits   |
| `ModelError`        | the operator        | do not start with this model file           |
| `CameraError`       | the camera thread   | close, wait, open again                     |
| `FrameUnreadable`   | the camera thread   | report this one frame, go on to the next    |
| `BrokerUnavailable` | the publisher       | wait, connect again; nothing is lost        |
| `BrokerRefused`     | the operator too    | the same, and mend password or certificate  |
| `MessageRejected`   | the publisher       | set the message aside with its reason       |
| `OutboxError`       | the pipeline        | stop intake, tell, try again                |
| `OutboxDamaged`     | the supervisor      | end; the next start sets the file aside     |
| `StoreUnavailable`  | the collector       | acknowledge nothing, wait, try again        |

Every message says where, what was found, and how to mend it.
"""

from __future__ import annotations


class HematoVisionError(Exception):
    """Base of all failures that the program foresees; the command line prints these without a traceback."""


class ConfigError(HematoVisionError):
    """The configuration has faults. `faults` holds one line for each, all of them, not just the first."""

    def __init__(self, source: str, faults: tuple[str, ...]) -> None:
        self.source = source
        self.faults = faults
        noun = "fault" if len(faults) == 1 else "faults"
        super().__init__(f"{source}: {len(faults)} {noun}\n" + "\n".join(f"  {fault}" for fault in faults))


class ModelError(HematoVisionError):
    """A model file or its manifest is missing, altered or of the wrong shape."""


class ClassifierUnknown(ModelError):
    """A classifier was asked for by a name that the manifest does not have; the models themselves may be good."""


class CameraError(HematoVisionError):
    """The camera cannot be opened or has stopped delivering frames."""


class FrameUnreadable(HematoVisionError):
    """One frame could not be decoded; the ones after it may be fine.

    `origin` names the frame for the user, `key` is its `Frame.origin_key` (None where the source has no keys).
    """

    def __init__(self, origin: str, reason: str, key: str | None = None) -> None:
        self.origin = origin
        self.reason = reason
        self.key = key
        super().__init__(f"{origin}: {reason}")


class BrokerUnavailable(HematoVisionError):
    """No connection to the broker now; a later attempt may succeed."""


class BrokerRefused(BrokerUnavailable):
    """The broker answered and said no (password, certificate, rights); it may be told otherwise, so we go on trying."""


class MessageRejected(HematoVisionError):
    """The broker, or the agent itself, refuses this one message; sending it again would not help."""

    def __init__(self, topic: str, reason: str) -> None:
        self.topic = topic
        self.reason = reason
        super().__init__(f"{topic}: {reason}")


class OutboxError(HematoVisionError):
    """The outbox cannot store now (disk full, read-only, corrupt). Nothing has been half stored."""


class OutboxDamaged(OutboxError):
    """The outbox file is damaged and was found so while in use; the next start sets it aside and begins a new one."""


class StoreUnavailable(HematoVisionError):
    """The central database cannot take messages now (away, full, locked). Nothing has been half stored."""
