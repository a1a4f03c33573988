from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from qmoe.checkpoints.schema import MANIFEST_NAME, Manifest
from qmoe_convert import ConversionError
from qmoe_convert.convert import convert
from qmoe_convert.hub import check_name, check_rights


class Hub:
    """The Hub as one user sees it: name, roles in organizations, and repositories that exist."""

    role = "write"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.uploaded: dict[str, list[str]] = {}
        self.repositories = {"me/old": True, "acme/closed": False}
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")

    def whoami(self) -> dict[str, Any]:
        orgs = [{"name": "acme", "roleInOrg": "write"}, {"name": "shop", "roleInOrg": "read"}]
        return {"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": self.role}}}

    def repo_exists(self, name: str) -> bool:
        return name in self.repositories

    def auth_check(self, name: str, *, write: bool) -> None:
        if not self.repositories[name]:
            raise OSError("403\nForbidden")

    def create_repo(self, name: str, exist_ok: bool) -> None:
        self.made.append(name)

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
        self.uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def test_download_and_upload(
    hub: Hub, qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(qwen3_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("org/model", tmp_path / "out", revision="v1", push_to_hub="model-int8")
    assert (asked["repo"], asked["revision"]) == ("org/model", "v1")
    assert "*.safetensors" in asked["patterns"]
    assert not any(p.endswith((".bin", ".py", ".pt")) or p == "*" for p in asked["patterns"])
    assert hub.made == ["me/model-int8"]
    assert {"config.json", MANIFEST_NAME} <= set(hub.uploaded["me/model-int8"])
    assert Manifest.read(tmp_path / "out").source == "org/model"


@pytest.mark.parametrize("name", ["me/old", "new", "acme/new"])
def test_rights(hub: Hub, name: str) -> None:
    assert check_rights(name) == {"new": "me/new"}.get(name, name)
    assert not hub.made


@pytest.mark.parametrize(
    ("name", "role", "message"),
    [
        ("acme/closed", "write", "cannot be written to on the Hub .403 Forbidden.*hf auth login"),
        ("elsewhere/new", "write", "me is no member of elsewhere"),
        ("shop/new", "write", "me may only read what is shop's"),
        ("me/new", "read", "the token may only read"),
    ],
)
def test_no_rights_are_told_before_anything_is_read(
    hub: Hub, tmp_path: Path, name: str, role: str, message: str
) -> None:
    hub.role = role
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "not read", tmp_path / "out", push_to_hub=name)
    assert not hub.made and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a/b/c", "me/with space", "-x", ""])
def test_names(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a repository"):
        check_name(name)


def test_failures_are_one_line(
    hub: Hub, qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("404\nnot found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConversionError, match=r"org/model: .* from the Hub: 404 not found"):
        convert("org/model", tmp_path / "out")
    monkeypatch.setattr(hub, "upload_folder", fail)
    message = r"is complete, but uploading it .*404 not found.*hf upload me/model"
    with pytest.raises(ConversionError, match=message):
        convert(qwen3_folder, tmp_path / "out", push_to_hub="me/model", verify=False)
    assert (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConversionError, match="nobody is logged in to the Hub; run hf auth login"):
        convert(qwen3_folder, tmp_path / "other", push_to_hub="me/model")
