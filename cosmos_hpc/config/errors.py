"""The error that is the user's to mend: shown as one line, exit code 2, no traceback."""


class ConfigError(Exception):
    """A setting or input that can't work. The message says what, where and the mend, in one line."""
