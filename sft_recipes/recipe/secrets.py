"""Find and redact tokens, keys and passwords from the environment in anything that is written or shown.

They get into commands by accident (`--set trl.run_name=$HF_TOKEN`), and run directories are copied, shared and uploaded.
"""

import os
import re

_NAMES = re.compile(
    r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(^|_)(PASS|PAT|AUTH))S?(_|$)", re.IGNORECASE
)
_MIN_LENGTH = 8  # shorter values would match ordinary text


def from_environment() -> dict[str, str]:
    """Return variables with names of secrets and their values, longest value first. Existing paths are not secrets."""
    secrets = {
        name: value
        for name, value in os.environ.items()
        if _NAMES.search(name) and len(value) >= _MIN_LENGTH and not os.path.exists(value)  # noqa: PTH110  # may be too long
    }
    return dict(sorted(secrets.items(), key=lambda item: -len(item[1])))


def find_in(text: str) -> str | None:
    """Return the name of a variable whose secret the text contains, or None."""
    return next((name for name, value in from_environment().items() if value in text), None)


def redacted(text: str) -> str:
    """Replace secrets in a text with the names of their variables."""
    for name, value in from_environment().items():
        text = text.replace(value, f"${name}")
    return text
