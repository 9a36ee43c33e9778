"""Uploads a checkpoint to the Hugging Face hub."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from .saving import save_checkpoint

if TYPE_CHECKING:
    from ..modeling import CoupledForCausalLM


def push(
    ensemble: CoupledForCausalLM,
    repo_id: str,
    *,
    include_bases: bool = False,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload coupled language models",
    create_pr: bool = False,
) -> Any:
    """Uploads what `save_pretrained` writes; see `CoupledForCausalLM.push_to_hub`."""
    local = [n for n, member in ensemble.members.items() if Path(str(member.ref.base)).is_dir()]
    if local and not include_bases:
        warnings.warn(
            f"{', '.join(local)}: loaded from a folder of this machine, where others cannot load it from; "
            "couple from hub ids or pass include_bases=True",
            stacklevel=3,
        )
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(ensemble, folder, include_bases=include_bases)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
