"""What may be shown of a text: no passwords, no tokens, nothing that a terminal would obey.

Every error of the library passes through `redacted`, and so does every text of other libraries that is shown or stored.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

HIDDEN = "***"
_FEWEST = 4  # characters of a secret that is looked for by itself; a shorter one would hide parts of common words
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "PGPASSWORD", "MYSQL_PWD")
_NAME = (
    r"(?:[\w.-]*(?:password|passwd|passphrase|pwd|secret|api_?key|access_?key)|(?:[\w.-]*[_.-])?(?:pw|pass|auth)"
    r"|(?:(?:hub|hf|hugging\w*|access|auth|api|push_to_hub)_)?token)"
)
_SCHEME = r"[a-zA-Z][\w+.-]{0,30}://"  # bounded: a long word would be tried from each of its letters to its end
_USER = re.compile(rf"(?P<scheme>{_SCHEME})(?P<user>[^\s:@/'\"]*)(?P<password>:[^\s'\"]*)?@")
_NO_HOST = re.compile(rf"(?P<scheme>{_SCHEME}[^\s:@/'\"]*):(?!\d+(?:[/?\s'\"]|$))[^\s@/'\"]+(?![^\s'\"]*@)")
_FIELD = re.compile(
    r"(?P<field>(?:^|[?&;\s,{(])['\"]?" + _NAME + r"['\"]?(?:\s*=\s*|:\s+)['\"]?)(?P<value>[^\s&;,'\"})]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<field>\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_HUB = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_known: set[str] = set()


def remember(url: str) -> None:
    """Remember the secrets of an address, so that `redacted` finds them wherever another library repeats them."""
    text = url.partition("://")[2]
    login = text.rpartition("@")[0]
    if not login and not (port := text.rpartition(":")[2].partition("/")[0]).isdigit():
        login = f":{port}"  # the host is missing
    found = {login.partition(":")[2]} | {login.rpartition(":")[2] if ":" in login else ""}
    found |= {match["value"] for match in _FIELD.finditer(text)}
    found |= {unquote(secret) for secret in found}
    _known.update(secret for secret in found if len(secret) >= _FEWEST)


def redacted(text: str) -> str:
    """`text` without passwords and tokens, and with control characters escaped.

    What it finds: `user:password@` in an address, malformed ones included; fields whose name says that they are secret
    (`?password=`, `pw=`, `token:`); tokens of the Hugging Face hub; the values of `HF_TOKEN`, `PGPASSWORD` and the
    like; and everything given to `remember`.
    """
    secrets = _known | {os.environ[name] for name in _TOKENS if len(os.environ.get(name, "")) >= _FEWEST}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USER.sub(_without_password, text)
    text = _NO_HOST.sub(rf"\g<scheme>:{HIDDEN}", text)
    text = _FIELD.sub(lambda match: f"{match['field']}{HIDDEN}", text)
    text = _BEARER.sub(lambda match: f"{match['field']}{HIDDEN}", text)
    text = _HUB.sub(HIDDEN, text)
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _without_password(login: re.Match[str]) -> str:
    """`scheme://user:***@`; for a website the name may be a token, too."""
    user = HIDDEN if login["scheme"].lower().startswith("http") else login["user"]
    return f"{login['scheme']}{user}{f':{HIDDEN}' if login['password'] else ''}@"
