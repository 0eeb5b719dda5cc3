"""The errors that wina raises on purpose, each with a message that says what to do."""


class WinaError(Exception):
    """Base of all errors raised by wina."""


class UnknownNameError(WinaError, KeyError):
    """A name is in no registry. The message lists the names that exist."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class ConfigError(WinaError, ValueError):
    """A setting is outside what it may be."""


class UnsupportedModelError(WinaError, TypeError):
    """A model does not fit. The message names the module and the reason."""


class PatchStateError(WinaError, RuntimeError):
    """A model is patched where it must not be, or not patched where it must be."""


class CalibrationError(WinaError, ValueError):
    """The calibration text cannot give the statistics that were asked for."""


class PlanError(WinaError, ValueError):
    """A plan file is damaged, of an unknown version, or made for another model."""
