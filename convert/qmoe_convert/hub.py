"""Uploading to the Hub, and finding out beforehand whether it would work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qmoe_convert import ConversionError, one_line


def check_name(repository: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        ValueError: it cannot.
    """
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"push_to_hub={repository!r}: no name of a repository: {error}") from None


def check_rights(repository: str) -> str:
    """Ask the Hub whether the user may write to ``repository``, or make it; nothing is made.

    Returns:
        its name with the owner's.

    Raises:
        ConversionError: nobody is logged in, or has no such right, or the Hub does not answer.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ConversionError(f"{repository}: nobody is logged in to the Hub; run hf auth login")
    try:
        api = HfApi()
        user = api.whoami()
        owner, _, name = repository.rpartition("/")
        repository = f"{owner or user['name']}/{name}"
        if api.repo_exists(repository):
            api.auth_check(repository, write=True)
            return repository
    except Exception as error:  # no token, no network, no right: the Hub's many errors
        raise ConversionError(
            f"{repository}: cannot be written to on the Hub ({one_line(error)}); log in as "
            "somebody who may, with hf auth login"
        ) from None
    if why := _why_not_make(repository, user):
        raise ConversionError(f"{repository}: cannot be made on the Hub: {why}")
    return repository


def _why_not_make(repository: str, user: dict[str, Any]) -> str | None:
    owner = repository.partition("/")[0]
    organizations = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", ())}
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return "the token may only read; log in with one that may write"
    if owner not in (user["name"], *organizations):
        return f"{user['name']} is no member of {owner}"
    if organizations.get(owner) == "read":
        return f"{user['name']} may only read what is {owner}'s"
    return None


def upload(out: Path, repository: str) -> None:
    """Upload the folder ``out``, and make the repository if it is not there.

    Raises:
        ConversionError: it failed; ``out`` stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=out)
    except Exception as error:
        raise ConversionError(
            f"{out} is complete, but uploading it to {repository} failed ({one_line(error)}); "
            f"try again with: hf upload {repository} {out}"
        ) from None
