"""Every error a user of hiedit can cause, one class each.

All derive from :class:`HieditError`, and also from the closest built-in class, so that both
``except HieditError`` and ``except ValueError`` do what a reader expects. A message names the value
that was wrong and what would be right, and is raised before anything has changed.
"""


class HieditError(Exception):
    """Base class of every error raised on purpose by hiedit."""


class ModelError(HieditError, ValueError):
    """A model that cannot be found, loaded or edited."""


class LayerError(HieditError, ValueError):
    """A layer pattern that matches nothing, or modules that are not weight matrices."""


class DeviceError(HieditError, ValueError):
    """A device that does not exist on this machine, or cannot be used in this process."""


class NotEnoughMemoryError(HieditError, MemoryError):
    """The model would not fit; the message carries the estimate."""


class DatasetError(HieditError, ValueError):
    """A data set that cannot be found or a malformed row; names file, row and field."""


class PromptError(HieditError, ValueError):
    """A prompt or answer that cannot be tokenised: empty, or longer than the context."""


class ActionError(HieditError, ValueError):
    """An action of the wrong shape, type or range."""


class NonFiniteUpdateError(HieditError, ValueError):
    """An update holding NaN or infinity; nothing was written."""


class UpdateShapeError(HieditError, ValueError):
    """An update whose shapes do not fit the layer it is meant for; nothing was written."""


class SettingsError(HieditError, ValueError):
    """An argument outside its range or an unknown name among a fixed set."""


class MissingLibraryError(SettingsError, ImportError):
    """A library that is not installed; names the extra of hiedit that installs it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"{library} is not installed; install it with pip install 'hiedit[{extra}]'"
        )


class ResultsExistError(HieditError, FileExistsError):
    """The output folder already holds results, which are never overwritten silently."""


class CheckpointError(HieditError, ValueError):
    """A trained agent or kept statistics that cannot be read, or made for another model."""
