"""The files behind a server's users and passwords, made on first use and readable by their owner only."""

import configparser
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lossworks.errors import UserError

_ADMIN_NAME = "MLFLOW_AUTH_ADMIN_USERNAME"
_ADMIN_PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"  # noqa: S105  (a variable's name)
_SETTINGS = "MLFLOW_AUTH_CONFIG_PATH"
_SECRET_KEY = "MLFLOW_FLASK_SERVER_SECRET_KEY"  # noqa: S105

_SETTINGS_TEXT = """\
# Settings of MLflow's users and passwords; `lossworks server` wrote them once and leaves them alone now.
[mlflow]
# What a user may do with experiments and models of others: READ, USE, EDIT, MANAGE or NO_PERMISSIONS. Whoever
# makes an experiment may delete it and give rights to it. EDIT lets a team write into one experiment.
default_permission = EDIT
database_uri = sqlite:///{users}
admin_username = admin
# Checking a password takes a tenth of a second, which is by design. A password that was changed or withdrawn
# stays good for so many seconds in the server's other processes.
auth_cache_ttl_seconds = 10
"""


@dataclass(frozen=True)
class Accounts:
    """Where the users of a server are kept.

    Attributes:
        folder: Holds the files; nobody but their owner can enter it.
    """

    folder: Path

    @property
    def admin(self) -> Path:
        """Return the administrator's name and password, in the form of ``~/.mlflow/credentials``."""
        return self.folder / "admin-credentials"

    @property
    def users(self) -> Path:
        """Return the database of users, with hashed passwords, and of rights."""
        return self.folder / "users.db"

    @property
    def settings(self) -> Path:
        """Return the settings of MLflow's authentication."""
        return self.folder / "auth.ini"

    @property
    def secret_key(self) -> Path:
        """Return the key that signs the forms of the server's pages."""
        return self.folder / "secret-key"

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """Return the variables of MLflow's authentication, and make the files they need.

        Args:
            given: Variables that are set; each of MLflow's own wins over its file.

        Raises:
            UserError: A file can be read by others, or is not what it should be.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = {_SETTINGS: str(self.settings)}
        if _SETTINGS not in given:
            _make(self.settings, _SETTINGS_TEXT.format(users=self.users))
        if _SECRET_KEY not in given:
            _make(self.secret_key, secrets.token_hex(32))
            found[_SECRET_KEY] = _read(self.secret_key)
        if _ADMIN_PASSWORD not in given:
            found |= self._administrator()
        return {**found, **{name: given[name] for name in found if name in given}}

    def _administrator(self) -> dict[str, str]:
        """Return name and password of the administrator, who is made at the first start.

        Once there are users, the server needs the file no more; whoever has changed the password removes it.
        """
        if not self.users.exists():
            password = secrets.token_urlsafe(24)
            _make(
                self.admin,
                f"[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = {password}\n",
            )
        if not self.admin.exists():
            return {}
        name, password = _credentials(self.admin)
        return {_ADMIN_NAME: name, _ADMIN_PASSWORD: password}


def _credentials(path: Path) -> tuple[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(_read(path))
        section = parser["mlflow"]
        return section["mlflow_tracking_username"], section["mlflow_tracking_password"]
    except (configparser.Error, KeyError):
        # Without the parser's message, which repeats the line.
        raise UserError(
            f"{path}: must have mlflow_tracking_username and mlflow_tracking_password below [mlflow]"
        ) from None


def _make(path: Path, text: str) -> None:
    """Write a file of mode 0600 unless there is one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def read_private(path: Path, named: str) -> str:
    """Return the text of a file that holds a secret, without white space around it.

    Args:
        path: The file.
        named: What errors begin with.

    Raises:
        UserError: It can't be read, or others than its owner can read it.
    """
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text"
        raise UserError(f"{named}: can't be read: {reason}") from None
    if mode & 0o077:
        raise UserError(f"{named}: has mode {mode:o}, so others can read the secret; run `chmod 600 {path}`")
    if not text:
        raise UserError(f"{named}: is empty")
    return text


def _read(path: Path) -> str:
    return read_private(path, str(path))
