"""Tokens, keys and passwords of the environment: what is written down or shown never holds their values.

Commands get them by accident (`--set trl.run_name=$HF_TOKEN`), and a run directory is copied, shared and uploaded.
"""

import os
import re

_NAMES = re.compile(
    r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(^|_)(PASS|PAT|AUTH))S?(_|$)", re.IGNORECASE
)
_SHORTEST = 8  # shorter ones are found by accident


def of_environment() -> dict[str, str]:
    """Values of variables that are called like secrets, the longest first. Paths are none: they say where one is kept."""
    found = {
        name: value
        for name, value in os.environ.items()
        if _NAMES.search(name) and len(value) >= _SHORTEST and not os.path.exists(value)  # noqa: PTH110  # may be too long
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def in_text(text: str) -> str | None:
    """The name of a variable whose secret a text holds."""
    return next((name for name, value in of_environment().items() if value in text), None)


def redacted(text: str) -> str:
    """A text with the names of variables in place of their secrets."""
    for name, value in of_environment().items():
        text = text.replace(value, f"${name}")
    return text
