"""Push a pruned checkpoint to the Hub, after checking what is sent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cka.hub.card import PLACEHOLDER, model_card
from hf_cka.hub.facts import read_facts, weight_files
from hf_cka.hub.private import Finding, find_private, find_private_text

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

# What training leaves beside a checkpoint: of no use to who loads it, and full of paths and host names.
IGNORED = (
    ".cache/**",
    ".git/**",
    "__pycache__/**",
    "checkpoint-*/**",
    "events.out.tfevents.*",
    "**/events.out.tfevents.*",
    "optimizer.*",
    "rng_state*",
    "scaler.pt",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
)


def push_pruned(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    verify: bool = True,
) -> CommitInfo:
    """Push a pruned checkpoint to the Hub: checked first, with a model card, and without paths or tokens in it.

    A card is written into the folder if there is none; make it with `model_card` or `hf-cka card` before, to give it
    results or a licence. What training leaves in a folder (optimizer, scheduler, training arguments, logs) stays
    behind. Large files go through the Hub's Xet storage where the `hf_xet` package is there, else through LFS.

    Args:
        folder: what `save_pruned` wrote.
        repo_id: "user/name"; made if it does not exist.
        private: whether a new repository is private; None leaves that to the account's settings.
        token: a Hub token with write access; by default the one of `hf auth login` or `HF_TOKEN`.
        revision: branch to push to; made if it does not exist.
        commit_message: by default it says what was pruned.
        create_pr: open a pull request instead of a direct commit.
        verify: reload the checkpoint in a fresh process first; see `hf_cka.verify`.

    Returns:
        The commit; `.commit_url` is its address, `.pr_url` that of the pull request.

    Raises:
        FileNotFoundError: if there is no such folder, or no checkpoint in it.
        ValueError: for a name that is no repository id, a branch together with `create_pr`, a checkpoint without a
            pruning record, or a file that holds a path of this machine or a token; before anything is sent.
        CheckpointError: if the checkpoint fails its checks; before anything is sent.
        PermissionError: without a token.
        huggingface_hub.errors.HfHubHTTPError: what the Hub answers, an OSError.

    Example:
        >>> push_pruned("out", "user/model-pruned", private=True).commit_url  # doctest: +SKIP
        'https://huggingface.co/user/model-pruned/commit/...'
        >>> push_pruned("out", "model-pruned")
        Traceback (most recent call last):
        ValueError: repo_id='model-pruned' does not name a repository. Give 'user/name' ...
    """
    from huggingface_hub import HfApi, get_token

    from hf_cka import __version__

    _check_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(
            f"create_pr=True opens a pull request against the main branch, but revision={revision!r}. Give one of them."
        )
    path = Path(folder)
    facts = read_facts(path)
    if not weight_files(path):
        raise FileNotFoundError(f"{str(path)!r} holds a config.json but no weights. Save the model with save_pruned.")
    secret = token or get_token()
    if secret is None:
        raise PermissionError("There is no Hub token. Run `hf auth login`, set HF_TOKEN, or pass token=.")
    _refuse(find_private(path, tokens=(secret,), ignored=IGNORED))
    if verify:
        _verify(path)
    readme = path / "README.md"
    before = readme.read_bytes().decode() if readme.is_file() else None
    text = (before or str(model_card(path, repo_id=repo_id))).replace(PLACEHOLDER, repo_id)
    if text != before:
        _refuse(find_private_text(text, "README.md", tokens=(secret,)))
        readme.write_bytes(text.encode())

    api = HfApi(token=secret, library_name="hf_cka", library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    message = commit_message or f"Upload {facts.plan.model_type} pruned with hf_cka: {facts.ratio:.1%} of it removed"
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=path,
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=list(IGNORED),
    )


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    user, _, name = str(repo_id).partition("/")
    reason = ""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = f" ({str(error).rstrip('.')})"
    if reason or not user or not name:
        raise ValueError(
            f"repo_id={repo_id!r} does not name a repository. Give 'user/name' or 'organization/name'{reason}."
        )


def _verify(path: Path) -> None:
    from hf_cka.modeling import CheckpointError, verify

    verification = verify(path)
    if not verification.passed:
        raise CheckpointError(
            f"The checkpoint fails its checks, and nothing was pushed. Save it again with save_pruned.\n{verification}"
        )


def _refuse(findings: list[Finding]) -> None:
    if findings:
        listed = "\n".join(f"  {finding}" for finding in findings[:10])
        more = f"\n  and {len(findings) - 10} more" if len(findings) > 10 else ""
        raise ValueError(
            "Nothing was pushed, because these files hold paths of a machine or access tokens:\n"
            f"{listed}{more}\nEdit or remove them and push again; revoke a token that was written to a file."
        )
