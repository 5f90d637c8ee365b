"""Redacts passwords, keys and tokens, which no message, log line or output file may show."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, unquote_plus

MASK = "***"

# With these schemes a user name without a password is part of the address: a container, or a login.
_PLAIN_USER = frozenset("abfs abfss az adl wasb wasbs hdfs webhdfs sftp ssh git smb".split())
# Path() turns two slashes into one. Letters before the scheme belong to another scheme, as in simplecache::https.
_USER = re.compile(
    r"(?P<scheme>(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*):(?P<slashes>/{1,2})"
    r"(?P<user>[^\s/?#'\"<>]*|[^\s/@:'\"<>]*:(?!\d+(?:[/?#\s]|$))[^\s@'\"<>]*)@"
)
_NAME = r"(?:[\w.~%-]*(?:sig|token|secret|passw|pwd|key|cred|auth|sas|session)[\w.~%-]*)"
# A colon before white space or the end of the text ends the value: it belongs to the sentence around it.
_NO_END = r"(?!:(?:\s|$))"
_PARAMETER = re.compile(rf"(?P<name>[?&;#]{_NAME}=)(?P<value>(?:{_NO_END}[^&;\s#'\"<>)])+)", re.IGNORECASE)
# Names whose value is a secret everywhere: in the environment, in options, in Azure's connection strings.
_ALWAYS = (
    r"(?:[\w-]*(?:secret|password|passwd|access[_-]?key|account[_-]?key|api[_-]?key|sas[_-]?token|session[_-]?token"
    r"|auth[_-]?token|hf[_-]?token|sharedaccesssignature|credentials?)[\w-]*)"
)
_SETTING = re.compile(rf"(?P<name>\b{_ALWAYS}=)(?P<value>(?:{_NO_END}[^\s&;,'\"<>)])+)", re.IGNORECASE)
_OPTION = re.compile(
    rf"(?P<name>['\"](?:{_ALWAYS}|key|token|secret)['\"]\s*[:=]\s*b?['\"])(?P<value>[^'\"]+)", re.IGNORECASE
)
_HEADER = re.compile(r"(?P<name>\b(?:Bearer|Basic)\s+)(?P<value>[\w.~+/=%-]{8,})", re.IGNORECASE)
# Keys with a recognisable form: AWS, Hugging Face, GitHub, Google, Weights & Biases.
_KEY = re.compile(
    r"(?P<name>)(?P<value>\b(?:(?:AKIA|ASIA)[0-9A-Z]{12,}|hf_[A-Za-z0-9]{16,}|gh[opsu]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}|wandb_v\d+_\w{20,}))"
)
_PATTERNS = (_PARAMETER, _SETTING, _OPTION, _HEADER, _KEY)
_SHORTEST = 4
# Names of environment variables whose value is a secret. PWD is a folder.
_VARIABLE = re.compile(r"key$|token$|secret|passw|credential", re.IGNORECASE)


def redact(text: str, *addresses: str) -> str:
    """Returns the text with `***` in place of every secret that it recognises.

    Secrets are users and passwords in addresses (`s3://user:password@host`), parameters such as `X-Amz-Signature=`,
    `sig=` and `token=`, settings such as `AWS_SECRET_ACCESS_KEY=`, and keys of a known form. A secret of one of the
    `addresses` is replaced wherever it occurs in the text, because libraries print parts of an address.
    """
    for secret in {secret for address in addresses for secret in _secrets_of(address)}:
        text = text.replace(secret, MASK)
    if ":/" in text and "@" in text:
        text = _USER.sub(_without_user, text)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<name>{MASK}", text)
    return text


def redact_environment(text: str) -> str:
    """As `redact`, also of the secrets in environment variables, such as WANDB_API_KEY, wherever they occur."""
    secrets = {value for name, value in os.environ.items() if _VARIABLE.search(name)}
    for secret in sorted(secrets, key=len, reverse=True):  # a secret may be a part of another one
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, MASK)
    return redact(text, *(value for value in os.environ.values() if ":/" in value))


def _without_user(match: re.Match[str]) -> str:
    scheme, slashes, user = match["scheme"], match["slashes"], match["user"]
    if ":" not in user and (not user or scheme.lower() in _PLAIN_USER):
        return match[0]
    return f"{scheme}:{slashes}{MASK}@"


def _secrets_of(address: str) -> set[str]:
    """The secrets of an address, both as written there and as libraries decode them."""
    found = {match["value"] for pattern in _PATTERNS for match in pattern.finditer(address)}
    for match in _USER.finditer(address):
        if _without_user(match) != match[0]:
            user, _, password = match["user"].partition(":")
            found |= {match["user"], password or user}
    decoded = {decode(secret) for secret in found for decode in (unquote, unquote_plus)}
    return {secret for secret in found | decoded if len(secret) >= _SHORTEST and secret != MASK}
