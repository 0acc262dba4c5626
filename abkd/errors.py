"""The one exception for a user's mistake. Below every floor: any module may raise it."""


class InputError(ValueError):
    """Bad input: one line that names the field, the value and the way out.

    The command line prints the line and exits with 2. Every other exception is a defect of ours.
    """


class ServerLost(InputError):
    """A teacher's server does not answer. Who has kept what was done until then adds how to go on."""
